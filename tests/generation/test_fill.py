from __future__ import annotations

import copy
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import raywgen
from raywgen.generation import ChanceWarning, ConditionError, TrainedGenerator, UnknownLayoutWarning
from raywgen.generation.conditions import make_condition
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import BundleError, save_bundle
from raywgen.nn.batch_norm import reestimate_statistics
from raywgen.tasks import balanced_cross_entropy
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.standing import Standing, standing
from raywgen.weights import KeyedNoise, Layout
from tests.builders import DEEP, NUM_FEATURES, SMALL, condition, igpg, network

ASK = "Is feature 0 above zero?"


@pytest.fixture(scope="module")
def trained() -> TrainedGenerator:
    return TrainedGenerator(igpg())


def examples(num: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = condition(1, num_samples=num)
    return drawn.samples_BSF[0], drawn.labels_BS[0]


@pytest.mark.parametrize("widths", [SMALL, DEEP])
def test_two_lines_fill_every_architecture(tmp_path: Path, widths: tuple[int, ...]) -> None:
    save_bundle(igpg(), tmp_path / "generator", {})
    module = network(widths)
    before = copy.deepcopy(module.state_dict())
    filled = raywgen.load(tmp_path).fill(module, instruction=ASK, data=examples())
    assert filled is module
    assert all(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module(examples()[0]).isfinite().all()


def test_a_bundle_itself_can_be_loaded(tmp_path: Path) -> None:
    save_bundle(igpg(), tmp_path, {})
    first = raywgen.load(tmp_path).fill(network(), instruction=ASK, data=examples(), seed=3)
    second = TrainedGenerator(igpg()).fill(network(), instruction=ASK, data=examples(), seed=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="raywgen train"):
        raywgen.load(tmp_path / "none")


def test_temperature_zero_writes_the_same_network_whatever_the_seed(trained: TrainedGenerator) -> None:
    written = [
        trained.fill(network(), instruction=ASK, data=examples(), temperature=0.0, seed=seed).state_dict()
        for seed in (0, 1)
    ]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_images_may_keep_their_shape(trained: TrainedGenerator) -> None:
    samples, labels = examples()
    flat = trained.fill(network(), instruction=ASK, data=(samples, labels))
    shaped = trained.fill(network(), instruction=ASK, data=(samples.view(-1, 2, 3), labels))
    assert all(torch.equal(tensor, shaped.state_dict()[name]) for name, tensor in flat.state_dict().items())


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def test_statistics_are_estimated_anew_before_the_choice(trained: TrainedGenerator) -> None:
    unlabelled = torch.randn(50, NUM_FEATURES, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UnknownLayoutWarning):
        kept = trained.fill(normalised(), instruction=ASK, data=examples(), best_of=6, unlabelled=unlabelled)
    # The same candidates, one by one.
    layout = Layout.from_state_dict(normalised().state_dict())
    normalizer = trained.estimate_normalizer(layout, normalised())
    repeated = make_condition(trained.generator, ASK, examples()).repeat(6)
    noise = KeyedNoise(0, torch.arange(6), 0)
    written = trained.generator.generate(
        GenerationRequest(condition=repeated, layout=layout, noise=noise, temperature=0.5, normalizer=normalizer)
    )
    losses, states = [], []
    for values_D in written.values_BD:
        module = normalised().eval()
        module.load_state_dict(layout.unflatten(values_D, counters=module.state_dict()))
        module.load_state_dict({**module.state_dict(), **reestimate_statistics(module, unlabelled)})
        states.append(module.state_dict())
        losses.append(float(balanced_cross_entropy(module(examples()[0])[None].detach(), examples()[1])))
    best = states[losses.index(min(losses))]
    torch.testing.assert_close(kept.state_dict(), best)


def test_batch_norm_counters_and_statistics_survive_a_strict_load(trained: TrainedGenerator) -> None:
    linear = network()
    module = nn.Sequential(linear[0], nn.BatchNorm1d(4), nn.ReLU(), linear[2])  # pyright: ignore[reportIndexIssue]
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(7)
    with pytest.warns(UnknownLayoutWarning):
        trained.fill(module, instruction=ASK, data=examples())
    assert int(norm.num_batches_tracked) == 7
    assert norm.num_batches_tracked.dtype == torch.int64


def test_a_layout_never_seen_is_filled_with_a_warning(trained: TrainedGenerator) -> None:
    module = network((NUM_FEATURES, 5, 2))
    with pytest.warns(UnknownLayoutWarning, match="never trained on a layout .* judge the result"):
        trained.fill(module, instruction=ASK, data=examples())
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


@pytest.mark.parametrize("widths", [SMALL, (NUM_FEATURES, 5, 2)])
def test_a_report_says_what_the_network_does_as_the_best_of_so_many(
    trained: TrainedGenerator, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []

    def noted(
        logits_SC: torch.Tensor, labels_S: torch.Tensor, best_of: int = 1, linear: float | None = None
    ) -> Standing:
        budgets.append(best_of)
        return standing(logits_SC, labels_S, best_of, linear)

    monkeypatch.setattr("raywgen.generation.fill.standing", noted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filled = trained.fill_with_report(network(widths), instruction=ASK, data=examples(), best_of=5)
    x, labels = examples()
    found = standing(filled.module(x).detach(), labels, 5, left_out_accuracy(x, labels))
    assert filled.on_samples is not None
    assert asdict(filled.on_samples) == pytest.approx(asdict(found), rel=1e-5)
    assert budgets == [5]
    assert filled.best_of == 5
    assert filled.is_known == (widths == SMALL)


def test_a_known_layout_warns_of_nothing(trained: TrainedGenerator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ChanceWarning)  # The generator is untrained.
        trained.fill(network(), instruction=ASK, data=examples())


def _bad_inputs() -> list[tuple[str, object, object, str]]:
    x, y = examples()
    nan = x.clone()
    nan[2, 1] = torch.nan
    return [
        ("  ", x, y, "instruction is empty"),
        (ASK, x[:5], y, "5 samples and 16 labels"),
        (ASK, x[:0], y[:0], "one label per sample"),
        (ASK, x[:, :4], y, "a sample has 4 values, the generator was trained on 6"),
        (ASK, nan, y, "NaN or infinity"),
        (ASK, x, y + 1, "between 0 and 1"),
        (ASK, x, y - 1, "label -1 is below 0"),
        (ASK, x, y.unsqueeze(1), r"labels of shape \[S\]"),
        (ASK, torch.tensor(1.0), y, r"samples of shape \[S, ...\]"),
    ]


@pytest.mark.parametrize(("instruction", "samples", "labels", "message"), _bad_inputs())
def test_bad_conditions_are_refused_and_the_module_is_left_alone(
    trained: TrainedGenerator, instruction: str, samples: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConditionError, match=message):
        trained.fill(module, instruction=instruction, data=(samples, labels))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
