from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.tasks import TaskError, balanced_accuracy, build_network, build_task, stacked_logits
from raywgen.tasks.fitted_head import SHARPNESS, fits_head, fitted_logits, with_fitted_heads
from raywgen.tasks.networks import LoRANetwork
from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.weights import Layout
from tests.text_encoders import SIGNS, make_encoder, make_sentences


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def samples(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Samples of four classes, three sets of twelve, and their classes."""
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path))
    recipe = {"name": "sentence-groups", "path": make_sentences(tmp_path / "signs.parquet"), "base": base}
    groups = [[number] for number in range(len(SIGNS))]
    task = build_task(recipe | {"groups": groups, "first_layer": 1, "max_tokens": 8, "class_names": SIGNS})
    return task.train_x_SF[:36].unflatten(0, (3, 12)), task.train_y_S[:36].view(3, 12)


def network(base: str, **changes: object) -> LoRANetwork:
    upper = {"name": "upper-layers", "path": base, "first_layer": 1, "num_classes": len(SIGNS), "head": "fitted"}
    recipe = {"name": "lora", "base": upper | changes, "rank": 2, "targets": ["query"], "train_head": ["classifier"]}
    torch.manual_seed(0)
    found = build_network(recipe).eval()
    assert isinstance(found, LoRANetwork)
    return found


def three(module: LoRANetwork) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(3, *tensor.shape) for name, tensor in module.state_dict().items()}


def test_written_heads_are_ridge_regression_on_the_networks_own_features(
    base: str, samples: tuple[Tensor, Tensor]
) -> None:
    module, (x_NSF, labels_NS) = network(base), samples
    layout, state_N = Layout.from_state_dict(module.state_dict()), three(module)
    values_ND = torch.stack([layout.flatten({name: one[n] for name, one in state_N.items()}) for n in range(3)])
    written_ND, left_out_NSC = with_fitted_heads(module, layout, values_ND, x_NSF, labels_NS)
    upper = {"name": "upper-layers", "path": base, "first_layer": 1, "num_classes": 0}
    features = build_network({"name": "lora", "base": upper, "rank": 2, "targets": ["query"]}).eval()
    features_NSE = stacked_logits(features, _factors(state_N), x_NSF)
    head = fit_ridge_head(features_NSE, labels_NS, len(SIGNS))
    written_N = layout.unflatten(written_ND)
    assert all(torch.equal(written_N[name], one) for name, one in state_N.items() if "classifier" not in name)
    found_NSC = stacked_logits(module, written_N, x_NSF)
    assert torch.allclose(found_NSC, SHARPNESS * head(features_NSE), atol=1e-3)
    assert torch.allclose(left_out_NSC, SHARPNESS * head.left_out_BSC, atol=1e-3)
    assert torch.allclose(fitted_logits(module, state_N, x_NSF, labels_NS, x_NSF), found_NSC, atol=1e-3)
    assert balanced_accuracy(found_NSC, labels_NS).min() > 0.9, "classes that a word tells apart"


def _factors(state_N: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_N.items() if "classifier" not in name}


def test_gradients_pass_through_the_head_to_all_but_the_head(base: str, samples: tuple[Tensor, Tensor]) -> None:
    module, (x_NSF, labels_NS) = network(base), samples
    state_N = {name: tensor.requires_grad_() for name, tensor in three(module).items()}
    loss = fitted_logits(module, state_N, x_NSF[:, :8], labels_NS[:, :8], x_NSF[:, 8:]).square().sum()
    gradients = torch.autograd.grad(loss, list(state_N.values()), allow_unused=True)
    for name, gradient in zip(state_N, gradients, strict=True):
        assert (gradient is None) if "classifier" in name else (gradient is not None and gradient.abs().sum() > 0)


def test_only_networks_that_say_so_have_fitted_heads(base: str) -> None:
    assert fits_head(network(base))
    assert not fits_head(network(base, head="trained"))
    assert not fits_head(build_network({"name": "mlp", "widths": [4, 2]}))
    with pytest.raises(TaskError, match="head=best: give trained or fitted"):
        network(base, head="best")
    upper = {"name": "upper-layers", "path": base, "first_layer": 1, "head": "fitted"}
    with pytest.raises(TaskError, match=r"train_head: the head is fitted, and 'classifier\.bias' is not found"):
        build_network({"name": "lora", "base": upper, "rank": 2, "targets": ["query"]})
