"""Low-rank adapters of a frozen network.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685), equation 3 and
section 4.1. A convolution's kernel counts as the matrix of its output channels by all that one output pixel sees, which
is what PEFT's adapter of a convolution computes. Where the paper says only that A starts random, it starts here as in
PEFT, Kaiming-uniform with a slope of sqrt(5).

The frozen network runs in eval mode, also while its factors are trained: its running statistics and dropout are those
of the network that is adapted.

Shape legend: O output channels, I input values that an output sees, R rank, S samples, F features, C classes.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.lora_forms import SUFFIXES, Form, factors, frozen_factors, starts
from raywgen.weights import Layout, StateDict, WeightsError
from raywgen.weights.reader import WeightsReader


class LoRANetwork(nn.Module):
    """A frozen network with trainable factors; both factors together start at zero, so it starts as that network.

    Its parameters, and so its `state_dict`, are `NAME.lora_A` `(R, I)` and `NAME.lora_B` `(O, R)` for every adapted
    weight `NAME.weight`, and the tensors of `train_head` under their own names. Of other forms they are `NAME.lora_B`
    alone, or `NAME.lora_core` `(R, R)`, and the other factors are frozen (`raywgen.tasks.networks.lora_forms`).

    Args:
        base: The network to adapt; it is frozen in place and runs in eval mode.
        rank: R.
        targets: Regular expressions; a weight of an `nn.Linear` or `nn.Conv2d` is adapted if one is found in its name.
        alpha: The product of the factors counts `alpha / rank` times; `rank` by default.
        train_head: Regular expressions for the names of parameters of any kind that are trained whole.
        form: What is trained: both `factors`, `b` alone, or the `core` between frozen ones.

    Raises:
        TaskError: There is no such form, an expression finds nothing, a tensor is wanted in both ways, or the rank is
            above what a weight has.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        targets: Sequence[str],
        alpha: float | None = None,
        train_head: Sequence[str] = (),
        form: Form = "factors",
    ) -> None:
        super().__init__()
        check_sizes(rank=rank)
        if form not in SUFFIXES:
            raise TaskError(f"form={form}: give one of {', '.join(SUFFIXES)}")
        if alpha is not None and not alpha > 0:
            raise TaskError(f"alpha={alpha}: must be above 0")
        # A module in a tuple is not registered: the frozen values stay out of the state_dict.
        self._frozen = (base.eval().requires_grad_(False),)
        self._scale = 1.0 if alpha is None else alpha / rank
        self._form: Form = form
        self._fixed: dict[str, tuple[Tensor, ...]] = {}
        self._adapted = _found("targets", targets, _matrices(base))
        self._whole = _found("train_head", train_head, [name for name, _ in base.named_parameters()])
        if self.fits_head and (missing := sorted(set(self.head_names) - set(self._whole))):
            raise TaskError(f"train_head: the head is fitted, and '{missing[0]}' is not found; give its name, too")
        if both := sorted(set(self._adapted) & set(self._whole)):
            raise TaskError(f"'{both[0]}' is found by targets and by train_head; narrow one of them")
        for name, parameter in base.named_parameters():
            if name in self._adapted:
                _check_rank(name, parameter, rank)
                for suffix, start in starts(form, parameter.flatten(1), rank).items():
                    _register(self, _named(name, suffix), start)
                self._fixed[name] = frozen_factors(form, parameter.flatten(1), rank)
            elif name in self._whole:
                _register(self, name, parameter.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs of the frozen network with the adapted weights.

        Args:
            x: Inputs, as the frozen network takes them, for instance rows `(S, F)` for logits `(S, C)`.
        """
        return functional_call(self._base(), self._changed(), (x,))

    @property
    def fits_head(self) -> bool:
        """Whether the frozen network's head is fitted to examples."""
        return bool(getattr(self._frozen[0], "fits_head", False))

    @property
    def head_names(self) -> tuple[str, str]:
        """Names of the weight and the bias of a head that is fitted."""
        return self._frozen[0].head_names  # pyright: ignore[reportReturnType]

    def without_head(self) -> nn.Module:
        """Returns a network with the same factors, whose base has no head."""
        twin = copy.copy(self)
        head = set(self.head_names)
        twin._whole = [name for name in self._whole if name not in head]
        twin._modules = {name: part for name, part in self._modules.items() if f"{name}.weight" not in head}
        twin._frozen = (self._frozen[0].without_head(),)  # pyright: ignore[reportCallIssue]
        return twin

    def extra_repr(self) -> str:
        """Returns the adapted tensors and the scale in words."""
        return f"targets={self._adapted}, train_head={self._whole}, scale={self._scale:g}"

    def _base(self) -> nn.Module:
        """Returns the frozen network, with all frozen factors, where `functional_call` may have put the parameters."""
        (base,) = self._frozen
        device = next(self.parameters()).device
        if device.type != "meta" and device != next(base.parameters()).device:
            # A tensor that is moved in inference mode could not be trained through later.
            with torch.inference_mode(False):
                self._apply_frozen(lambda tensor: tensor.to(device))
        return base

    def _changed(self) -> StateDict:
        """Returns the weights that differ from the frozen network's, differentiable in this network's parameters."""
        base = self._base()
        weights = {name: attrgetter(name)(self) for name in self._whole}
        for name in self._adapted:
            weights[name] = adapted_weight(attrgetter(name)(base), *self._factors(name), self._scale)
        return weights

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns A `(R, I)` and B `(O, R)` of each adapted weight, by the name of its module."""
        self._base()
        return {name.removesuffix(".weight"): self._factors(name) for name in self._adapted}

    def frozen_factors(self) -> dict[str, tuple[Tensor, ...]]:
        """Returns the factors of each adapted weight that are not trained, by the name of its module."""
        self._base()
        return {name.removesuffix(".weight"): parts for name, parts in self._fixed.items()}

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        trained = tuple(attrgetter(_named(name, suffix))(self) for suffix in SUFFIXES[self._form])
        return factors(self._form, trained, self._fixed[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the frozen network and the frozen factors, too, though they are no submodules."""
        self._apply_frozen(fn, recurse)
        return super()._apply(fn, recurse)

    def _apply_frozen(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        self._frozen[0]._apply(fn, recurse)
        # In place, because networks without a head share both with the one that they are made of.
        self._fixed.update({name: tuple(map(fn, parts)) for name, parts in self._fixed.items()})


def load_base(base: nn.Module, path: str, name: str) -> None:
    """Loads a network's weights from a file, in the network's own dtypes.

    Batch counters that the file does not hold stay as they are; pickled code in the file is never executed.

    Args:
        base: The network to fill.
        path: A `.safetensors` or torch file.
        name: The network's name, for messages.

    Raises:
        TaskError: The file is missing or unsafe, or holds another network's weights.
    """
    own = base.state_dict()
    layout = Layout.from_state_dict(own)
    try:
        packed = WeightsReader().read(path)
        names = packed.layout.names_in(layout)
        state = packed.layout.unpack(torch.from_numpy(packed.packed_P))
        state = {names.get(key, key): tensor for key, tensor in state.items()}
        state = {key: tensor.to(own[key].dtype) if key in own else tensor for key, tensor in state.items()}
        counters = {spec.name: own[spec.name] for spec in layout.tensors if not spec.is_generated}
        layout.check(counters | state, path)
    except WeightsError as error:
        raise TaskError(f"these are no weights of the base '{name}': {error}") from error
    if not any(tensor.is_meta for tensor in own.values()):
        base.load_state_dict(counters | state)


def adapted_weight(frozen: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Returns equation 3's W = W0 + (alpha / r) B A, with `scale` = alpha / r, in the shape of W0.

    Args:
        frozen: W0, `(O, I)`, or a kernel `(O, D, H, W)` with I = D * H * W.
        a_RI: A.
        b_OR: B.
        scale: Scale of the update.
    """
    return frozen + scale * (b_OR @ a_RI).reshape(frozen.shape)


@torch.no_grad()
def merge(network: LoRANetwork) -> StateDict:
    """Returns a `state_dict` of the frozen architecture that computes the same function as the adapted network."""
    base = network._base()
    # By identity, so that a weight that is tied to an adapted one changes with it.
    changed = {id(attrgetter(name)(base)): weight for name, weight in network._changed().items()}
    tensors: StateDict = base.state_dict(keep_vars=True)
    return {name: changed.get(id(tensor), tensor).detach().clone() for name, tensor in tensors.items()}


def _check_rank(name: str, weight: Tensor, rank: int) -> None:
    num_out, num_in = weight.flatten(1).shape
    if rank > min(num_out, num_in):
        most = min(num_out, num_in)
        raise TaskError(
            f"rank={rank}: '{name}' is {num_out} x {num_in}; give at most {most}, or leave it out of targets"
        )


def _named(name: str, suffix: str) -> str:
    return f"{name.removesuffix('weight')}{suffix}"


def _register(root: nn.Module, name: str, values: Tensor) -> None:
    """Adds a parameter under a dotted name, with the modules that hold it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(leaf, nn.Parameter(values))


def _matrices(base: nn.Module) -> list[str]:
    """Returns the names of the weights that are matrices or kernels."""
    kinds = {path: isinstance(module, nn.Linear | nn.Conv2d) for path, module in base.named_modules()}
    names = [name.rpartition(".") for name, _ in base.named_parameters()]
    return ["".join(parts) for parts in names if kinds[parts[0]] and parts[2] == "weight"]


def _found(key: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the names in which one of the patterns is found, in their order."""
    if isinstance(patterns, str):
        raise TaskError(f"{key}={patterns}: give a list, for instance [{patterns}]")
    found: set[str] = set()
    for pattern in patterns:
        try:
            own = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise TaskError(f"{key}: '{pattern}' is no regular expression ({error}); put \\ before signs") from error
        if not own:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            remedy = f"the nearest are {', '.join(near)}" if near else "it has no nn.Linear and no nn.Conv2d"
            raise TaskError(f"{key}: '{pattern}' is found in no tensor of the base; {remedy}")
        found.update(own)
    if key == "targets" and not found:
        raise TaskError("targets is empty; name the weights to adapt, for instance [linear]")
    return [name for name in names if name in found]
