"""Many networks for each task, kept as files or as a corpus, and runs that were interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.generation import GenerateConfig, UnfinishedError, UnknownLayoutWarning, generate
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkResult, work_items
from raywgen.generation.request import ResolvedRequest
from raywgen.generation.sinks import CorpusSink
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.weights import load_state_dict
from tests.builders import condition, layout_of
from tests.generation.test_generate import WithNorm, bundle, config
from tests.limits import file_size_limit

__all__ = ["bundle"]
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"num": 5, "batch_size": 8, "limit": 2}


def request_of(corpus: Corpus, names: Sequence[str] = ("a", "b", "c"), **changes: Any) -> ResolvedRequest:
    task = next(iter(corpus.tasks.values()))
    arguments: dict[str, Any] = {
        "networks": list(corpus.networks.values()),
        "tasks": [dataclasses.replace(task, task_id=name) for name in names],
        "condition": condition(3), "best_of": 2, "is_tried": True,
    }  # fmt: skip
    return ResolvedRequest(**(arguments | changes))


def plan_of(request: ResolvedRequest, num: int = 1, batch_size: int = 1000, generator: str = "none") -> GenerationPlan:
    items = work_items(request, num, batch_size)
    return GenerationPlan(
        request=request, generator=generator, num=num, temperature=1.0, seed=0, sampling=SamplingConfig(), threads=1,
        num_unlabelled=0, items=items,
    )  # fmt: skip


@pytest.mark.parametrize(("num", "best_of", "most"), [(1, 8, 256), (1, 3, 4), (7, 2, 8), (5, 8, 3), (1000, 8, 256)])
def test_work_items_hold_every_network_once_in_nearly_equal_parts(
    zoo_corpus: Corpus, num: int, best_of: int, most: int
) -> None:
    items = work_items(request_of(zoo_corpus, best_of=best_of), num, most)
    assert [item.index for item in items] == list(range(len(items)))
    for number in range(2):
        of_one = [item for item in items if item.network == number]
        assert [place for item in of_one for place in range(item.start, item.stop)] == list(range(3 * num))
        sizes = {item.num_networks for item in of_one}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) * best_of <= max(most, best_of)


def test_what_one_batch_holds_by_default_is_one_work_item(zoo_corpus: Corpus) -> None:
    # The default of 24 tasks and 8 candidates.
    request = request_of(zoo_corpus, [str(place) for place in range(24)], best_of=8)
    assert len(work_items(request, 1, GenerateConfig().batch_size)) == len(zoo_corpus.networks)


def test_a_corpus_holds_what_files_hold(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    files = generate(config(zoo_corpus, bundle, tmp_path / "files", **SETTINGS))
    progress: list[tuple[int, int]] = []
    settings = config(zoo_corpus, bundle, tmp_path / "corpus", into="corpus", **SETTINGS)
    rows = generate(settings, lambda *step: progress.append(step))
    assert progress[0] == (0, 20)
    assert progress[-1] == (20, 20)
    assert len({row.path for row in files}) == 2 * 2 * 5
    assert [row.draw for row in files] == [0, 1, 2, 3, 4] * 4, "task after task"
    corpus = Corpus.open(tmp_path / "corpus")
    assert not verify_corpus(corpus.location)
    facts = corpus.facts.to_pylist()
    assert [row.checkpoint_id for row in rows] == [fact["checkpoint_id"] for fact in facts]
    for file, row, fact in zip(files, rows, facts, strict=True):
        assert dataclasses.replace(row, path=file.path) == dataclasses.replace(file, checkpoint_id=row.checkpoint_id)
        state = corpus.state_dict(fact["checkpoint_id"])
        assert all(torch.equal(tensor, state[name]) for name, tensor in load_state_dict(file.path).items())
        assert (fact["task_id"], fact["architecture"], fact["split"]) == (file.task, file.network, "unseen")
        assert (fact["example_loss"], fact["log_prob"]) == (file.example_loss, file.log_prob)
    assert set(corpus.tasks) == {row.task for row in rows}
    assert corpus.query(["example_loss<1e9", "draw=3"]).num_rows == 4
    layout = corpus.layout(facts[0]["layout_id"])
    name = layout.generated[0].name
    mean = corpus.moments(layout.id)[name][0]
    values = [corpus.state_dict(fact["checkpoint_id"])[name] for fact in facts[:10]]
    assert mean == pytest.approx(float(torch.stack(values).double().mean()), rel=1e-6)


def test_facts_are_what_a_network_does(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    generate(config(zoo_corpus, bundle, tmp_path, into="corpus", **SETTINGS))
    corpus = Corpus.open(tmp_path)
    seen = []
    for facts, state in corpus.checkpoints():
        module = build_network(corpus.networks[facts["layout_id"]].recipe)
        module.load_state_dict(state)
        task = build_task(corpus.tasks[facts["task_id"]].recipe)
        accuracy = float(balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S))
        assert facts["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        task = corpus.tasks[facts["task_id"]]
        loss = float(balanced_cross_entropy(module(task.samples_SF).detach().unsqueeze(0), task.labels_S))
        assert facts["example_loss"] == pytest.approx(loss, rel=1e-4)
        seen.append(loss)
    assert len(set(seen)) == 20, "draws must differ"


def test_the_first_draws_stay_when_more_are_asked_for(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    one = generate(config(zoo_corpus, bundle, tmp_path / "one", limit=3))
    more = generate(config(zoo_corpus, bundle, tmp_path / "more", limit=3, num=4))
    first = [row for row in more if row.draw == 0]
    for row, other in zip(one, first, strict=True):
        assert (row.task, row.network) == (other.task, other.network)
        states = [load_state_dict(one.path) for one in (row, other)]
        # Other batch sizes round differently.
        torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    for into in ("files", "corpus"):
        whole = generate(config(zoo_corpus, bundle, tmp_path / "whole" / into, into=into, **SETTINGS))
        settings = config(zoo_corpus, bundle, tmp_path / into, into=into, **SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            generate(settings, stopping_after(6))
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / into).rglob("[!.]*") if path.is_file()}
        with pytest.raises(UnfinishedError, match=r"2 work items of a run with other settings.*delete .*units"):
            generate(dataclasses.replace(settings, seed=1))
        progress: list[tuple[int, int]] = []
        rows = generate(settings, lambda *step, progress=progress: progress.append(step))
        assert progress[0] == (6, 20), "two work items of three or four networks were there"
        assert without_paths(rows) == without_paths(whole)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.exists())
        assert not (tmp_path / into / "units").exists()
        assert same_weights(tmp_path / into, tmp_path / "whole" / into)


def test_a_disk_that_fills_within_a_journal_is_one_line_and_nothing_is_lost(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    """A bound on the sizes of files, between that of a network and that of a journal, stands in for a full disk."""
    settings = config(zoo_corpus, bundle, tmp_path / "out", num=12, batch_size=24, limit=1)
    with pytest.raises(KeyboardInterrupt):
        generate(dataclasses.replace(settings, out=str(tmp_path / "sizes")), stopping_after(6))
    of_journals, of_networks = (
        [path.stat().st_size for path in (tmp_path / "sizes").glob(pattern)]
        for pattern in ("units/*.json", "*.safetensors")
    )
    assert max(of_networks) < min(of_journals)
    with (
        file_size_limit(max(of_networks)),
        pytest.raises(CorpusError, match=r"cannot write .*/units/.*json: .*too large; free some disk.*again"),
    ):
        generate(settings)
    assert not list((tmp_path / "out" / "units").glob("[!.]*")), "half a journal"
    whole = generate(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    assert without_paths(generate(settings)) == without_paths(whole)
    assert same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("into", ["files", "corpus"])
def test_what_was_damaged_since_is_written_again(zoo_corpus: Corpus, bundle: str, tmp_path: Path, into: str) -> None:
    """A journal with a changed digit, and a network with one."""
    generate(config(zoo_corpus, bundle, tmp_path / "whole", into=into, **SETTINGS))
    settings = config(zoo_corpus, bundle, tmp_path / "out", into=into, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        generate(settings, stopping_after(12))
    journals = sorted((tmp_path / "out" / "units").iterdir())
    journals[0].write_text(journals[0].read_text().replace('"draw": 1', '"draw": 3'))
    victim = next(iter(json.loads(journals[1].read_text())["files"]))
    content = bytearray((tmp_path / "out" / victim).read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / victim).write_bytes(content)
    progress: list[tuple[int, int]] = []
    generate(settings, lambda *step: progress.append(step))
    assert progress[0][0] < 12
    assert progress[-1][0] == 20
    assert same_weights(tmp_path / "out", tmp_path / "whole")


def without_paths(rows: list[NetworkRow]) -> list[NetworkRow]:
    return [dataclasses.replace(row, path="") for row in rows]


def stopping_after(most: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= most:
            raise KeyboardInterrupt

    return progress


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit, by file."""
    folders = [
        {path.name: path for path in folder.rglob("*") if path.suffix in (".arrow", ".safetensors")}
        for folder in (one, other)
    ]
    assert folders[0].keys() == folders[1].keys()
    for name, path in folders[0].items():
        assert path.read_bytes() == folders[1][name].read_bytes(), name
    return bool(folders[0])


