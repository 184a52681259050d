"""What the benchmark of windows adds up, and that it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.benchmarks import igpg_windows
from raywgen.benchmarks.igpg_windows import MODES, IGPGWindowsConfig, check_equal, modes_of, qualities, window_of
from raywgen.benchmarks.run import run
from raywgen.benchmarks.unseen_tasks import UnseenTasks
from raywgen.generators import DataSpec
from raywgen.generators.igpg import IGPG, IGPGConfig, PriorConfig, SamplingConfig
from raywgen.weights import Normalizer
from raywgen.zoo import ZooConfig
from tests.benchmarks.test_unseen_tasks import unseen
from tests.builders import igpg_config

__all__ = ["unseen"]
pytestmark = pytest.mark.usefixtures("one_thread")


def windowed(unseen: UnseenTasks, window: int) -> IGPG:
    """An untrained generator of the tasks' networks."""
    config = igpg_config()
    config = replace(config, prior=replace(config.prior, window=window))
    normalizer = Normalizer.measure(unseen.layout, unseen.originals_TD, None)
    data = DataSpec(num_features=unseen.condition.samples_BSF.shape[2], max_classes=3)
    torch.manual_seed(0)
    generator = IGPG(config, {unseen.layout.id: (unseen.layout, normalizer)}, data).eval()
    generator.tokenizer.quantiser.codebooks_LVK.normal_()
    return generator


def test_both_priors_see_equally_many_chunks() -> None:
    config = IGPGWindowsConfig()
    (_, whole), (_, windows) = config.generators().values()
    assert (whole.prior.window, windows.prior.window) == (0, 16)
    assert whole.prior.batch_size * config.num_chunks == pytest.approx(windows.prior.batch_size * 16, rel=0.05)
    assert replace(whole.prior, window=16, batch_size=windows.prior.batch_size) == windows.prior


def test_windows_that_hold_all_chunks_pass_and_others_are_caught(
    unseen: UnseenTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = windowed(unseen, 0)
    check_equal(generator, unseen)
    assert generator.prior.config.window == 0
    short = {name: SamplingConfig(chunks="independent") for name in MODES}
    monkeypatch.setattr(igpg_windows, "MODES", short)
    with pytest.raises(AssertionError, match="is not the whole network"):
        check_equal(generator, unseen)


def test_every_mode_is_asked_for_as_its_name_says(unseen: UnseenTasks) -> None:
    priors = {"whole": windowed(unseen, 0), "windows": windowed(unseen, 2)}
    modes = {name: (generator, window) for name, generator, window, _ in modes_of(priors)}
    assert modes.keys() == {"whole", "beyond_window", *MODES}
    assert modes["whole"] == (priors["whole"], 0)
    assert modes["beyond_window"] == (priors["windows"], 0)
    assert all(modes[name] == (priors["windows"], 2) for name in MODES)
    with window_of(priors["windows"], 5):
        assert priors["windows"].prior.config.window == 5
    assert priors["windows"].prior.config.window == 2


def test_equal_priors_give_equal_figures(unseen: UnseenTasks) -> None:
    """Windows of all chunks in every mode but one: the same networks, and the same likelihood."""
    generator = windowed(unseen, 0)
    figures = qualities(IGPGWindowsConfig(best_of=2), unseen, {"whole": generator, "windows": generator}, 0)
    for name in ("beyond_window", "sequential_0.25", "sequential_0.5", "parallel"):
        assert figures[name] == figures["whole"]
        assert figures[f"tokens_{name}"] == figures["tokens_whole"]
        assert figures[f"nats_{name}"] == figures["nats_whole"]
        assert figures[f"over_whole_{name}"] == figures[f"tokens_over_whole_{name}"] == 0
    assert figures["nats_independent"] != figures["nats_whole"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 1}, "rounds=1"),
        ({"batches": [0]}, "batches"),
        ({"zoo": ZooConfig()}, "one architecture"),
        ({"zoo": ZooConfig(networks=[[64, 14, 2]], start="own")}, "shared start"),
        ({"igpg": IGPGConfig(prior=PriorConfig(window=59))}, "59 chunks"),
        ({"igpg": IGPGConfig(prior=PriorConfig(window=0))}, "window=0"),
    ],
)
def test_settings_that_measure_nothing_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IGPGWindowsConfig(**settings)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    zoo = ["num_seen_tasks=12", "num_validation_tasks=3", "num_unseen_tasks=4", "num_steps=60", "checkpoint_steps=[60]"]
    small = ["igpg.tokenizer.num_steps=2", "igpg.prior.num_steps=2", "rounds=2", "batches=[1,2]", f"out={tmp_path}"]
    result = run(["igpg-windows", *[f"zoo.{each}" for each in zoo], *small])
    figures = result["figures"]
    for name in ("whole", "beyond_window", *MODES):
        assert 0 <= figures[name] <= 100
        assert 0 < figures[f"nats_{name}"] < 8
        assert min(figures[f"ms_{name}_at_1"], figures[f"ms_{name}_at_2"]) > 0
    assert result["conditions"]["num_windows"] == {
        "sequential_0.25": 5, "sequential_0.5": 7, "parallel": 4, "independent": 59
    }  # fmt: skip
