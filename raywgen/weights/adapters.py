"""Low-rank adapters in the form of the PEFT library: folders, and live modules that take one up and give it back.

An adapter of a module's matrix W, `(O, I)`, is `W + scale * B A` (Hu et al., arXiv 2106.09685, equation 3). A folder
holds `adapter_model.safetensors`, whose names begin with `base_model.model.`, and `adapter_config.json`. PEFT takes no
offence at names that it does not find: it then changes nothing. So names are checked here.

Shape legend: O output values, I input values, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.files import write_text
from raywgen.inputs import read_json
from raywgen.weights.errors import WeightsError
from raywgen.weights.files import load_state_dict, save_state_dict
from raywgen.weights.tensors import StateDict

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ALPHA = 8
"""Where a config says none, as in PEFT."""
_PREFIX = "base_model.model."
_PLAIN = re.compile(r"[\w.]+")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# Whatever changes the product of the factors, or is no low-rank adapter of a matrix.
_OTHER_KINDS = (
    "use_dora",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
)


class AdapterError(WeightsError):
    """An adapter that cannot be read, or that does not fit a module; the message names the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAAdapter:
    """A low-rank adapter.

    Attributes:
        factors: A `(R, I)` and B `(O, R)` of each module that is adapted, by its name in the base model.
        scales: The number that the product of each module's factors counts.
        whole: Tensors that take the place of the base model's own, by their name there.
        base: Name or folder of the base model; empty where it is not known.
        task_type: PEFT's name for the kind of model, such as `FEATURE_EXTRACTION`, `SEQ_CLS` or `CAUSAL_LM`.

    Examples:
        >>> raywgen.LoRAAdapter(factors={"0": (torch.ones(1, 4), torch.ones(3, 1))}, scales={"0": 0.5})
        LoRAAdapter(1 modules, rank 1)
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    whole: StateDict = field(default_factory=dict)
    base: str = ""
    task_type: str = "FEATURE_EXTRACTION"

    def __repr__(self) -> str:
        ranks = sorted({len(a_RI) for a_RI, _ in self.factors.values()})
        base = f" of {self.base}" if self.base else ""
        whole = f", {len(self.whole)} tensors whole" if self.whole else ""
        return f"LoRAAdapter({len(self.factors)} modules{base}, rank {', '.join(map(str, ranks))}{whole})"

    def change(self, name: str) -> Tensor:
        """Returns what is added to a module's matrix, `(O, I)`."""
        a_RI, b_OR = self.factors[name]
        return self.scales[name] * (b_OR.float() @ a_RI.float())


def write_adapter(adapter: LoRAAdapter, folder: str | Path) -> Path:
    """Writes a folder that `PeftModel.from_pretrained` loads, and returns it.

    Args:
        adapter: The adapter.
        folder: The folder; it is made, and files of an adapter in it are replaced.

    Raises:
        AdapterError: The adapter has no factors; nothing was written.
        WeightsError: The disk is full, or the folder cannot be written.
    """
    folder, config = Path(folder), adapter_config(adapter)
    save_state_dict(adapter_tensors(adapter), folder / TENSORS, {"format": "pt"})
    try:
        write_text(folder / CONFIG, config)
    except OSError as error:
        raise WeightsError(f"cannot write {folder / CONFIG}: {error.strerror or error}") from error
    return folder


def adapter_tensors(adapter: LoRAAdapter) -> StateDict:
    """Returns an adapter's tensors by the names that PEFT gives them in a file."""
    tensors: StateDict = {}
    for name, pair in adapter.factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = factor.detach().contiguous()
    return tensors | {f"{_PREFIX}{name}": tensor.detach().contiguous() for name, tensor in adapter.whole.items()}


def adapter_config(adapter: LoRAAdapter) -> str:
    """Returns the text of `adapter_config.json`, which names modules in full.

    PEFT also takes a module whose name ends in a dot and one of these. It finds no tensors for that one, and gives it
    factors whose product is zero.

    Raises:
        AdapterError: The adapter has no factors.
    """
    if not adapter.factors:
        raise AdapterError("the adapter has no factors, and PEFT loads none that adapts no module; give it some")
    ranks = {name: len(a_RI) for name, (a_RI, _) in adapter.factors.items()}
    alphas = {name: adapter.scales[name] * rank for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(adapter.factors),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
    }
    return json.dumps(config, indent=2)


