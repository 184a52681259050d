from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators import OptimizerConfig, StageConfig
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.generators.lohp import LoHpConfig, LoHpSampling, PathConfig, PolicyConfig
from raywgen.generators.settings import Schedule
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training import DivergedError, TrainConfig, launch, read_metrics, snapshot_folder
from raywgen.training.checkpoints import CheckpointManager, Part, TrainState, manager
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import LocalEngine
from raywgen.training.run_spec import RunSpec
from raywgen.training.schedule import learning_rate
from raywgen.weights import KeyedNoise
from tests.builders import settings_of

_SETTINGS: dict[str, Any] = {"log_every": 1, "checkpoint_every": 4, "validate_every": 5, "num_workers": 0}


def small_config(corpus: Corpus, out: Path, **changes: Any) -> TrainConfig:
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=6, batch_size=8, quantiser=QuantiserConfig(num_levels=3, num_codes=16), width=16
        ),
        prior=PriorConfig(num_steps=6, batch_size=8, width=16, num_layers=1, num_heads=2, dropout=0.1),
        task_loss=IGPGTaskLossConfig(num_steps=6, batch_size=8),
    )
    return TrainConfig(generator=igpg, corpus=corpus.location, out=str(out), **(_SETTINGS | changes))


def lohp_config(corpus: Corpus, out: Path) -> TrainConfig:
    lohp = LoHpConfig(
        path=PathConfig(num_steps=4, length=2),
        sampling=LoHpSampling(num_steps=2),
        network=NetworkConfig(width=16, num_layers=1, num_heads=2),
        policy=PolicyConfig(num_steps=18, batch_size=8, replay_size=3),
    )
    settings = _SETTINGS | {"method": "lohp", "shot": 2}
    return TrainConfig(generator=lohp, corpus=corpus.location, out=str(out), **settings)


def averaged_config(corpus: Corpus, out: Path) -> TrainConfig:
    """A run whose settings of the optimiser are not the defaults."""
    config = small_config(corpus, out)
    own = OptimizerConfig(betas=(0.8, 0.95), schedule="linear", floor=0.2, ema_decay=0.7)
    settings = settings_of(config, IGPGConfig)
    for stage in (settings.tokenizer, settings.prior, settings.task_loss):
        stage.optimizer = own
    settings.task_loss.diversity_weight = 0.5
    config.accumulate = 2
    return config


def averaged_lohp_config(corpus: Corpus, out: Path) -> TrainConfig:
    config = lohp_config(corpus, out)
    settings_of(config, LoHpConfig).policy.optimizer = OptimizerConfig(ema_decay=0.7)
    config.accumulate = 2
    return config


def run_spec(config: TrainConfig, corpus: Corpus) -> RunSpec:
    return RunSpec(config=config, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))


def losses(out: str | Path) -> dict[tuple[str, int, str], float]:
    """Losses by stage, step and name: also those that hardly count in the whole while networks are at chance."""
    rows = read_metrics(out)
    assert len({(row["stage"], row["step"]) for row in rows}) == len(rows)
    names = ("loss", "diversity_loss")
    return {(row["stage"], row["step"], name): row[name] for row in rows for name in names if name in row}


def test_learning_rate_warms_up_and_decays_to_a_twentieth() -> None:
    config = StageConfig(num_steps=100, optimizer=OptimizerConfig(learning_rate=2.0, warmup_steps=10))
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 50) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5))
    assert learning_rate(config, 99) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 0.99))))


@pytest.mark.parametrize(
    ("schedule", "heights"),
    [
        ("cosine", [1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 0.99))]),
        ("linear", [1.0, 0.5, 0.01]),
        ("constant", [1.0] * 3),
    ],
)
def test_every_schedule_falls_from_the_peak_to_its_floor(schedule: Schedule, heights: list[float]) -> None:
    optimizer = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule=schedule, floor=0.1)
    config = StageConfig(num_steps=100, optimizer=optimizer)
    rates = [learning_rate(config, step) for step in (0, 50, 99)]
    assert rates == pytest.approx([2.0 * (0.1 + 0.9 * height) for height in heights])


