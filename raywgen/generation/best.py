"""Best of n: several networks are written, the one that fits the labelled examples best is kept.

Shape legend: B networks asked for, n candidates of each, D values, S unlabelled samples, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raywgen.generation.statistics import with_new_statistics
from raywgen.generators import Generated, Generator
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks import balanced_cross_entropy, stacked_logits
from raywgen.tasks.stacked import without_ties
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer


class SamplingError(ValueError):
    """Settings of drawing tokens for a generator that draws none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The kept networks.

    Attributes:
        values_BD: Flat vectors.
        loss_B: Class-balanced loss on the labelled examples, nats.
        logits_BSC: Outputs on these.
        log_prob_B: Log-probability of each, nats, or None. It says how usual a network is to the generator, not how
            well it answers.
    """

    values_BD: Tensor
    loss_B: Tensor
    logits_BSC: Tensor
    log_prob_B: Tensor | None


def sampling_options(generator: Generator, sampling: SamplingConfig | None) -> dict[str, Any]:
    """What to hand to `generate` beside what every generator takes; nothing where all is as by default.

    Raises:
        SamplingError: The generator draws no tokens.
    """
    if sampling is None or sampling == SamplingConfig():
        return {}
    if not generator.takes_sampling:
        raise SamplingError(f"sampling: a generator of method '{generator.method}' draws no tokens; leave it out")
    return {"sampling": sampling}


@torch.no_grad()
def generate_candidates(
    generator: Generator,
    condition: Condition,
    layout: Layout,
    *,
    temperature: float,
    seed: int,
    normalizer: Normalizer | None = None,
    sampling: SamplingConfig | None = None,
    index_B: Tensor | None = None,
    best_of: int = 1,
) -> Generated:
    """The `B * best_of` networks that `generate_best` chooses from, those of a condition side by side.

    Raises:
        SamplingError: The generator draws no tokens.
    """
    index_B = torch.arange(len(condition)) if index_B is None else index_B
    candidate_N = (index_B.unsqueeze(1) * best_of + torch.arange(best_of)).flatten()
    noise = KeyedNoise(seed, candidate_N, 0)
    options = sampling_options(generator, sampling)
    told = condition.repeat(best_of)
    return generator.generate(told, layout, noise, temperature=temperature, normalizer=normalizer, **options)


@torch.no_grad()
def generate_best(
    generator: Generator,
    condition: Condition,
    layout: Layout,
    module: nn.Module,
    *,
    best_of: int,
    temperature: float,
    seed: int,
    normalizer: Normalizer | None = None,
    sampling: SamplingConfig | None = None,
    index_B: Tensor | None = None,
    unlabelled: Sequence[Tensor] | None = None,
    samples_BSF: Tensor | None = None,
) -> Best:
    """Writes `best_of` networks per condition and keeps the one with the lowest loss on its examples.

    Args:
        generator: Writes.
        condition: B conditions.
        layout: To fill.
        module: A network of the layout; its own values are not used, and it is run in eval mode.
        best_of: n.
        temperature: Of generation.
        seed: Keys the noise.
        reference: For a layout that the generator was not trained on.
        sampling: How tokens are drawn, of a generator that writes tokens; its defaults otherwise.
        index_B: Place of each network among all that are asked for, int64; keys its noise. From 0 on by default.
        unlabelled: For each condition inputs `(S, F)` from which the statistics of batch normalisation of its
            candidates are estimated anew; they stay as they were written by default.
        samples_BSF: The examples as the module takes them, where the generator is told something else of them.

    Raises:
        ValueError: `best_of` is below 1.
        SamplingError: The generator draws no tokens.
    """
    if best_of < 1:
        raise ValueError(f"best_of={best_of}: at least 1 network must be written")
    written = generate_candidates(
        generator,
        condition,
        layout,
        temperature=temperature,
        seed=seed,
        normalizer=normalizer,
        sampling=sampling,
        index_B=index_B,
        best_of=best_of,
    )
    told, values_BD = condition.repeat(best_of), written.values_BD
    samples_BSF = condition.samples_BSF if samples_BSF is None else samples_BSF
    if unlabelled is not None:
        each = zip(values_BD.split(best_of), unlabelled, strict=True)
        values_BD = torch.cat([with_new_statistics(module, layout, part_nD, x_SF) for part_nD, x_SF in each])
    # A copy, because the caller's parts may be in modes of their own; dropout would blur the comparison.
    logits = candidate_logits(
        copy.deepcopy(module).eval(), layout, values_BD, samples_BSF.repeat_interleave(best_of, 0)
    )
    loss_Bn = balanced_cross_entropy(logits, told.labels_BS).view(len(condition), best_of)
    # argmin would take a NaN for the smallest of all.
    loss_Bn = loss_Bn.masked_fill(loss_Bn.isnan(), torch.inf)
    kept_B = loss_Bn.argmin(dim=1) + torch.arange(len(condition)) * best_of
    return Best(
        values_BD=values_BD[kept_B],
        loss_B=loss_Bn.min(dim=1).values,
        logits_BSC=logits[kept_B],
        log_prob_B=None if written.log_prob_B is None else written.log_prob_B[kept_B],
    )


def candidate_logits(module: nn.Module, layout: Layout, values_ND: Tensor, samples_NSF: Tensor) -> Tensor:
    """Outputs `(N, S, C)` of written networks, each on its own samples; in float32, whatever the layout's dtype.

    Networks run as a stack, or one after another where the module's own code cannot be stacked.
    """
    state_N = layout.unflatten(values_ND, counters=module.state_dict())
    state_N = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_N.items()}
    try:
        return stacked_logits(module, state_N, samples_NSF)
    except RuntimeError:
        state_N = without_ties(module, state_N)
        each = [{name: tensor[n] for name, tensor in state_N.items()} for n in range(len(values_ND))]
        return torch.stack([functional_call(module, one, (x,)) for one, x in zip(each, samples_NSF, strict=True)])
