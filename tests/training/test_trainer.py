"""One worker's training: which networks it trains on, and which it is validated on."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.generators import Stage, StageConfig
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.common.tokenizer.stage import TokenizerStage
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.stops import Stop
from raywgen.tasks.augment import augment_each
from raywgen.training import TrainConfig, read_metrics, trainer
from raywgen.training.batch_order import StageView
from raywgen.training.batch_plan import STAGE_STREAM, BatchPlan
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import Engine, EngineSettings, LocalEngine
from raywgen.training.rows import RunRows
from raywgen.training.run_spec import RunSpec
from raywgen.training.trainer import Trainer, train_runs
from raywgen.weights import KeyedNoise, WeightBatch
from tests.training.whole_plan import WholePlan

NUM_STEPS, BATCH = 3, 8


class Texts:
    """What workers in threads of this process give one another."""

    def __init__(self, num_workers: int) -> None:
        self._texts = [""] * num_workers
        self._barrier = threading.Barrier(num_workers, timeout=60)

    def exchange(self, rank: int, text: str) -> list[str]:
        self._texts[rank] = text
        self._barrier.wait()
        found = list(self._texts)
        self._barrier.wait()
        return found


class EnoughError(Exception):
    """All steps are taken, and nothing is to be saved."""


class NoMore(Stop):
    """A request that ends training after some steps, before anything is saved."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self._num_left = num_steps

    def asked(self) -> bool:
        self._num_left -= 1
        if not self._num_left:
            raise EnoughError
        return False


