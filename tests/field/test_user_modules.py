"""Modules that are not perceptrons, and modules that do not fit, run once before anything is generated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.generation import ConditionError, TrainedGenerator
from raywgen.tasks import balanced_cross_entropy
from raywgen.tasks.runnable import runnable
from tests.builders import NUM_FEATURES, condition, igpg, network

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ASK = "Is feature 0 above zero?"


@pytest.fixture(scope="module")
def trained() -> TrainedGenerator:
    return TrainedGenerator(igpg())


def examples() -> tuple[Tensor, Tensor]:
    """Samples as images of one channel, 2 x 3."""
    drawn = condition(1, num_samples=32)
    return drawn.samples_BSF[0].view(-1, 1, 2, 3), drawn.labels_BS[0]


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


@dataclass
class Output:
    logits: Tensor


class Wrapped(nn.Module):
    """A perceptron whose forward may give something else than a tensor."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.body, self.kind = network(), kind

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return {
            "mapping": {"loss": None, "logits": logits},
            "output": Output(logits),
            "tuple": (logits, x),
            "tensor": logits,
            "other mapping": {"scores": logits},
            "text": "no",
            "a number each": logits[:, 0],
            "images": logits[..., None, None],
        }[self.kind]


class Branching(nn.Module):
    """Looks at its numbers, which no stack of networks can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits if float(logits.sum()) > 0 else 2 * logits


class Places(nn.Module):
    """Holds integers that its own code needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(NUM_FEATURES).flip(0))
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, self.get_buffer("order")])


@pytest.mark.parametrize("is_training", [True, False])
def test_images_reach_a_convolution_in_their_own_shape(trained: TrainedGenerator, is_training: bool) -> None:
    x, y = examples()
    module = convolution().train(is_training)
    filled = trained.fill_with_report(module, instruction=ASK, data=(x, y))
    assert module.training == is_training
    assert filled.on_samples is not None
    # What is said of it is what the user finds.
    with torch.no_grad():
        logits = copy.deepcopy(module).eval()(x)
    assert filled.on_samples.loss == pytest.approx(float(balanced_cross_entropy(logits[None], y)), rel=1e-4)
    assert filled.on_samples.share_right == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_statistics_of_a_convolution_are_estimated_on_images(trained: TrainedGenerator) -> None:
    x, y = examples()
    module = convolution()
    trained.fill(module, instruction=ASK, data=(x, y), unlabelled=x)
    hidden, norm = module[0](x), module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, hidden.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mapping", "output", "tuple"])
def test_logits_are_found_in_what_a_module_gives(trained: TrainedGenerator, kind: str) -> None:
    x, y = examples()
    plain = trained.fill(Wrapped(), instruction=ASK, data=(x, y)).state_dict()
    filled = trained.fill(Wrapped(kind), instruction=ASK, data=(x, y)).state_dict()
    assert all(torch.equal(tensor, filled[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("make", [Branching, Places])
def test_modules_with_code_of_their_own_are_judged_by_what_they_do(trained: TrainedGenerator, make: Any) -> None:
    x, y = examples()
    module = make()
    filled = trained.fill_with_report(module, instruction=ASK, data=(x.flatten(1), y))
    assert filled.on_samples is not None
    with torch.no_grad():
        logits = module.eval()(x.flatten(1))
    assert filled.on_samples.loss == pytest.approx(float(balanced_cross_entropy(logits[None], y)), rel=1e-4)


def test_half_precision_is_judged_as_it_is_loaded(trained: TrainedGenerator) -> None:
    x, y = examples()
    module = Wrapped().to(torch.bfloat16)
    filled = trained.fill_with_report(module, instruction=ASK, data=(x.flatten(1), y))
    assert filled.on_samples is not None
    with torch.no_grad():
        logits = copy.deepcopy(module).float()(x.flatten(1))
    assert filled.on_samples.loss == pytest.approx(float(balanced_cross_entropy(logits[None], y)), rel=1e-3)


class Raises(Wrapped):
    def forward(self, x: Tensor) -> Any:
        raise KeyError("my own mistake")


def _misfits() -> dict[str, tuple[nn.Module, str]]:
    with torch.device("meta"):
        empty = nn.Linear(NUM_FEATURES, 2)
    return {
        "an input of another size": (nn.Linear(9, 2), r"Linear does not run on samples of shape \[1, 2, 3\]"),
        "too few outputs": (nn.Sequential(nn.Flatten(), nn.Linear(6, 1)), "has 1 outputs, the labels name 2 classes"),
        "an error of its own": (Raises(), r"Raises does not run on samples .*my own mistake"),
        "a mapping of other names": (Wrapped("other mapping"), "gives a dict; give a module that returns logits"),
        "text": (Wrapped("text"), "gives a str"),
        "a number for each": (Wrapped("a number each"), r"outputs of shape \[2\] for 2 samples"),
        "images": (Wrapped("images"), r"outputs of shape \[2, 2, 1, 1\] for 2 samples"),
        "no values": (empty, "meta device"),
    }


@pytest.mark.parametrize("kind", _misfits())
def test_what_does_not_fit_is_said_before_anything_is_written(trained: TrainedGenerator, kind: str) -> None:
    module, message = _misfits()[kind]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConditionError, match=message) as refused:
        trained.fill(module, instruction=ASK, data=examples())
    assert "\n" not in str(refused.value)
    if kind != "no values":
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_tokens_stay_integers_for_a_module_that_looks_them_up() -> None:
    module = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2))
    tokens = torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(0))
    runs, flat = runnable(module, [tokens], 2)
    assert flat.dtype == torch.float32
    torch.testing.assert_close(runs(flat), module(tokens))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("resnet", "str is no nn.Module"),
        (nn.Linear, "Linear is no nn.Module"),
        (nn.Sequential(nn.LazyLinear(2)), "lazy layers"),
        (torch.jit.script(network()), "TorchScript"),
    ],
    ids=["text", "class", "lazy", "scripted"],
)
def test_what_cannot_be_filled_is_said(trained: TrainedGenerator, module: Any, said: str) -> None:
    with pytest.raises(ConditionError, match=said):
        trained.fill(module, instruction="?", data=examples())
