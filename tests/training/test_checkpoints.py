"""A damaged checkpoint is passed over and said so; a run goes on from whatever checkpoint is there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.checkpoints import (
    PROGRESS,
    STATE,
    CheckpointError,
    CheckpointManager,
    CheckpointWarning,
    TrainState,
)
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.resume import resumed_state
from raywgen.training.rows import data_digest
from raywgen.training.run_folder import warn
from raywgen.training.run_spec import RunSpec
from raywgen.training.step_meter import anonymous_bytes
from tests.builders import settings_of
from tests.conftest import TINY_ZOO, make_zoo
from tests.training.test_resume import losses, small_config


def taken(state: TrainState) -> None:
    """Any checkpoint will do."""


class _InterruptedError(Exception):
    pass


def test_progress_round_trip(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3), "optimizer.step": torch.tensor(4.0)}
    state = TrainState(stage=2, step=3, corpus="abc", tensors=tensors)
    CheckpointManager(tmp_path / "kept").save(state)
    again, passed_over = CheckpointManager(tmp_path / "kept").newest(taken)
    assert again is not None
    assert (again.stage, again.step, again.corpus, passed_over) == (2, 3, "abc", [])
    assert torch.equal(again.part("model.")["a"], tensors["model.a"])
    assert set(again.part("optimizer.")) == {"step"}
    assert CheckpointManager(tmp_path / "kept").position() == (2, 3)
    assert CheckpointManager(tmp_path / "none").newest(taken) == (None, [])


def test_a_checkpoint_is_read_without_a_copy_of_its_tensors(tmp_path: Path) -> None:
    num = 1 << 20
    TrainState(tensors={f"model.{name}": torch.ones(num) for name in range(32)}).save(tmp_path)
    before = anonymous_bytes()
    state = TrainState.load(tmp_path)
    after = anonymous_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 32 * 4 * num / 4
    assert all(bool((tensor == 1).all()) for tensor in state.tensors.values())


@pytest.mark.parametrize("number", range(6))
def test_a_save_killed_anywhere_leaves_it_or_the_one_before(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its n-th act on the disk, where a removal has removed all but one file."""
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(TrainState(step=1, tensors={"model.a": torch.ones(1)}))
    acts = 0

    def killed() -> bool:
        nonlocal acts
        acts += 1
        return acts > number

    def remove(folder: Path, ignore_errors: bool = False) -> None:
        if killed():
            for path in sorted(Path(folder).glob("*"))[1:]:
                path.unlink()
            raise _InterruptedError
        rmtree(folder, ignore_errors=ignore_errors)

    def rename(self: Path, target: Path) -> None:
        if killed():
            raise _InterruptedError
        rename_path(self, target)

    rmtree, rename_path, kept = shutil.rmtree, Path.rename, 1
    for step in (2, 3, 3, 4):
        acts = 0
        with monkeypatch.context() as patch, suppress(_InterruptedError):
            patch.setattr(shutil, "rmtree", remove)
            patch.setattr(Path, "rename", rename)
            checkpoints.save(TrainState(step=step, tensors={"model.a": torch.full((1,), step)}))
        again, _ = checkpoints.newest(taken)
        assert again is not None
        assert again.step == step or (number < 3 and again.step <= kept)
        assert float(again.tensors["model.a"]) == again.step
        kept = again.step


