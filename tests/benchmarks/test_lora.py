"""`lora` on a small encoder with random values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.benchmarks import lora_rows
from raywgen.benchmarks.lora import LoRAConfig, _spreads, measure
from raywgen.benchmarks.lora_rows import AdapterRows, Row
from raywgen.benchmarks.lora_stored import instruction_features
from raywgen.benchmarks.run import main
from raywgen.benchmarks.trained import trained_zoo
from raywgen.tasks import Task
from tests.text_encoders import SIGNS, make_encoder, make_sentences

ROWS = ("head", "average", "nearest", "nearest_text", "regression", "gradient", "gradient_all", "shared", "shuffled")
WRITTEN = tuple(f"{name}{part}" for name in ("hypernetwork", "igpg") for part in ("", "_text", "_examples"))
RUN = ["num_condition_samples=8", "num_query_samples=8", "precision=fp32", "generator.task_loss.num_steps=3"]


def small(folder: Path) -> LoRAConfig:
    base = make_encoder(folder / "encoder")
    network = (
        f"networks=[{{name: lora, base: {{name: upper-layers, path: '{base}', first_layer: 1, num_classes: 2, "
        "head: fitted}, rank: 2, targets: [query], train_head: [classifier]}]"
    )
    tasks = [f"tasks.base={base}", "tasks.first_layer=1", "tasks.max_tokens=8", "tasks.limit=null"]
    counts = ["num_seen_tasks=4", "num_validation_tasks=2", "num_unseen_tasks=3", "num_condition_samples=8"]
    return LoRAConfig(
        data=make_sentences(folder / "signs.parquet"),
        classes=[0, 1, 2, 3],
        class_names=SIGNS,
        methods=["hypernetwork", "igpg"],
        distributed=False,
        shots=[4],
        rates=[1e-2],
        steps=[2, 4],
        zoo=[network, *tasks, *counts, "num_steps=10", "checkpoint_steps=[5,10]", "tasks.test_limit=null"],
        hypernetwork=RUN,
        shared=[],
        igpg=[*RUN, "generator.tokenizer.num_steps=3", "generator.prior.num_steps=3", "generator.prior.width=16"],
        out=str(folder / "out"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.mark.slow
def test_every_row_is_judged_on_the_same_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(folder / "cache"))
    figures, conditions = measure(small(folder))
    assert set(figures) == {f"{prefix}{name}_4" for name in (*ROWS, *WRITTEN) for prefix in ("", "ms_")}
    assert all(0 <= figures[f"{name}_4"] <= 100 for name in (*ROWS, *WRITTEN))
    assert all(figures[f"ms_{name}_4"] > 0 for name in ("nearest", "gradient", "hypernetwork", "igpg", "shuffled"))
    (details,) = conditions["each"]
    assert details["gradient"]["rate"] == 1e-2
    assert details["gradient"]["steps"] in (2, 4)
    gain, _ = details["paired_differences"]["igpg - shared"]
    assert gain == pytest.approx(figures["igpg_4"] - figures["shared_4"], abs=0.01)


def test_examples_are_the_same_for_all_and_none_is_a_test_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(folder / "cache"))
    corpus = trained_zoo(str(folder / "here"), small(folder).zoo_of(0), distributed=False)
    one, other = (AdapterRows(corpus, "unseen", 4, 0) for _ in range(2))
    for condition, same, task in zip(one.conditions, other.conditions, one.tasks, strict=True):
        assert condition.labels_BS.tolist() == [[0] * 4 + [1] * 4]
        assert bool((condition.samples_BSF == same.samples_BSF).all())
        assert task.train_inputs.rows_S is not None
        assert task.test_inputs.rows_S is not None
        assert not {*task.train_inputs.rows_S.tolist()} & {*task.test_inputs.rows_S.tolist()}
    stored_ND, ids = one.stored()
    assert len(stored_ND) == 4
    assert not {*ids} & {task.id for task in one.tasks}
    base_D = corpus.base_values(next(iter(corpus.networks)))
    assert base_D is not None
    # B of a start is zero, so its adapter changes nothing, and the head is that on the encoder as it is.
    assert one.one_for_all(base_D).percent == pytest.approx(one.head().percent, abs=1e-4)
    assert one.trained_on_all().percent >= one.head().percent


def test_features_of_conditions_are_made_once_and_before_the_clock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(folder / "cache"))
    corpus = trained_zoo(str(folder / "here"), small(folder).zoo_of(0), distributed=False)
    events: list[str] = []

    def features(texts: Sequence[str], task: Task) -> Tensor:
        events.append("features")
        return instruction_features(texts, task)

    def now() -> float:
        events.append("clock")
        return 2.0 * events.count("clock")

    monkeypatch.setattr(lora_rows, "instruction_features", features)
    monkeypatch.setattr("time.process_time", now)
    rows = AdapterRows(corpus, "unseen", 4, 0)
    timed = [rows.nearest_by_text(), *(rows.regression(strength) for strength in (0.1, 10.0))]
    assert events == ["features", *["clock", "clock"] * 3]
    assert [row.milliseconds for row in timed] == [pytest.approx(2000 / len(rows.tasks))] * 3


def test_draws_of_one_task_are_no_further_tasks() -> None:
    tasks_T = torch.tensor([0.5, 0.6, 0.9])
    once = Row(accuracy_TJ=tasks_T.unsqueeze(1))
    noise_TJ = torch.tensor([0.05, -0.05]).expand(3, 2)
    several = Row(accuracy_TJ=tasks_T.unsqueeze(1) + noise_TJ)
    assert once.error == pytest.approx(100 * float(tasks_T.std()) / 3**0.5)
    assert (several.percent, several.error) == (pytest.approx(once.percent), pytest.approx(once.error))
    alone, other = Row(accuracy_TJ=tasks_T.unsqueeze(0)), Row(accuracy_TJ=torch.tensor([[0.4, 0.4, 0.4]]))
    assert alone.error == pytest.approx(once.error)
    _, error = _spreads({"head": other, "gradient": other, "shared": alone})["paired_differences"]["shared - head"]
    assert error == pytest.approx(alone.error, abs=0.005)
    assert _spreads({"head": alone})["errors_over"] == "draws of one task"
    assert _spreads({"head": several})["errors_over"] == "tasks"
    assert math.isnan(Row(accuracy_TJ=tasks_T[:1].unsqueeze(1)).error)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="data: give a Parquet file of sentences"):
        LoRAConfig()
    with pytest.raises(ValueError, match=r"methods=\['vae'\]: give some of hypernetwork"):
        LoRAConfig(data="a.parquet", methods=["vae"])


def test_a_list_that_cannot_be_read_is_shown_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["zoo=[num_steps=5,checkpoint_steps=[5]]", "others=[/a.parquet,/b.parquet]"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", "lora", "data=c.parquet", *given])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err
    assert "cannot read the overrides" in shown
    assert "[/a.parquet,/b.parquet]" in shown


def test_a_data_set_or_a_class_is_left_out() -> None:
    config = LoRAConfig(data="c.parquet", others=["a.parquet", "b.parquet"], class_names=[], classes=[])
    zoo = config.zoo_of(0).tasks
    assert (zoo.paths, zoo.num_unseen_paths) == (["a.parquet", "b.parquet", "c.parquet"], 1)
    assert LoRAConfig(data="c.parquet", family="words").zoo_of(0).tasks.kind == "sentence-words"
    with pytest.raises(ValueError, match="heldout=2 with others"):
        LoRAConfig(data="c.parquet", others=["a.parquet"], heldout=2)
