"""Networks written unit by unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators import DataSpec, GenerationRequest
from raywgen.generators.units import Units, UnitsConfig
from raywgen.generators.units import writer as writer_module
from raywgen.generators.units.codes import NUM_CODE, unit_codes
from raywgen.tasks import balanced_accuracy, build_network, stacked_logits
from raywgen.weights import Condition, Layout
from tests.builders import (
    DEEP,
    SMALL,
    condition,
    layout_of,
    network,
    noise_for,
    train,
    units,
    weight_batch,
)

WIDTHS = [SMALL, DEEP, (6, 9, 2), (6, 33, 17, 5, 2)]


def written(generator: Units, layout: Layout, given: Condition, temperature: float = 0.0, seed: int = 0) -> Tensor:
    noise = noise_for(len(given), seed)
    return generator.generate(
        GenerationRequest(condition=given, layout=layout, noise=noise, temperature=temperature)
    ).values_BD


@pytest.mark.parametrize("widths", WIDTHS)
def test_noise_counts_at_a_temperature_alone(widths: tuple[int, ...]) -> None:
    generator, layout, given = units(), layout_of(widths), condition(3)
    cold = written(generator, layout, given)
    assert cold.shape == (3, layout.num_values)
    assert torch.equal(cold, written(generator, layout, given, seed=1))
    warm = [written(generator, layout, given, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(warm[0], warm[1])
    assert not torch.allclose(warm[0], warm[2])
    assert not torch.allclose(warm[0], cold)


def test_units_in_another_order_are_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, its bias and the column that reads it come from one vector, so they move together."""
    generator, layout, given = units(), layout_of((6, 9, 5, 2)), condition(2)
    before = written(generator, layout, given)

    def reversed_codes(num_units: int) -> Tensor:
        codes = unit_codes(num_units)
        return codes.flip(0) if num_units in (9, 5) else codes

    monkeypatch.setattr(writer_module, "unit_codes", reversed_codes)
    after = written(generator, layout, given)
    assert not torch.allclose(before, after)
    one, other = layout.unflatten(before), layout.unflatten(after)
    assert torch.allclose(one["0.weight"].flip(1), other["0.weight"], atol=1e-6)
    assert torch.allclose(one["2.weight"].flip(1, 2), other["2.weight"], atol=1e-6)
    module = network((6, 9, 5, 2))
    x_SF = condition(1, seed=5).samples_BSF[0]
    logits, others = (stacked_logits(module, layout.unflatten(values), x_SF) for values in (before, after))
    assert torch.allclose(logits, others, atol=1e-5)


def images(num: int, seed: int = 0) -> Condition:
    """Labelled pictures that are never negative, as real ones are: the mean is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    samples_BSF = 0.5 + torch.rand(num, 32, 64, generator=generator)
    labels_BS = (samples_BSF[..., :32].sum(-1) > samples_BSF[..., 32:].sum(-1)).long()
    return Condition(instructions=("which half?",) * num, samples_BSF=samples_BSF, labels_BS=labels_BS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "recipe", [{"name": "mlp", "widths": [64, 256, 2]}, {"name": "cnn", "channels": [256], "num_classes": 2}]
)
def test_new_units_answer_to_inputs_that_are_never_negative(recipe: dict[str, Any], bias: bool) -> None:
    """Each is on for some samples and off for others, and of about unit size, whatever the inputs' mean."""
    generator, given = units(data=DataSpec(num_features=64, max_classes=2)), images(4)
    module = build_network({**recipe, "bias": bias})
    layout = Layout.from_state_dict(module.state_dict())
    state = layout.unflatten(written(generator, layout, given))
    first = next(iter(state))
    if recipe["name"] == "mlp":
        before = torch.einsum("bhf,bsf->bsh", state[first], given.samples_BSF)
        before = before + (state["0.bias"].unsqueeze(1) if bias else 0.0)
    else:
        pictures = given.samples_BSF.view(4, 32, 1, 8, 8)
        shift = state.get("features.0.bias", torch.zeros(4, 256))
        pairs = zip(pictures, state[first], shift, strict=True)
        # Without padding, whose zeros are far from the mean.
        before = torch.stack(
            [nn.functional.conv2d(x, weight, own).movedim(1, -1).flatten(1, 2) for x, weight, own in pairs]
        )
        before = before.flatten(1, 2) if before.dim() == 4 else before
    share_on = (before > 0).float().mean(dim=1)
    assert float(((share_on > 0.05) & (share_on < 0.95)).float().mean()) > 0.8
    assert 0.3 < float(before.std()) < 3.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "recipe", [{"name": "mlp", "widths": [64, 40, 2]}, {"name": "cnn", "channels": [8, 8], "num_classes": 2}]
)
def test_outputs_are_fitted_to_the_samples_before_any_training(recipe: dict[str, Any], bias: bool) -> None:
    data, given = DataSpec(num_features=64, max_classes=2), images(4)
    module = build_network({**recipe, "bias": bias})
    layout = Layout.from_state_dict(module.state_dict())
    accuracies = []
    for num_references in (16, 0):
        values_BD = written(units(data=data, num_references=num_references), layout, given)
        logits_BSC = stacked_logits(module, layout.unflatten(values_BD), given.samples_BSF)
        accuracies.append(float(balanced_accuracy(logits_BSC, given.labels_BS).mean()))
    fitted, unfitted = accuracies
    assert fitted > 0.9
    assert fitted > unfitted + 0.1


def test_its_stage_lowers_the_loss_on_widths_in_turn() -> None:
    generator = units()
    (stage,) = generator.stages()
    losses = train(stage, [weight_batch(WIDTHS[step % 3], 16, seed=step) for step in range(120)])
    assert sum(losses[-9:]) < 0.9 * sum(losses[:9])
    assert units(num_steps=0).stages() == []


def test_every_parameter_has_a_gradient_whatever_the_layout() -> None:
    """ZeRO waits for ever for one that has none."""
    generator = units(data=DataSpec(num_features=64, max_classes=2))
    recipes = [
        {"name": "mlp", "widths": [64, 5, 2]},
        {"name": "cnn", "channels": [3], "num_classes": 2},
        {"name": "mlp", "widths": [7, 3]},
    ]
    for recipe in recipes:
        layout = Layout.from_state_dict(build_network(recipe).state_dict())
        generator.zero_grad()
        given = images(2)
        task_BH = generator.tasks(given)
        values_BD = generator.values(given, task_BH, layout, noise_for(2), 0.3)
        # The stage trains the predictor with each batch.
        assert generator.references is not None
        predicted_BSC = generator.references.predictor(given.samples_BSF, task_BH)
        (values_BD.square().sum() + predicted_BSC.square().sum()).backward()
        assert [name for name, value in generator.named_parameters() if value.grad is None] == []


def test_codes_of_units_differ_in_any_number_of_them() -> None:
    for num in (1, 2, 13, 512):
        codes = unit_codes(num)
        assert codes.shape == (num, NUM_CODE)
        assert len(torch.unique(codes, dim=0)) == num
    # A unit of a third as wide an axis lies where the middle one of three does.
    assert torch.allclose(unit_codes(5), unit_codes(15)[1::3], atol=1e-5)


@pytest.mark.parametrize("settings", [{"width": 0}, {"num_layers": 0}, {"code_noise": -0.1}])
def test_sizes_that_make_no_generator_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        UnitsConfig(**settings)
