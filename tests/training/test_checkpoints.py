"""A damaged checkpoint is passed over and said so; a run goes on from whatever checkpoint is there."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPGConfig
from raywgen.sealed import sealed_json, unseal
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.checkpoints import (
    INDEX,
    Checkpoint,
    CheckpointError,
    CheckpointManager,
    CheckpointWarning,
    Part,
    Retention,
    SaveError,
    TrainState,
)
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.resume import resumed_checkpoint
from raywgen.training.rows import data_digest
from raywgen.training.run_folder import warn
from raywgen.training.run_spec import RunSpec
from raywgen.training.step_meter import anonymous_bytes
from tests.builders import settings_of
from tests.conftest import TINY_ZOO, make_zoo
from tests.training.test_resume import losses, small_config


def taken(stored: Checkpoint) -> None:
    """Any checkpoint will do."""


class _InterruptedError(Exception):
    pass


def save(out: Path, state: TrainState, tensors: Mapping[str, torch.Tensor]) -> None:
    checkpoints = CheckpointManager(str(out))
    checkpoints.save(state, tensors)
    checkpoints.wait()


def newest(out: Path) -> tuple[Checkpoint | None, list[str]]:
    return CheckpointManager(str(out)).newest(taken)


def test_progress_round_trip(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.randn(3, 2),
        "model.b": torch.arange(4).bfloat16(),
        "model.flag": torch.tensor([True, False]),
        "model.none": torch.empty(0, 3),
        "optimizer.step": torch.tensor(4.0),
    }
    state = TrainState(stage=2, step=3, corpus="abc", metrics={"val_loss": 0.5})
    save(tmp_path / "kept", state, tensors)
    again, passed_over = newest(tmp_path / "kept")
    assert again is not None
    assert (again.state, passed_over) == (state, [])
    for name, tensor in tensors.items():
        assert again.whole(name).dtype == tensor.dtype
        assert torch.equal(again.whole(name), tensor)
    assert set(again.under("optimizer.")) == {"step"}
    assert torch.equal(again.read("model.a", 2, 5), tensors["model.a"].view(-1)[2:5])
    assert CheckpointManager(str(tmp_path / "kept")).position() == (2, 3)
    assert newest(tmp_path / "none") == (None, [])


def test_every_file_of_a_checkpoint_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3), "model.b": torch.arange(5)}
    save(tmp_path, TrainState(step=3), tensors)
    found = load_file(tmp_path / "checkpoints" / "00-000000003" / "part-00000-of-00001.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_is_read_without_a_copy_of_its_tensors(tmp_path: Path) -> None:
    num = 1 << 20
    save(tmp_path, TrainState(), {f"model.{name}": torch.ones(num) for name in range(32)})
    before = anonymous_bytes()
    stored, _ = newest(tmp_path)
    assert stored is not None
    assert all(bool((stored.whole(f"model.{name}") == 1).all()) for name in range(32))
    after = anonymous_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 32 * 4 * num / 4


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written are the values of the step of the save, and the next save waits for it."""
    may_write, tensor = threading.Event(), torch.ones(3)
    open_output = Storage.open_output

    def slow(self: Storage, relative: str) -> AbstractContextManager[Any]:
        assert may_write.wait(60)
        return open_output(self, relative)

    monkeypatch.setattr(Storage, "open_output", slow)
    checkpoints = CheckpointManager(str(tmp_path))
    checkpoints.save(TrainState(step=1), {"model.a": tensor})
    tensor.fill_(2.0)
    assert checkpoints.position() is None
    threading.Timer(0.1, may_write.set).start()
    checkpoints.save(TrainState(step=2), {"model.a": tensor})
    assert checkpoints.position() is not None
    checkpoints.wait()
    for step in (1, 2):
        assert checkpoints.open(f"00-{step:09d}").whole("model.a").tolist() == [float(step)] * 3


