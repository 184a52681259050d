"""Chooses a classifier for a few labelled examples among heads that are there at once.

One head is written by the generator, the others follow from the examples in closed form. Which is best depends on the
examples' number and on how far they are from what the encoder knows. So each is judged by the loss on every example of
the head that is made from all others. Statistics of batch normalisation are those of all examples there; they know no
labels. Where a class has a single example there is nothing to judge by, and nearest class means are taken, on an
encoder that is normalised by the examples where their statistics are far from its own.

Shape legend: B tasks, S examples, J judged examples, F values of a sample, E features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from raywgen.generation.classifier import Classifier, JudgedHead, View
from raywgen.generation.conditions import make_condition
from raywgen.generation.head_names import HeadName
from raywgen.generators import GenerationRequest, Generator
from raywgen.generators.common.denoisers import is_head
from raywgen.tasks import build_network
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.ink import paper, usual_paper
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.standing import standing
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.support_heads import (
    SupportHead,
    left_out_loss,
    nearest_means_head,
    ridge_blocks_head,
    sharpened,
)
from raywgen.tasks.user_data import ConditionError, UserData
from raywgen.weights import Condition, KeyedNoise, Layout

_MOST_EXAMPLES, _MOST_JUDGED = 1024, 64
_FAR = 0.25
"""Shift of the encoder's statistics, in nats, above which the examples' own are better.

It was chosen on validation characters of Omniglot, five of one example each: plain ones stay far below it, and of those
that are paler or smaller, own statistics classify the ones above it better.
"""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way to make a head.

    Attributes:
        words: What it is.
        fit: `written` by the generator, nearest class `means`, or `ridge` regression.
        blocks: Whether it reads the encoder's last blocks.
        own_statistics: Whether the encoder is normalised by the examples.
    """

    words: str
    fit: Literal["written", "means", "ridge"]
    blocks: bool = False
    own_statistics: bool = False


KINDS: dict[str, _Kind] = {
    "written": _Kind("head written by the generator", "written"),
    "means": _Kind("nearest class means", "means"),
    "ridge": _Kind("ridge regression on the features", "ridge"),
    "blocks": _Kind("ridge regression on the encoder's last blocks", "ridge", blocks=True),
    "own-means": _Kind("nearest class means, encoder normalised by the examples", "means", own_statistics=True),
    "own-blocks": _Kind(
        "ridge regression on the encoder's last blocks, normalised by the examples",
        "ridge",
        blocks=True,
        own_statistics=True,
    ),
}
"""The heads by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The settings by which the generator draws a head.

    Attributes:
        instruction: The instruction of the condition.
        policy: Optimiser whose behaviour is wanted; empty for any.
        temperature: Temperature of the noise.
        seed: Keys the noise.
    """

    instruction: str
    policy: str = ""
    temperature: float = 0.0
    seed: int = 0


@torch.no_grad()
def choose_classifier(
    generator: Generator,
    encoder: FrozenEncoder | None,
    inputs: InputForm | None,
    data: UserData,
    head: HeadName,
    drawn: Drawn,
) -> Classifier:
    """Makes a classifier with one head, or with that of all heads whose loss on left-out examples is lowest.

    Args:
        generator: A generator of heads.
        encoder: The frozen encoder, if any.
        inputs: How pixels become samples.
        data: The examples, standardised, or as features.
        head: Name of a head, or `best`.
        drawn: How the generator draws its head.

    Raises:
        ConditionError: The generator writes no heads, the examples do not fit it, there are fewer than two classes, one
            has no example, or `head` needs an encoder that has blocks or batch normalisation.
    """
    if not writes_heads(generator):
        raise ConditionError("this generator writes whole networks, not heads; use `adapt` or `fill` of raywgen.load")
    if drawn.policy and head != "written":
        raise ConditionError(f"policy={drawn.policy}: only the written head has one; give head=written, too")
    num_classes = check_classes(data.labels)
    if num_classes < 2:
        raise ConditionError("all examples are of one class; give examples of two classes or more")
    data = data.at_most(_MOST_EXAMPLES)
    fingerprint = "" if encoder is None else encoder.fingerprint
    view = View(inputs=inputs, encoder=encoder, num_features=generator.data.num_features, fingerprint=fingerprint)
    view = replace(view, inverted=_is_inverted(view, data.x))
    names = _names(view, data, head)
    if len(names) > 1 and int(data.labels.bincount().min()) == 1:
        names = (_unjudged(view, data.x, names),)
    views = _views(view, data.x, names)
    parts = {one: [part.cpu() for part in one.parts(data.x)] for one in set(views.values())}
    rows_J = torch.from_numpy(balanced_rows(data.labels.numpy(), _MOST_JUDGED, seed=0))
    labels_J = data.labels[rows_J]
    heads = {name: _made(KINDS[name], generator, parts[views[name]], data.labels, rows_J, drawn) for name in names}
    # A head that the generator writes, and that is asked for, is left as it was written.
    if names != ("written",):
        heads = {name: sharpened(one, labels_J) for name, one in heads.items()}
    kept = _best(heads, labels_J)
    linear = nn.Linear(heads[kept].weight_CE.shape[1], num_classes)
    linear.load_state_dict({"weight": heads[kept].weight_CE, "bias": heads[kept].bias_C})
    # Where there is a choice, ridge regression is among the heads.
    reference = left_out_accuracy(parts[views[kept]][0], data.labels) if names == ("written",) else None
    judged = {name: _judged(KINDS[name].words, one, labels_J, len(heads), reference) for name, one in heads.items()}
    return Classifier(views[kept], linear, data.class_names, kept, judged)