def test_a_bundle_holds_the_averaged_parameters(zoo_corpus: Corpus, tmp_path: Path) -> None:
    """With a decay near 1 the bundle stays where it began, although training goes on as without."""
    weights = {}
    for decay in (0.0, 1 - 1e-12):
        config = small_config(zoo_corpus, tmp_path / str(decay))
        settings = settings_of(config, IGPGConfig)
        settings.prior.num_steps = settings.task_loss.num_steps = 0
        settings.tokenizer.optimizer.ema_decay = decay
        launch([config])
        weights[decay] = load_file(tmp_path / str(decay) / "generator" / "generator.safetensors")
        spec = run_spec(config, zoo_corpus)
        # The setup of the stage writes its outputs' layers.
        names = [name for name, _ in spec.build().get_submodule("tokenizer").named_parameters("model.tokenizer")]
        names = [name for name in names if ".out." not in name]
        start = {f"model.{name}": tensor for name, tensor in spec.build().state_dict().items()}
        moved = [name for name in names if not torch.equal(weights[decay][name], start[name])]
        assert bool(moved) == (decay == 0.0)
    rows = [read_metrics(tmp_path / str(decay)) for decay in weights]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["val_loss"] for row in rows[0] if "val_loss" in row] != [
        row["val_loss"] for row in rows[1] if "val_loss" in row
    ]


def test_more_parts_than_networks_are_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(zoo_corpus, tmp_path)
    config.accumulate = 9
    with pytest.raises(ConfigError, match=r"accumulate=9 is more than the 8 networks .* generator\.tokenizer\.batch"):
        launch([config])