@dataclass
class OneOf:
    """A worker that trains its part of every batch; only checkpoints are saved together with the others."""

    rank: int = 0
    num_workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: Stop = field(default_factory=Stop)
    others: Texts | None = None
    shared: list[Tensor] = field(default_factory=list)

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        return LocalEngine(stage, settings)

    def memory(self) -> int:
        return 1 << 30

    def is_warned(self) -> bool:
        return False

    def place(self) -> str:
        return f"worker {self.rank}"

    def exchange(self, text: str) -> list[str]:
        return [text] if self.others is None else self.others.exchange(self.rank, text)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Sends by way of a list, where the first worker runs before the others."""
        if self.rank == 0:
            self.shared.extend(tensor.detach().clone() for tensor in tensors)
            return
        for tensor, sent in zip(tensors, self.shared, strict=False):
            tensor.detach().copy_(sent)

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        pass


def config(corpus: Corpus, out: Path, **changes: Any) -> TrainConfig:
    """A run of one short stage."""
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=NUM_STEPS, batch_size=BATCH, quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16
        ),
        prior=PriorConfig(num_steps=0, width=16, num_layers=1, num_heads=2),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    settings: dict[str, Any] = {"log_every": 1, "validate_every": 2, "num_workers": 0}
    settings |= {"generator": igpg, "corpus": corpus.location, "out": str(out)}
    return TrainConfig(**(settings | changes))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Tensor, float]]]:
    """Values of all batches that engines were given, with the loss that they had on each."""
    found: dict[str, list[tuple[Tensor, float]]] = {"train_step": [], "evaluate": []}
    train_step, evaluate_parts = LocalEngine.train_step, LocalEngine.evaluate_parts

    def trained(self: LocalEngine, batch: Any, *rest: Any) -> Any:
        scalars = train_step(self, batch, *rest)
        found["train_step"].append((batch.values_BD, float(scalars["loss"])))
        return scalars

    def evaluated(self: LocalEngine, parts: Any, *rest: Any) -> Any:
        kept = list(parts)
        scalars = evaluate_parts(self, kept, *rest)
        found["evaluate"].append((torch.cat([batch.values_BD for batch, *_ in kept]), float(scalars["loss"])))
        return scalars

    monkeypatch.setattr(LocalEngine, "train_step", trained)
    monkeypatch.setattr(LocalEngine, "evaluate_parts", evaluated)
    return found


def train(run: TrainConfig, corpus: Corpus, worker: OneOf | None = None) -> None:
    spec = RunSpec(config=run, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))
    train_runs([spec], worker or OneOf(), lambda sentence: None)


def tokenizer_stage(corpus: Corpus, out: Path) -> Stage:
    run = config(corpus, out)
    return (
        RunSpec(config=run, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))
        .build()
        .stages()[0]
    )


def rows_in(values: list[Tensor]) -> set[tuple[float, ...]]:
    return {tuple(value_D) for values_BD in values for value_D in values_BD.tolist()}


def test_it_is_trained_on_training_networks_and_validated_on_networks_of_validation_tasks(
    zoo_corpus: Corpus, tmp_path: Path, seen: dict[str, list[tuple[Tensor, float]]]
) -> None:
    train(config(zoo_corpus, tmp_path), zoo_corpus)
    rows = RunRows.of(zoo_corpus)
    known, held = (
        rows_in([part.values(torch.arange(len(part))) for part in parts]) for parts in (rows.train, rows.held)
    )
    assert known.isdisjoint(held)
    trained, validated = (rows_in([values for values, _ in seen[name]]) for name in ("train_step", "evaluate"))
    assert trained <= known
    assert validated == held


def test_a_validation_counts_every_architecture_alike(
    zoo_corpus: Corpus, tmp_path: Path, seen: dict[str, list[tuple[Tensor, float]]]
) -> None:
    train(config(zoo_corpus, tmp_path), zoo_corpus)
    validated = [row["val_loss"] for row in read_metrics(tmp_path) if "val_loss" in row]
    losses = [loss for _, loss in seen["evaluate"]]
    assert len(losses) == 2 * len(validated)
    assert validated == pytest.approx([(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)])


def test_images_are_changed_to_train_on_but_not_to_be_validated_on(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def noted(x_BSF: Tensor, kind: str, noise: KeyedNoise) -> Tensor:
        kinds.append(kind)
        return augment_each(x_BSF, kind, noise)

    monkeypatch.setattr("raywgen.training.batch_plan.augment_each", noted)
    stage = StageConfig(num_steps=1, batch_size=4)
    of_one_step = {"method": "hypernetwork", "generator": HypernetworkConfig(task_loss=stage)}
    train(config(zoo_corpus, tmp_path, augment="flip", **of_one_step), zoo_corpus)
    assert kinds[0] == "flip"
    assert set(kinds[1:]) == {""}


@pytest.mark.parametrize(("num_workers", "accumulate"), [(1, 1), (1, 3), (3, 1), (3, 2), (48, 1), (100, 1)])
def test_a_validation_takes_no_more_networks_at_once_than_a_step(
    zoo_corpus: Corpus, tmp_path: Path, num_workers: int, accumulate: int
) -> None:
    view = StageView(tokenizer_stage(zoo_corpus, tmp_path), 1, STAGE_STREAM)
    view.stage.config.batch_size = batch_size = max(7, num_workers * accumulate)
    most = math.ceil(math.ceil(batch_size / num_workers) / accumulate)
    total, counted = max(64, num_workers), list[int]()
    numbers: set[int] = set()
    for rank in range(num_workers):
        plan = BatchPlan(
            RunRows.of(zoo_corpus).held,
            seed=0,
            num_condition_samples=2,
            num_query_samples=2,
            rank=rank,
            num_workers=num_workers,
        )
        parts = list(plan.parts_for_stage(1, total, view, accumulate))
        numbers.add(len(parts))
        assert all(1 <= len(batch.sample_index_B) <= most for batch, *_ in parts)
        counted += [int(index) for batch, _, count in parts for index in batch.sample_index_B[:count]]
    assert sorted(counted) == list(range(total, 2 * total))
    assert len(numbers) == 1


def test_a_validation_in_parts_is_one_of_all(zoo_corpus: Corpus, tmp_path: Path) -> None:
    stage = tokenizer_stage(zoo_corpus, tmp_path)
    rows, view = RunRows.of(zoo_corpus).held, StageView(stage, 1, STAGE_STREAM)
    plan = BatchPlan(rows, seed=0, num_condition_samples=2, num_query_samples=2)
    engine = LocalEngine(stage)
    whole = engine.evaluate(*plan.for_stage(0, 64, view))
    parts = engine.evaluate_parts(plan.parts_for_stage(0, 64, view, 3), 64)
    assert parts.keys() == whole.keys()
    for name in ("loss", "reconstruction"):
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-5)


def test_a_worker_trains_on_its_own_part_of_every_batch(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, texts, num_bundles = config(zoo_corpus, tmp_path), Texts(2), 0
    found: dict[int, list[Tensor]] = {}
    take_step, bundle = LocalEngine.train_step, trainer.save_bundle

    def noted(self: LocalEngine, batch: Any, *rest: Any) -> Any:
        found.setdefault(threading.get_ident(), []).append(batch.values_BD)
        return take_step(self, batch, *rest)

    def save_bundle(*arguments: Any) -> None:
        nonlocal num_bundles
        num_bundles += 1
        assert threading.get_ident() == first.ident, "the first worker alone writes"
        bundle(*arguments)

    monkeypatch.setattr(LocalEngine, "train_step", noted)
    monkeypatch.setattr(trainer, "save_bundle", save_bundle)
    first, second = (
        threading.Thread(target=train, args=(run, zoo_corpus, OneOf(rank=rank, num_workers=2, others=texts)))
        for rank in range(2)
    )
    first.start()
    second.start()
    first.join()
    second.join()
    assert second.ident is not None
    order = WholePlan(
        RunRows.of(zoo_corpus).train,
        seed=run.seed,
        num_condition_samples=run.num_condition_samples,
        num_query_samples=run.num_query_samples,
    )
    for step, values_BD in enumerate(found[second.ident]):
        assert torch.equal(values_BD, order.batch(step, BATCH).values_BD[1::2])
    assert len(found[second.ident]) == NUM_STEPS
    assert num_bundles == 2


def test_a_strategy_that_is_chosen_is_told_and_changes_no_loss(
    zoo_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for strategy in ("manual", "auto"):
        train(config(zoo_corpus, tmp_path / strategy, strategy=strategy), zoo_corpus, OneOf())
        losses[strategy] = [row["loss"] for row in read_metrics(tmp_path / strategy)]
    assert losses["auto"] == losses["manual"]
    assert "strategy of stage 'tokenizer': accumulate=1, because " in capsys.readouterr().err


@dataclass
class Warned(OneOf):
    """A worker that learns in its second step, as of then for good, that a node will be taken away."""

    num_asked: int = 0

    def is_warned(self) -> bool:
        self.num_asked += 1
        return self.num_asked >= 2


def test_a_notice_makes_one_checkpoint_and_training_goes_on(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = Trainer._save  # pyright: ignore[reportPrivateUsage]

    def noted(self: Trainer, state: Any, *others: Any) -> None:
        saved.append(state.step)
        save(self, state, *others)

    monkeypatch.setattr(Trainer, "_save", noted)
    train(config(zoo_corpus, tmp_path), zoo_corpus, Warned())
    assert saved[0] == 2
    assert [step for step in saved if step] == [2], "one checkpoint within the stage"
    assert len(read_metrics(tmp_path)) == NUM_STEPS


def test_every_step_of_every_worker_has_a_dropout_of_its_own(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, ...]] = []
    step = LocalEngine.train_step

    def noted(self: LocalEngine, *arguments: Any) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            drawn.append(tuple(torch.rand(3).tolist()))
        return step(self, *arguments)

    monkeypatch.setattr(LocalEngine, "train_step", noted)
    monkeypatch.setattr(trainer, "agree_on_folder", lambda out, group: "launch")
    for rank in range(2):
        with pytest.raises(EnoughError):
            train(
                config(zoo_corpus, tmp_path / str(rank)),
                zoo_corpus,
                OneOf(rank=rank, num_workers=2, stop=NoMore(NUM_STEPS)),
            )
    assert len(set(drawn)) == len(drawn) == 2 * NUM_STEPS


def test_one_worker_initialises_a_stage_for_all(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Tensor]] = []
    set_up: list[int] = []
    step, setup = LocalEngine.train_step, TokenizerStage.setup

    def noted(self: LocalEngine, *arguments: Any) -> dict[str, Tensor]:
        started.append({name: tensor.clone() for name, tensor in self.stage.state_dict().items()})
        return step(self, *arguments)

    def counted(self: TokenizerStage, batches: Iterable[WeightBatch], seed: int) -> None:
        set_up.append(seed)
        setup(self, batches, seed)

    monkeypatch.setattr(LocalEngine, "train_step", noted)
    monkeypatch.setattr(TokenizerStage, "setup", counted)
    monkeypatch.setattr(trainer, "agree_on_folder", lambda out, group: "launch")
    shared: list[Tensor] = []
    for rank, num_workers in ((0, 1), (0, 2), (1, 2)):
        worker = OneOf(rank=rank, num_workers=num_workers, stop=NoMore(1), shared=shared)
        if rank == 0:
            shared.clear()
        with pytest.raises(EnoughError):
            train(config(zoo_corpus, tmp_path / f"{rank}-{num_workers}"), zoo_corpus, worker)
    assert len(set_up) == 2, "by a worker that is alone, and by the first of two"
    alone, first, second = started
    for name, tensor in alone.items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)


def test_the_seed_decides_the_order(
    zoo_corpus: Corpus, tmp_path: Path, seen: dict[str, list[tuple[Tensor, float]]]
) -> None:
    for seed in (1, 2, 1):
        train(config(zoo_corpus, tmp_path / f"{seed}-{len(seen['train_step'])}", seed=seed), zoo_corpus)
    one, two, again = (
        [values for values, _ in seen["train_step"][first : first + NUM_STEPS]]
        for first in (0, NUM_STEPS, 2 * NUM_STEPS)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))