def damage(path: Path, change: Callable[[bytearray], bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(content: bytearray) -> bytearray:
    content[-3] ^= 1
    return content


def change_step(content: bytearray) -> bytearray:
    record = json.loads(content)
    return bytearray(json.dumps(record | {"step": record["step"] + 1}).encode())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A checkpoint with right digests whose content does not fit."""
    found = TrainState.load(folder)
    tensors = dict(found.tensors)
    change(tensors)
    TrainState(stage=found.stage, step=found.step, corpus=found.corpus, tensors=tensors).save(folder)


def spoil_values(folder: Path) -> None:
    tensors = load_file(folder / STATE)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / STATE)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.startswith("model.") and tensors[name].is_floating_point())
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("|exp_avg"))
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def leave_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.startswith("model."))]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda folder: damage(folder / STATE, flip), f"{STATE} is damaged"),
    "truncated state": (lambda folder: damage(folder / STATE, lambda content: content[:99]), f"{STATE} is damaged"),
    "no state": (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
    "no progress": (lambda folder: (folder / PROGRESS).unlink(), f"{PROGRESS} is missing"),
    "truncated progress": (lambda folder: damage(folder / PROGRESS, lambda content: content[:9]), "is damaged"),
    "empty progress": (lambda folder: (folder / PROGRESS).write_text(""), f"{PROGRESS} is damaged"),
    "a list": (lambda folder: (folder / PROGRESS).write_text("[1]"), f"{PROGRESS} is damaged"),
    "no UTF-8": (lambda folder: (folder / PROGRESS).write_bytes(b"\xff{}"), f"{PROGRESS} is damaged"),
    "other keys": (lambda folder: (folder / PROGRESS).write_text('{"a": 1, "sha256": ""}'), "is damaged"),
    "a folder": (lambda folder: ((folder / PROGRESS).unlink(), (folder / PROGRESS).mkdir()), "is damaged"),
    "changed step": (lambda folder: damage(folder / PROGRESS, change_step), "belongs to another"),
    "values changed": (spoil_values, f"{STATE} is damaged"),
    "NaN": (lambda folder: rewrite(folder, nan), "holds NaN in 'model."),
    "wrong shape": (lambda folder: rewrite(folder, reshape), "has the shape"),
    "missing tensor": (lambda folder: rewrite(folder, leave_out), "is in the checkpoint or in the generator alone"),
}


@pytest.fixture(scope="module")
def interrupted(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run, and one that ended after step 4 of its second stage."""
    root = tmp_path_factory.mktemp("runs")
    launch([small_config(zoo_corpus, root / "whole")])
    save = CheckpointManager.save

    def save_then_stop(self: CheckpointManager, state: TrainState) -> None:
        save(self, state)
        if (state.stage, state.step) == (1, 4):
            raise _InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointManager, "save", save_then_stop)
        with pytest.raises(_InterruptedError):
            launch([small_config(zoo_corpus, root / "broken")])
    assert [path.name for path in sorted((root / "broken" / "checkpoints").iterdir())] == [
        "01-000000002",
        "01-000000004",
    ]
    return root / "whole", root / "broken"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str, interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted[1], out)
    hurt, reason = DAMAGES[kind]
    newest = out / "checkpoints" / "01-000000004"
    hurt(newest)
    with pytest.warns(CheckpointWarning) as warned:
        state = restored(out, zoo_corpus)
    assert (state.stage, state.step) == (1, 2)
    (sentence,) = (str(one.message) for one in warned)
    assert sentence.startswith(f"checkpoint {newest} is passed over: ")
    assert reason in sentence
    assert sentence.endswith("; training goes on from step 2 of stage 'prior'")
    assert "\n" not in sentence


def restored(out: Path, corpus: Corpus) -> TrainState:
    spec = run_spec(small_config(corpus, out), corpus)
    return resumed_state(spec, spec.build(), data_digest(corpus), warn)


def run_spec(config: TrainConfig, corpus: Corpus) -> RunSpec:
    return RunSpec(config=config, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))