@pytest.mark.parametrize("number", range(8))
def test_a_save_killed_anywhere_leaves_it_or_the_one_before(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its n-th act on the disk, where a removal has removed all but one file, and a part is half written."""
    save(tmp_path, TrainState(step=1), {"model.a": torch.ones(1)})
    acts, kept = 0, 1
    delete, open_output, write = Storage.delete, Storage.open_output, Storage.write

    def killed() -> bool:
        nonlocal acts
        acts += 1
        return acts > number

    def half_delete(self: Storage, relative: str) -> None:
        if killed():
            for path in sorted(Path(self.path(relative)).glob("*"))[1:]:
                path.unlink()
            raise _InterruptedError
        delete(self, relative)

    def half_open_output(self: Storage, relative: str) -> AbstractContextManager[Any]:
        if killed():
            Path(self.path(relative)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(relative)).write_bytes(b"half")
            raise _InterruptedError
        return open_output(self, relative)

    def no_write(self: Storage, relative: str, content: bytes) -> str:
        if killed():
            raise _InterruptedError
        return write(self, relative, content)

    for step in (2, 3, 3, 4):
        acts = 0
        with monkeypatch.context() as patch, suppress(SaveError):
            patch.setattr(Storage, "delete", half_delete)
            patch.setattr(Storage, "open_output", half_open_output)
            patch.setattr(Storage, "write", no_write)
            save(tmp_path, TrainState(step=step), {"model.a": torch.full((1,), step)})
        again, _ = newest(tmp_path)
        assert again is not None
        assert again.state.step == step or (number < 4 and again.state.step <= kept)
        assert float(again.whole("model.a")) == again.state.step
        kept = again.state.step


SAVER = """
import sys, torch
from raywgen.training.checkpoints import CheckpointManager, TrainState
checkpoints = CheckpointManager(sys.argv[1])
for step in range(1, 1000):
    checkpoints.save(TrainState(step=step), {"model.a": torch.full((1 << 24,), float(step))})
"""


@pytest.mark.slow
def test_a_process_killed_while_it_writes_loses_that_checkpoint_alone(tmp_path: Path) -> None:
    """SIGKILL once a part is there in half."""
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)])
    folder, deadline = tmp_path / "checkpoints", time.monotonic() + 120
    durable: tuple[int, int] | None = None
    while process.poll() is None and time.monotonic() < deadline:
        durable = CheckpointManager(tmp_path).position()
        if durable is not None and durable[1] >= 2:
            half = [path for path in folder.glob("*/*") if path.suffix not in (".json", ".safetensors")]
            if half and half[0].exists() and half[0].stat().st_size:
                break
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    found, _ = newest(tmp_path)
    assert found is not None
    assert durable is not None
    assert found.state.step >= durable[1]
    assert bool((found.whole("model.a") == found.state.step).all())


def test_a_save_that_fails_is_an_error_of_the_next_one_and_names_the_last_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, TrainState(step=1), {"model.a": torch.ones(1)})
    checkpoints, tries = CheckpointManager(str(tmp_path)), []

    @contextmanager
    def full(self: Storage, relative: str) -> Iterator[None]:
        tries.append(relative)
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open_output", full)
        checkpoints.save(TrainState(step=2), {"model.a": torch.ones(1)})
        while not checkpoints.has_failed:
            time.sleep(0.01)
        with pytest.raises(SaveError, match=rf"{tmp_path}: .*the last one is 00-000000001: .*No space left"):
            checkpoints.save(TrainState(step=3), {"model.a": torch.ones(1)})
    assert len(tries) == 1, "a full disk does not pass"
    checkpoints.save(TrainState(step=3), {"model.a": torch.ones(1)})
    checkpoints.wait()
    assert checkpoints.position() == (0, 3)


def test_a_storage_that_fails_for_a_while_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, open_output = 3, Storage.open_output

    def failing(self: Storage, relative: str) -> AbstractContextManager[Any]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("Couldn't connect to server")
        return open_output(self, relative)

    monkeypatch.setattr(Storage, "open_output", failing)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    save(tmp_path, TrainState(step=1), {"model.a": torch.ones(1)})
    assert newest(tmp_path)[0] is not None
    failures = 1000
    with pytest.raises(SaveError, match=r"there is none before it: Couldn't connect"):
        save(tmp_path / "other", TrainState(step=1), {"model.a": torch.ones(1)})


def test_the_newest_are_kept_and_of_each_stage_the_best(tmp_path: Path) -> None:
    retention = Retention(newest=1, best=2)
    checkpoints = CheckpointManager(str(tmp_path), retention=retention)
    scores = [[0.5, 0.1, 0.3, 0.2, 0.9], [0.7, 0.6]]
    for stage, of_stage in enumerate(scores):
        for step, score in enumerate(of_stage, start=1):
            if step == 4:  # Who kept them before is no longer there.
                checkpoints.wait()
                checkpoints = CheckpointManager(str(tmp_path), retention=retention)
            checkpoints.save(TrainState(stage=stage, step=step, metrics={"val_loss": score}), {})
    checkpoints.save(TrainState(stage=2), {})
    checkpoints.wait()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00-000000002", "00-000000004", "01-000000001", "01-000000002", "02-000000000"]


def test_checkpoints_lie_in_an_object_store_as_on_a_disk(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tensor = f"{bucket}/run", torch.randn(1000)
    checkpoints = CheckpointManager(out)
    for step in (1, 2, 3):
        checkpoints.save(TrainState(step=step), {"model.a": tensor + step})
    checkpoints.wait()
    client = boto3.client("s3")
    keys = [row["Key"] for row in client.list_objects_v2(Bucket="bucket", Prefix="run/")["Contents"]]
    names = sorted(key.removeprefix("run/checkpoints/") for key in keys if not key.endswith("/"))
    assert names == [f"00-00000000{step}/{name}" for step in (2, 3) for name in (INDEX, PART)]
    found, passed_over = CheckpointManager(out).newest(taken)
    assert found is not None
    assert passed_over == []
    assert torch.equal(found.read("model.a", 100, 200), tensor[100:200] + 3)
    client.put_object(Bucket="bucket", Key=f"run/checkpoints/00-000000003/{PART}", Body=b"x")
    found, (sentence,) = CheckpointManager(out).newest(taken)
    assert found is not None
    assert found.state.step == 2
    assert f"{out}/checkpoints/00-000000003/{PART} is damaged: it has 1 bytes" in sentence

    def silent(self: Storage, relative: str) -> int:
        raise OSError("Couldn't connect to server")

    monkeypatch.setattr(Storage, "size", silent)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # Nothing is known of the checkpoints, so they are not passed over.
    with pytest.raises(OSError, match="Couldn't connect"):
        CheckpointManager(out).newest(taken)


def test_a_run_keeps_the_best_checkpoints_of_each_stage(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(zoo_corpus, tmp_path / "run", keep_newest=1, keep_best=1, log_every=5, validate_every=5)
    launch([config])
    rows = {(row["stage"], row["step"]): row for row in read_metrics(config.out)}
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    for number, stage in enumerate(("tokenizer", "prior", "task_loss")):
        scores = {step + 1: rows[stage, step]["val_loss"] for step in (1, 3)}
        best = min(scores, key=lambda step: (scores[step], step))
        assert {name for name in kept if name.startswith(f"0{number}-")} == {f"0{number}-{best:09d}"}
    assert len(kept) == 4
    config = small_config(zoo_corpus, tmp_path / "other", keep_best=1, best_metric="val_accuracy")
    with pytest.raises(ConfigError, match=r"best_metric=val_accuracy: stage 'tokenizer' has val_loss, "):
        launch([config])


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
    found = Checkpoint.open(Storage.at(folder))
    tensors = found.under("")
    change(tensors)
    save(folder.parents[1], found.state, tensors)


def spoil_values(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.startswith("model.") and tensors[name].is_floating_point())
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("|exp_avg"))
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def leave_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.startswith("model."))]


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An index that is whole and says something else."""

    def changed(folder: Path) -> None:
        content = unseal((folder / INDEX).read_bytes())
        change(content)
        (folder / INDEX).write_text(sealed_json(content))

    return changed


def without_a_slice(content: dict[str, Any]) -> None:
    next(row for row in content["tensors"].values() if row[1])[2].pop()


def of_another_run(folder: Path) -> None:
    """A part of the same size, with the same slices of other values."""
    path = folder / PART
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    other = folder.parents[2] / "other"
    found = Checkpoint.open(Storage.at(folder))
    save(other, found.state, {name: tensor.view(found.index.tensors[name].shape) for name, tensor in tensors.items()})
    shutil.copy(other / "checkpoints" / folder.name / PART, path)


PART = "part-00000-of-00001.safetensors"


def damages(data: str, index: str) -> dict[str, tuple[Callable[[Path], object], str]]:
    """What may befall the file of a checkpoint with its values, or the one that says what they are."""
    return {
        "flipped bit": (lambda folder: damage(folder / data, flip), f"{data} is damaged"),
        "truncated state": (lambda folder: damage(folder / data, lambda content: content[:99]), f"{data} is damaged"),
        "no state": (lambda folder: (folder / data).unlink(), f"{data} is missing"),
        "no progress": (lambda folder: (folder / index).unlink(), f"{index} is missing"),
        "truncated progress": (lambda folder: damage(folder / index, lambda content: content[:9]), "is damaged"),
        "empty progress": (lambda folder: (folder / index).write_text(""), f"{index} is damaged"),
        "a list": (lambda folder: (folder / index).write_text("[1]"), f"{index} is damaged"),
        "no UTF-8": (lambda folder: (folder / index).write_bytes(b"\xff{}"), f"{index} is damaged"),
        "other keys": (lambda folder: (folder / index).write_text('{"a": 1, "sha256": ""}'), "is damaged"),
        "a folder": (lambda folder: ((folder / index).unlink(), (folder / index).mkdir()), "is damaged"),
        "values changed": (lambda folder: spoil_values(folder / data), f"{data} is damaged"),
        "NaN": (lambda folder: rewrite(folder, nan), "holds NaN in 'model."),
        "wrong shape": (lambda folder: rewrite(folder, reshape), "has the shape"),
        "missing tensor": (lambda folder: rewrite(folder, leave_out), "is in the checkpoint or in the generator alone"),
    }


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = damages(PART, INDEX) | {
    "changed step": (lambda folder: damage(folder / INDEX, change_step), f"{INDEX} is damaged"),
    "newer": (change_index(lambda content: content.update(version=3)), f"{INDEX} is of version 3, and this raywgen"),
    "no slice": (change_index(without_a_slice), f"{INDEX} is without the values of '"),
    "other run's slices": (of_another_run, f"{PART} is damaged, or belongs to another checkpoint"),
    "a way out": (change_index(lambda content: content["parts"][0].__setitem__(0, "../a")), f"{INDEX} is damaged"),
    "no part": (change_index(lambda content: content.update(parts=[])), f"{INDEX} is without the values of '"),
    "odd shapes": (
        change_index(lambda content: content["tensors"].update({"model.x": ["float32", ["a"], []]})),
        f"{INDEX} is damaged",
    ),
    "odd dtype": (
        change_index(lambda content: next(iter(content["tensors"].values())).__setitem__(0, "float7")),
        "belongs to another checkpoint",
    ),
}


@pytest.fixture(scope="module")
def interrupted(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run, and one that ended after step 4 of its second stage."""
    root = tmp_path_factory.mktemp("runs")
    launch([small_config(zoo_corpus, root / "whole")])
    save_it = CheckpointManager.save

    def save_then_stop(self: CheckpointManager, state: TrainState, tensors: Mapping[str, Part]) -> None:
        save_it(self, state, tensors)
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
    assert_passed_over(out, zoo_corpus, *DAMAGES[kind])


def assert_passed_over(out: Path, corpus: Corpus, hurt: Callable[[Path], object], reason: str) -> None:
    newest = out / "checkpoints" / "01-000000004"
    hurt(newest)
    with pytest.warns(CheckpointWarning) as warned:
        stored = restored(out, corpus)
    assert stored is not None
    assert (stored.state.stage, stored.state.step) == (1, 2)
    (sentence,) = (str(one.message) for one in warned)
    assert sentence.startswith(f"checkpoint {newest} is passed over: ")
    assert reason in sentence
    assert sentence.endswith("; training goes on from step 2 of stage 'prior'")
    assert "\n" not in sentence


def restored(out: Path, corpus: Corpus) -> Checkpoint | None:
    spec = run_spec(small_config(corpus, out), corpus)
    return resumed_checkpoint(spec, spec.build(), data_digest(corpus), CheckpointManager(str(out)), warn)


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
    checkpoints = CheckpointManager(str(tmp_path))
    stored = resumed_checkpoint(spec, spec.build(), data_digest(zoo_corpus), checkpoints, sentences.append)
    assert stored is None
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
    for number, name in enumerate(names):
        if number >= 2 - num_damaged:
            damage(out / "checkpoints" / name / PART, flip)
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
        CheckpointError, match=r"snapshot/index.json is missing; train the run that stopped in .* again"
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