def read_adapter(folder: str | Path) -> LoRAAdapter:
    """Reads a folder of PEFT: LoRA, also with rsLoRA's scale, and with modules that were saved whole.

    Args:
        folder: The folder.

    Raises:
        AdapterError: A file is missing or damaged, the adapter is of another kind (DoRA, IA3, prompts), or a factor
            lacks its partner.
        WeightsError: The tensors cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter")
    config = _read_config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: StateDict = {}
    for key, tensor in load_state_dict(folder / TENSORS).items():
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{folder / TENSORS}: PEFT finds no tensor by the name '{key}'; it must begin {_PREFIX}")
        name = key.removeprefix(_PREFIX)
        if found := _FACTOR.fullmatch(name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif "lora_" in name:
            raise AdapterError(f"{folder / TENSORS}: '{key}' is no factor of a matrix; such adapters are not read")
        else:
            whole[name] = tensor
    for name, pair in pairs.items():
        dims = {part.dim() for part in pair.values()}
        if set(pair) != {"A", "B"} or dims != {2} or len(pair["A"]) != pair["B"].shape[1]:
            raise AdapterError(
                f"{folder / TENSORS}: '{name}' has no two matrices of one rank; give an adapter of linear layers"
            )
    if not pairs:
        raise AdapterError(f"{folder / TENSORS} holds no factors of LoRA; write the adapter again")
    return LoRAAdapter(
        factors={name: (pair["A"], pair["B"]) for name, pair in pairs.items()},
        scales={name: _scale(config, name, len(pair["A"])) for name, pair in pairs.items()},
        whole=whole,
        base=str(config.get("base_model_name_or_path") or ""),
        task_type=str(config.get("task_type") or "FEATURE_EXTRACTION"),
    )


class Injected:
    """A module that took up an adapter, and gives it back.

    Args:
        module: The module.
        originals: Its own tensors by name, as they were before.
    """

    def __init__(self, module: nn.Module, originals: StateDict) -> None:
        self.module, self._originals = module, originals

    def __repr__(self) -> str:
        return f"Injected({type(self.module).__name__}, {len(self._originals)} tensors changed)"

    @torch.no_grad()
    def reset(self) -> None:
        """Puts the module's own values back, to the last bit; a second call changes nothing."""
        own = self.module.state_dict(keep_vars=True)
        for name, tensor in self._originals.items():
            own[name].copy_(tensor)
        self._originals = {}

    def __enter__(self) -> nn.Module:
        return self.module

    def __exit__(self, *_: object) -> None:
        self.reset()


@torch.no_grad()
def inject(module: nn.Module, adapter: LoRAAdapter | str | Path) -> Injected:
    """Adds an adapter to a live module, in place; what it returns takes it out again.

    Args:
        module: The base model: a `torch.nn` module with matrices by the adapter's names, such as a transformer.
        adapter: The adapter, or its folder.

    Returns:
        A handle whose `reset()` puts the module's own values back; it is a context manager, too.

    Raises:
        AdapterError: The module has no such matrices, or they are of other sizes; it has not changed then.

    Examples:
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = raywgen.LoRAAdapter(factors={"0": (torch.ones(1, 4), torch.ones(3, 1))}, scales={"0": 0.5})
        >>> before = base(torch.ones(1, 4))
        >>> with raywgen.inject(base, adapter) as adapted:
        ...     after = adapted(torch.ones(1, 4))
        >>> torch.allclose(after - before, torch.tensor(2.0))
        True
    """
    if not isinstance(adapter, LoRAAdapter):
        adapter = read_adapter(adapter)
    own = module.state_dict(keep_vars=True)
    values: StateDict = {}
    for name in adapter.factors:
        weight, change_OI = own.get(f"{name}.weight"), adapter.change(name)
        if weight is None:
            near = next((key for key in own if key.endswith(f"{name}.weight")), next(iter(own), "none"))
            raise AdapterError(
                f"{type(module).__name__} has no matrix '{name}.weight', but '{near}'; give its base model"
            )
        # GPT-2 and its kin keep their matrices the other way round.
        if type(module.get_submodule(name)).__name__ == "Conv1D":
            change_OI = change_OI.t()
        values[f"{name}.weight"] = weight.float() + _fitting(f"{name}.weight", weight, change_OI)
    for name, tensor in adapter.whole.items():
        if name not in own:
            raise AdapterError(
                f"{type(module).__name__} has no '{name}', which the adapter brings whole; give its base model"
            )
        values[name] = _fitting(name, own[name], tensor)
    originals = {name: own[name].detach().clone() for name in values}
    for name, value in values.items():
        own[name].copy_(value)
    return Injected(module, originals)


def _fitting(name: str, own: Tensor, other: Tensor) -> Tensor:
    if own.shape != other.shape:
        raise AdapterError(
            f"'{name}' is {list(own.shape)} in the module and {list(other.shape)} in the adapter, which is one of "
            "another base model"
        )
    return other.to(own.device)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read ({error}); write the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} holds no settings; write the adapter again")
    kind = str(config.get("peft_type") or "no adapter")
    if other := next((name for name in _OTHER_KINDS if config.get(name)), ""):
        kind = f"{kind} with {other}"
    if kind != "LORA":
        raise AdapterError(f"{folder} is {kind}; plain LoRA is read alone")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder} adapts biases too (bias={config['bias']}); LoRA with bias=none is read alone")
    return config


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Returns alpha / r, or rsLoRA's alpha / sqrt(r), of a module.

    PEFT takes the keys of `alpha_pattern` for regular expressions of the ends of names. As a folder is data, and an
    expression may take for ever, they are read as names here.
    """
    alpha, patterns = config.get("lora_alpha", _ALPHA), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(isinstance(one, int | float) for one in (alpha, *patterns.values())):
        raise AdapterError(f"{CONFIG}: lora_alpha={alpha}, alpha_pattern={patterns} are no numbers; write it again")
    for pattern, other in patterns.items():
        plain = str(pattern).replace("\\.", ".")
        if not _PLAIN.fullmatch(plain):
            raise AdapterError(f"alpha_pattern '{pattern}' is no name of a module; write out the names that it finds")
        if f".{name}".endswith(f".{plain}"):
            alpha = other
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