class _InterruptedError(Exception):
    pass


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        (small_config, 1),
        (small_config, 4),
        (small_config, 7),
        (lohp_config, 4),
        (averaged_config, 4),
        (averaged_lohp_config, 4),
    ],
)
def test_an_interrupted_run_ends_bit_equal_to_an_undisturbed_one(
    of: Callable[[Corpus, Path], TrainConfig],
    kept: int,
    zoo_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch([of(zoo_corpus, tmp_path / "whole")])
    saved = 0
    save = CheckpointManager.save

    def save_then_stop(self: CheckpointManager, state: TrainState, tensors: Mapping[str, Part]) -> None:
        nonlocal saved
        save(self, state, tensors)
        saved += 1
        if saved == kept:
            raise _InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", save_then_stop)
        with pytest.raises(_InterruptedError):
            launch([of(zoo_corpus, tmp_path / "broken")])
    assert not (tmp_path / "broken" / "generator").exists()
    launch([of(zoo_corpus, tmp_path / "broken")])
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "generator" / "generator.safetensors")
    resumed = load_file(tmp_path / "broken" / "generator" / "generator.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_every_stage_is_logged_validated_and_kept(zoo_corpus: Corpus, tmp_path: Path) -> None:
    launch([small_config(zoo_corpus, tmp_path, validate_every=3)])
    rows = read_metrics(tmp_path)
    assert [row["stage"] for row in rows if row["step"] == 0] == ["tokenizer", "prior", "task_loss"]
    assert all("val_loss" in row for row in rows if row["step"] in (0, 3, 5))
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {"tokenizer", "prior", "task_loss"}
    prior = load_file(tmp_path / "stages" / "prior" / "generator.safetensors")
    final = load_file(tmp_path / "generator" / "generator.safetensors")
    changed = {name.split(".")[1] for name, tensor in prior.items() if not torch.equal(tensor, final[name])}
    assert changed == {"prior", "residual_head"}


def test_divergence_names_the_setting_to_lower(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(zoo_corpus, tmp_path)
    settings_of(config, IGPGConfig).tokenizer.optimizer.learning_rate = 1e30
    with pytest.raises(DivergedError, match=r"generator\.tokenizer\.optimizer\.learning_rate"):
        launch([config])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_training_at_once(
    value: float, zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LocalEngine.train_step

    def broken_step(self: LocalEngine, *arguments: Any) -> dict[str, torch.Tensor]:
        scalars = step(self, *arguments)
        return scalars | {"loss": torch.full_like(scalars["loss"], value)}

    monkeypatch.setattr(LocalEngine, "train_step", broken_step)
    with pytest.raises(DivergedError, match=r"the loss of stage 'tokenizer' is (-?inf|nan) at step 0"):
        launch([small_config(zoo_corpus, tmp_path)])


def test_validation_draws_noise_of_its_own(zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[tuple[float, ...]] = set()
    validated: set[tuple[float, ...]] = set()
    train_step, evaluate_parts = LocalEngine.train_step, LocalEngine.evaluate_parts

    def rows_of(noise: KeyedNoise) -> set[tuple[float, ...]]:
        return set(map(tuple, copy(noise).uniform(3).tolist()))

    def noted_step(self: LocalEngine, batch: Any, noise: KeyedNoise, *rest: Any) -> Any:
        trained.update(rows_of(noise))
        return train_step(self, batch, noise, *rest)

    def noted_parts(self: LocalEngine, parts: Any, total: int) -> Any:
        found = list(parts)
        for _, noise, _ in found:
            validated.update(rows_of(noise))
        return evaluate_parts(self, found, total)

    monkeypatch.setattr(LocalEngine, "train_step", noted_step)
    monkeypatch.setattr(LocalEngine, "evaluate_parts", noted_parts)
    launch([small_config(zoo_corpus, tmp_path)])
    assert len(trained) == 3 * 6 * 8
    assert validated
    assert validated.isdisjoint(trained)


@pytest.mark.parametrize("of", [small_config, lohp_config, averaged_config])
def test_a_run_that_pauses_ends_bit_equal_to_one_that_does_not(
    of: Callable[[Corpus, Path], TrainConfig], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    """Also where it goes on in another folder, from the first one's pause."""
    launch([of(zoo_corpus, tmp_path / "whole")])
    paused = of(zoo_corpus, tmp_path / "paused")
    for until in (0.25, 0.5, 0.5):
        launch([paused], stop_at=until)
        folder = snapshot_folder(paused.out, until)
        assert Path(folder, "generator.json").is_file()
        assert not (tmp_path / "paused" / "generator").exists()
    other = of(zoo_corpus, tmp_path / "other")
    launch([other], init_from=snapshot_folder(paused.out, 0.25))
    launch([paused])
    whole = load_file(tmp_path / "whole" / "generator" / "generator.safetensors")
    for out in (paused.out, other.out):
        found = load_file(Path(out) / "generator" / "generator.safetensors")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert losses(tmp_path / "paused") == losses(tmp_path / "whole")


def test_every_run_of_a_launch_stops_at_its_share(zoo_corpus: Corpus, tmp_path: Path) -> None:
    configs = [small_config(zoo_corpus, tmp_path / name) for name in ("a", "b")]
    launch(configs, stop_at=0.5)
    for config in configs:
        assert {row["step"] for row in read_metrics(config.out) if row["stage"] == "task_loss"} == {0, 1, 2}
        assert Path(snapshot_folder(config.out, 0.5), "generator.json").is_file()


@pytest.mark.parametrize(("checkpoint_every", "most"), [(1, 1), (2, 2), (5, 4)])
def test_no_step_is_further_from_a_durable_checkpoint_than_the_interval(
    checkpoint_every: int, most: int, zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint takes much longer to write than the steps in between."""
    config = small_config(zoo_corpus, tmp_path, checkpoint_every=checkpoint_every)
    igpg = settings_of(config, IGPGConfig)
    igpg.tokenizer.num_steps, igpg.prior.num_steps, igpg.task_loss.num_steps = 9, 1, 0
    write_index, train_step = manager.write_index, LocalEngine.train_step
    behind, num_taken = [], 0

    def slowly(*args: Any) -> None:
        time.sleep(0.1)
        write_index(*args)

    def counted(self: LocalEngine, *args: Any) -> Any:
        nonlocal num_taken
        result, num_taken = train_step(self, *args), num_taken + 1
        stage, step = CheckpointManager(tmp_path).position() or (0, 0)
        if stage == 0:
            behind.append(num_taken - step)
        return result

    monkeypatch.setattr(manager, "write_index", slowly)
    monkeypatch.setattr(LocalEngine, "train_step", counted)
    launch([config])
    assert max(behind) == most