def test_a_checkpoint_of_another_generator_is_passed_over(
    interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    shutil.copytree(interrupted[1] / "checkpoints", tmp_path / "checkpoints")
    config = small_config(zoo_corpus, tmp_path)
    settings_of(config, IGPGConfig).prior.width = 32
    spec = run_spec(config, zoo_corpus)
    sentences: list[str] = []
    state = resumed_state(spec, spec.build(), data_digest(zoo_corpus), sentences.append)
    assert (state.stage, state.step, state.tensors) == (0, 0, {})
    assert len(sentences) == 2
    assert all("has the shape" in sentence and "goes on from its beginning" in sentence for sentence in sentences)


@pytest.mark.parametrize("num_damaged", [0, 1, 2])
def test_a_moved_and_damaged_run_ends_bit_equal_to_an_undisturbed_one(
    num_damaged: int,
    interrupted: tuple[Path, Path],
    zoo_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under another name, by a relative path."""
    whole, broken = interrupted
    out = tmp_path / "moved" / "run"
    shutil.copytree(broken, out)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    for name in names[2 - num_damaged :]:
        damage(out / "checkpoints" / name / STATE, flip)
    before = (out / "metrics.jsonl").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    config = small_config(zoo_corpus, Path("moved/run"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        launch([config])
    assert len([one for one in warned if one.category is CheckpointWarning]) == num_damaged
    assert losses(out) == losses(whole)
    found, wanted = (load_file(run / "generator" / "generator.safetensors") for run in (out, whole))
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    # Rows of before are kept as they were, down to their times.
    kept = {0: 10, 1: 8, 2: 0}[num_damaged]
    assert (out / "metrics.jsonl").read_text().splitlines()[:kept] == before[:kept]


def test_a_run_does_not_go_on_with_another_content_of_its_corpus(
    interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted[1], out)
    other = make_zoo(dataclasses.replace(TINY_ZOO, num_steps=101, checkpoint_steps=[100, 101]), tmp_path / "corpus")
    kept = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(kept.replace(zoo_corpus.location, other.location))
    with pytest.raises(ConfigError, match=r"begun with other checkpoints than .*corpus holds now"):
        launch([small_config(other, out)])


def test_another_run_in_the_folder_is_named_by_its_keys(
    interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    shutil.copytree(interrupted[1], tmp_path / "run")
    config = small_config(zoo_corpus, tmp_path / "run", seed=3)
    settings_of(config, IGPGConfig).prior.width = 32
    with pytest.raises(
        ConfigError, match=r"generator\.prior\.width is 16 there and 32 here; seed is 0 there and 3 here; give another"
    ):
        launch([config])


@pytest.mark.parametrize("content", ["method: [", "\0", "num_workers: many"])
def test_a_damaged_config_of_a_run_is_named_with_the_remedy(
    content: str, interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    shutil.copytree(interrupted[1], tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path}.*delete it and train with the settings of before"):
        launch([small_config(zoo_corpus, tmp_path / "run")])


def test_a_damaged_snapshot_is_named_with_the_remedy(zoo_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"snapshot/progress.json is missing; train the run that stopped in .* again"
    ):
        launch([small_config(zoo_corpus, tmp_path / "run")], init_from=str(tmp_path / "snapshot"))


@pytest.mark.parametrize("name", ["generator.json", "generator.safetensors"])
def test_a_run_whose_generator_is_damaged_is_not_done(
    interrupted: tuple[Path, Path], zoo_corpus: Corpus, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted[0], out)
    damage(out / "generator" / name, lambda content: content[:-9])
    with pytest.warns(CheckpointWarning, match=rf"{name} is damaged.*newest checkpoint.*written again"):
        launch([small_config(zoo_corpus, out)])
    assert (out / "generator" / name).read_bytes() == (interrupted[0] / "generator" / name).read_bytes()
    assert losses(out) == losses(interrupted[0])


def test_rows_of_a_log_that_are_none_are_skipped(tmp_path: Path) -> None:
    row = {"stage": "prior", "step": 1, "time": 0.5, "loss": 1.0}
    lines = [b"5", b"[]", b'{"step": 1}', b"\xff\xfe", b'{"stage": "prior", "step": "x", "time": 1}', b'{"stage": "pr']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:3], json.dumps(row).encode(), *lines[3:]]))
    assert read_metrics(tmp_path) == [row]
