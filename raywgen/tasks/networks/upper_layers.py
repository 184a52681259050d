"""The upper layers of a pretrained text model, from the hidden states below them to a sentence's features or logits.

What lies below is frozen and the same for all tasks, so it is computed once for each sentence (`raywgen.tasks.
sentence_tasks`). Names of tensors are those of transformers, with the numbers that layers have in the whole model, so
that adapters of them are adapters of the whole model.

Shape legend: S sentences, T tokens, H width of the encoder, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.text_models import PACKAGED, check_digest, load_encoder_model

Head = Literal["trained", "fitted"]
Pooling = Literal["mean", "pooler"]
_TAKEN = "give a BERT, RoBERTa, ELECTRA, DistilBERT, MPNet, ModernBERT, Llama, Qwen2, Gemma2, or one like them"


class UpperLayers(nn.Module):
    """The layers of a text model from one on, a vector of a sentence's tokens, and a linear head.

    A sentence is a vector of H values that is not read here, then its hidden states below these layers, `(T, H)`;
    tokens of padding are zeros. Its features are the mean over all others, with a mean square of 1, or what BERT's own
    pooler makes of the first token, so that the head is that of transformers' `BertForSequenceClassification`.

    Args:
        model: A model of transformers as `AutoModel` loads it. It is taken apart: build one for each of these.
        first_layer: Number of the first layer, from 0.
        num_classes: C; 0 for features in place of logits.
        fits_head: Whether the head is fitted to examples, as `raywgen.tasks.fitted_head` does it.
        pooling: `mean`, or BERT's own `pooler`.

    Attributes:
        head_names: Names of the head's weight and bias.

    Raises:
        TaskError: The model has no such layer, or is of a kind that cannot be entered at a layer.
    """

    head_names = ("classifier.weight", "classifier.bias")

    def __init__(
        self,
        model: nn.Module,
        first_layer: int,
        num_classes: int,
        *,
        fits_head: bool = False,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        self.fits_head, self._pooling = fits_head, pooling
        if pooling == "pooler" and model.config.model_type != "bert":  # pyright: ignore[reportAttributeAccessIssue]
            raise TaskError(f"pooling=pooler: {type(model).__name__} is no BERT; leave pooling at mean")
        self.width = int(model.config.hidden_size)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        layers = _layers_of(model, first_layer)
        self._is_causal = not isinstance(getattr(model, "embeddings", None), nn.Module)
        example = _example(model, first_layer)
        _leave_upper(model, layers, first_layer, keeps_pooler=pooling == "pooler")
        # In a tuple it is not registered: its parts are, under the names that they have in the model.
        self._model = (model,)
        for name, part in model.named_children():
            self.add_module(name, part)
        self._check(*example)
        self.classifier = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`, or features `(S, H)`, of sentences `(S, H + T * H)`."""
        last_STH, is_real_ST = self.last_hidden(x)
        if self._pooling == "pooler":
            return self.classifier(self.get_submodule("pooler")(last_STH))
        return self.classifier(mean_feature(last_STH, is_real_ST))

    def last_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last hidden states `(S, T, H)` of sentences `(S, H + T * H)`, and which tokens are real."""
        hidden_STH = x.unflatten(-1, (-1, self.width))[:, 1:]
        is_real_ST = (hidden_STH != 0).any(dim=-1)
        return self._last(hidden_STH, is_real_ST), is_real_ST

    def _last(self, hidden_STH: Tensor, is_real_ST: Tensor) -> Tensor:
        """Returns the last hidden states `(S, T, H)`, given those below these layers."""
        is_seen_S1TT = is_real_ST[:, None, None, :].expand(-1, 1, is_real_ST.shape[1], -1)
        if self._is_causal:
            is_seen_S1TT = is_seen_S1TT & torch.ones_like(is_seen_S1TT[0]).tril()
        # In the form that is added to scores: from any other one transformers would look at values, which vmap forbids.
        mask_S1TT = torch.where(is_seen_S1TT, 0.0, torch.finfo(hidden_STH.dtype).min)
        (model,) = self._model
        return model(inputs_embeds=hidden_STH, attention_mask=mask_S1TT).last_hidden_state

    @torch.no_grad()
    def _check(self, below_STH: Tensor, is_real_ST: Tensor, wanted_STH: Tensor) -> None:
        """Makes sure that examples come out as of the whole model, since each kind of model has ways of its own."""
        if wanted_STH.is_meta:
            return
        found_SH, wanted_SH = (mean_feature(one, is_real_ST) for one in (self._last(below_STH, is_real_ST), wanted_STH))
        if not torch.allclose(found_SH, wanted_SH, atol=1e-3):
            raise TaskError(f"{type(self._model[0]).__name__} cannot be entered at a layer; {_TAKEN}")

    def without_head(self) -> nn.Module:
        """Returns a module of the same layers that returns features."""
        twin = copy.copy(self)
        # Of its own, so that only the head is another one.
        twin._modules = {**self._modules, "classifier": nn.Identity()}
        return twin


class _Given(nn.Module):
    """Takes the place of an encoder's embeddings: returns what is given in their place."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return next(one for one in (*given, *named.values()) if isinstance(one, Tensor) and one.dim() == 3)