def test_a_corpus_of_the_same_settings_is_reused_and_another_refused(
    zoo_corpus: Corpus,
    bundle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start() -> AbstractContextManager[None]:
        pytest.fail("nothing is left to do for Ray")

    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    settings = config(zoo_corpus, str(mine), tmp_path / "out", into="corpus", **SETTINGS)
    rows = generate(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert generate(dataclasses.replace(settings, where="ray", num_actors=2), session=start) == rows
    assert not ray.is_initialized()
    assert capsys.readouterr().err == f"{tmp_path / 'out'}: all 20 networks of these settings are there already\n"
    with pytest.raises(CorpusError, match="another recipe"):
        generate(dataclasses.replace(settings, num=6))
    # The same folder, but other values: no earlier network may pass for one of theirs.
    generator = load_bundle(mine)
    with torch.no_grad():
        next(generator.parameters()).add_(1)
    save_bundle(generator, mine, {})
    with pytest.raises(CorpusError, match="another recipe"):
        generate(settings)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_task_and_architectures_of_ones_own_make_a_corpus_too(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.numpy(), y=task.labels_S.numpy())
    settings = config(zoo_corpus, bundle, tmp_path / "out", into="corpus", num=3)
    network = {"name": "tests.generation.test_generate:WithNorm", "width": 5}
    settings = dataclasses.replace(settings, instruction="Is it?", data=str(tmp_path / "mine.npz"), networks=[network])
    with pytest.warns(UnknownLayoutWarning):
        rows = generate(settings)
    assert all(row.test_accuracy is None and not row.known for row in rows)
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.numpy(), y=1 - task.labels_S.numpy())
    with pytest.raises(CorpusError, match="another recipe"):
        generate(settings)  # The same samples with other labels are another task.
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tasks["custom"].instruction == "Is it?"
    assert torch.equal(corpus.tasks["custom"].samples_SF, task.samples_SF)
    for facts, state in corpus.checkpoints():
        WithNorm(5).load_state_dict(state, strict=True)
        assert math.isnan(facts["test_accuracy"])


def rows_for(request: ResolvedRequest, network: str) -> list[NetworkRow]:
    facts: dict[str, Any] = {"draw": 0, "instruction": "", "known": True, "example_loss": 1.0, "log_prob": None}
    return [NetworkRow(task=name, network=network, **facts) for name in request.task_ids]


def test_networks_that_are_not_finite_are_set_aside(zoo_corpus: Corpus, tmp_path: Path) -> None:
    request = request_of(zoo_corpus)
    plan = plan_of(request)
    sink = CorpusSink(GenerateConfig(out=str(tmp_path), into="corpus"), plan, {})
    for item, lost in zip(plan.items, (1, 3), strict=True):
        network = request.networks[item.network]
        values_RD = torch.zeros(3, network.layout.num_values)
        values_RD[:lost, 4] = torch.nan
        sink.write(WorkResult(item=item, values_RD=values_RD, rows=rows_for(request, network.name)))
    rows = sink.finish()
    assert [row.task for row in rows] == ["b", "c"]
    assert all(row.log_prob is None for row in rows)
    corpus = Corpus.open(tmp_path)
    assert corpus.quarantine.num_rows == 4
    assert set(corpus.quarantine.column("reason").to_pylist()) == {"generated values are not finite"}


def test_no_finite_network_at_all_is_said(zoo_corpus: Corpus, tmp_path: Path) -> None:
    network = dataclasses.replace(next(iter(zoo_corpus.networks.values())), layout=layout_of())
    request = request_of(zoo_corpus, networks=[network])
    plan = plan_of(request)
    sink = CorpusSink(GenerateConfig(out=str(tmp_path), into="corpus"), plan, {})
    values_RD = torch.full((3, layout_of().num_values), torch.inf)
    sink.write(WorkResult(item=plan.items[0], values_RD=values_RD, rows=rows_for(request, network.name)))
    with pytest.raises(CorpusError, match="no generated network is finite"):
        sink.finish()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 0}, "num=0"),
        ({"num": 2, "temperature": 0.0}, "num=2 at temperature=0"),
        ({"threads": 0}, "threads=0"),
        ({"start_timeout": 0.0}, "start_timeout=0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


@pytest.mark.parametrize(
    ("setting", "message"), [("where=there", "here, ray"), ("into=zip", "files, adapters, corpus")]
)
def test_choices_are_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GenerateConfig, None, [setting])