def writes_heads(generator: Generator) -> bool:
    """Whether a generator writes heads on features, else whole networks."""
    first, _ = next(iter(generator.normalizers.values()))
    return is_head(first, generator.data.num_features)


def check_classes(labels_S: Tensor) -> int:
    """Returns the number of classes, which must be numbered from 0 without a gap.

    Raises:
        ConditionError: A number is left out.
    """
    present = labels_S.unique().tolist()
    if present != list(range(len(present))):
        raise ConditionError(f"labels are {present}; number the classes from 0 without a gap")
    return len(present)


def _names(view: View, data: UserData, head: HeadName) -> tuple[str, ...]:
    """Returns the heads that are made: the one that is asked for, or all that the encoder allows."""
    encoder = view.encoder if view.encodes(data.x) else None
    names = tuple(
        name
        for name, kind in KINDS.items()
        if (not kind.blocks or (encoder is not None and encoder.has_blocks))
        and (not kind.own_statistics or (encoder is not None and encoder.has_statistics))
    )
    if head == "best":
        return names
    if head not in names:
        raise ConditionError(f"head={head}: these examples and this encoder allow {', '.join(names)}")
    return (head,)


def _unjudged(view: View, x: Tensor, names: tuple[str, ...]) -> str:
    """Returns the head that is made where a class has one example, which cannot be left out to judge any by."""
    if "own-means" not in names or view.encoder is None:
        return "means"
    is_far = view.encoder.shift_of(view.encoder.normalised_by(view.samples(x))) > _FAR
    return "own-means" if is_far else "means"


def _views(view: View, x: Tensor, names: Sequence[str]) -> dict[str, View]:
    """Returns what each head reads; heads that read the same have the same view."""
    normalised = None
    if view.encoder is not None and any(KINDS[name].own_statistics for name in names):
        normalised = view.encoder.normalised_by(view.samples(x))
    return {
        name: replace(
            view,
            encoder=normalised if KINDS[name].own_statistics else view.encoder,
            blocks=KINDS[name].blocks,
            own_statistics=KINDS[name].own_statistics,
        )
        for name in names
    }


def _is_inverted(view: View, x: Tensor) -> bool:
    """Whether the examples' paper is the opposite of that of the images that the encoder knows."""
    if view.inputs is None or not view.encodes(x):
        return False
    pixels_SCP = view.inputs.pixels(x.reshape(len(x), -1).float()).clamp(0, 1)
    here = paper((255 * pixels_SCP).round().to(torch.uint8))
    return {here, usual_paper(view.inputs.mean)} == {"black", "white"}


def _made(
    kind: _Kind, generator: Generator, parts: list[Tensor], labels_S: Tensor, rows_J: Tensor, drawn: Drawn
) -> SupportHead:
    """Makes a head, with outputs for the judged examples."""
    num_classes = len(labels_S.unique())
    if kind.fit == "written":
        return _written(generator, parts[0], labels_S, rows_J, drawn)
    if kind.fit == "means":
        head = nearest_means_head(torch.cat(parts, dim=1), labels_S, num_classes)
    else:
        head = ridge_blocks_head(parts, labels_S, num_classes)
    return head if head.left_out_SC is None else replace(head, left_out_SC=head.left_out_SC[rows_J])


def _best(heads: Mapping[str, SupportHead], labels_J: Tensor) -> str:
    """Returns the head with the lowest loss on left-out examples, or the only one."""
    if len(heads) == 1:
        return next(iter(heads))
    return min(heads, key=lambda name: left_out_loss(heads[name], labels_J))


def _judged(words: str, head: SupportHead, labels_J: Tensor, best_of: int, linear: float | None) -> JudgedHead:
    if head.left_out_SC is None:
        return JudgedHead(words=words, left_out=None, loss=None)
    left_out = standing(head.left_out_SC, labels_J, best_of, linear)
    return JudgedHead(words=words, left_out=left_out, loss=left_out_loss(head, labels_J))


def _written(generator: Generator, features_SE: Tensor, labels_S: Tensor, rows_J: Tensor, drawn: Drawn) -> SupportHead:
    """Returns the generator's head, with the outputs of the heads that it writes for all examples but one."""
    num_classes, device = len(labels_S.unique()), generator.device
    recipe = {"name": "head", "num_features": features_SE.shape[1], "num_classes": num_classes}
    layout = Layout.from_state_dict(build_network(recipe).state_dict())
    condition = make_condition(generator, drawn.instruction, (features_SE, labels_S), drawn.policy).to(device)

    def write(samples_BSF: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        num = len(samples_BSF)
        one = Condition(
            instructions=condition.instructions * num,
            samples_BSF=samples_BSF,
            labels_BS=labels_BS,
            policies=condition.policies * num,
        )
        noise = KeyedNoise(drawn.seed, torch.arange(num, device=device), 0)
        request = GenerationRequest(condition=one, layout=layout, noise=noise, temperature=drawn.temperature)
        state = layout.unflatten(generator.generate(request).values_BD.cpu())
        return state["weight"], state["bias"]

    samples_1SF, labels_1S = condition.samples_BSF, condition.labels_BS
    weight_1CE, bias_1C = write(samples_1SF, labels_1S)
    left_out_JC = None
    if int(labels_S.bincount().min()) > 1:
        every_S = torch.arange(len(labels_S))
        others_JX = torch.stack([every_S[every_S != left_out] for left_out in rows_J]).to(device)
        weight_JCE, bias_JC = write(samples_1SF[0, others_JX], labels_1S[0, others_JX])
        left_out_JC = torch.einsum("jce,je->jc", weight_JCE, features_SE[rows_J]) + bias_JC
    return SupportHead(weight_1CE[0], bias_1C[0], left_out_JC)