class _Layers(nn.Module):
    """The layers of a model from one on, under their numbers in the model."""

    def __init__(self, layers: nn.ModuleList, first: int) -> None:
        super().__init__()
        for number in range(first, len(layers)):
            self.add_module(str(number), layers[number])

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return list(self.children())[index]

    def __len__(self) -> int:
        return len(self._modules)


def mean_feature(hidden_STH: Tensor, is_real_ST: Tensor) -> Tensor:
    """Returns the mean `(S, H)` over a sentence's real tokens, with a mean square of 1."""
    mean_SH = (hidden_STH * is_real_ST.unsqueeze(-1)).sum(dim=1) / is_real_ST.sum(dim=1).clamp(min=1).unsqueeze(-1)
    return nn.functional.rms_norm(mean_SH, mean_SH.shape[-1:], eps=1e-12)


def upper_layers(
    path: str = PACKAGED,
    first_layer: int = 5,
    num_classes: int = 2,
    head: Head = "trained",
    digest: str = "",
    pooling: Pooling = "mean",
) -> UpperLayers:
    """Builds the upper layers of a pretrained encoder.

    Args:
        path: Folder of the encoder in the form of the hub, `hf:NAME`, or `packaged`.
        first_layer: Number of the first of them, from 0.
        num_classes: C; 0 for features in place of logits.
        head: `trained` with the network, or `fitted` to labelled examples in closed form.
        digest: The digest of the encoder's weights, as `encoder_digest` returns it, if these must be the same.
        pooling: `mean` over a sentence's tokens, or BERT's own `pooler`, for `BertForSequenceClassification`.

    Raises:
        TaskError: The encoder is not there, is another one than `digest` says, cannot be entered at this layer, or is
            no BERT where its pooler is asked for.
    """
    check_sizes(first_layer=first_layer + 1, num_classes=num_classes + 1)
    if head not in get_args(Head):
        raise TaskError(f"head={head}: give {' or '.join(get_args(Head))}")
    if pooling not in get_args(Pooling):
        raise TaskError(f"pooling={pooling}: give {' or '.join(get_args(Pooling))}")
    check_digest(path, digest)
    return UpperLayers(load_encoder_model(path), first_layer, num_classes, fits_head=head == "fitted", pooling=pooling)


def _layers_of(model: nn.Module, first: int) -> str:
    """Returns the name of a model's list of layers."""
    num_layers = int(model.config.num_hidden_layers)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    kind = type(model).__name__
    if not 0 <= first < num_layers:
        raise TaskError(f"first_layer={first}: {kind} has layers 0 to {num_layers - 1}")
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == num_layers:
            return name
    raise TaskError(f"{kind} has no list of {num_layers} layers; {_TAKEN}")


@torch.no_grad()
def _example(model: nn.Module, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden states `(S, T, H)` below a layer, which tokens are real, and the last ones, of two examples."""
    is_real_ST = torch.ones(2, 4, dtype=torch.bool)
    is_real_ST[1, 3:] = False
    tokens = {"input_ids": torch.arange(1, 5).expand(2, -1), "attention_mask": is_real_ST.long()}
    output = model(**tokens, output_hidden_states=True)
    return output.hidden_states[first] * is_real_ST.unsqueeze(-1), is_real_ST, output.last_hidden_state


def _leave_upper(model: nn.Module, layers: str, first: int, *, keeps_pooler: bool) -> None:
    """Takes everything below a layer out of a model, which then begins with given hidden states."""
    parent, _, leaf = layers.rpartition(".")
    kept = model.get_submodule(layers)
    assert isinstance(kept, nn.ModuleList)
    setattr(model.get_submodule(parent), leaf, _Layers(kept, first))
    if isinstance(getattr(model, "embeddings", None), nn.Module):
        model.embeddings = _Given()
    else:
        model.set_input_embeddings(nn.Identity())  # pyright: ignore[reportCallIssue]
    if getattr(model, "pooler", None) is not None and not keeps_pooler:
        # It would read the first token, which the mean does not.
        model.pooler = None  # pyright: ignore[reportArgumentType]
