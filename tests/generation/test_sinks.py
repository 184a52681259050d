"""Many networks for each task, kept as files or as a corpus, and runs that were interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.generation import GenerateConfig, UnfinishedError, UnknownLayoutWarning, generate
from raywgen.generation.plan import Job, Written, plan_blocks
from raywgen.generation.sinks import CorpusKeeper
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.weights import load_state_dict
from tests.builders import condition, layout_of
from tests.generation.test_write import WithNorm, bundle, config

__all__ = ["bundle"]
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"num": 5, "block": 8, "limit": 2}


def job_of(corpus: Corpus, **changes: Any) -> Job:
    told: dict[str, Any] = {
        "generator": "none", "networks": list(corpus.networks.values()), "names": ["a", "b", "c"],
        "condition": condition(3), "recipes": [], "num": 1, "best_of": 2, "temperature": 1.0, "seed": 0,
        "sampling": SamplingConfig(), "threads": 1,
    }  # fmt: skip
    return Job(**(told | changes))


@pytest.mark.parametrize(("num", "best_of", "most"), [(1, 8, 256), (1, 3, 4), (7, 2, 8), (5, 8, 3), (1000, 8, 256)])
def test_blocks_hold_every_network_once_in_nearly_equal_parts(
    zoo_corpus: Corpus, num: int, best_of: int, most: int
) -> None:
    blocks = plan_blocks(job_of(zoo_corpus, num=num, best_of=best_of), most)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for number in range(2):
        of_one = [block for block in blocks if block.network == number]
        assert [place for block in of_one for place in range(block.start, block.stop)] == list(range(3 * num))
        sizes = {block.stop - block.start for block in of_one}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) * best_of <= max(most, best_of)


def test_what_one_batch_held_before_there_were_blocks_is_one_block(zoo_corpus: Corpus) -> None:
    # The default of 24 tasks and 8 candidates.
    told = job_of(zoo_corpus, names=[str(place) for place in range(24)], best_of=8)
    assert len(plan_blocks(told, GenerateConfig().block)) == len(zoo_corpus.networks)


def test_a_corpus_holds_what_files_hold(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    files = generate(config(zoo_corpus, bundle, tmp_path / "files", **SETTINGS))
    told: list[tuple[int, int]] = []
    settings = config(zoo_corpus, bundle, tmp_path / "corpus", into="corpus", **SETTINGS)
    rows = generate(settings, lambda *step: told.append(step))
    assert told[0] == (0, 20)
    assert told[-1] == (20, 20)
    assert len({row["path"] for row in files}) == 2 * 2 * 5
    assert [row["draw"] for row in files] == [0, 1, 2, 3, 4] * 4, "task after task"
    corpus = Corpus.open(tmp_path / "corpus")
    assert not verify_corpus(corpus.location)
    facts = corpus.facts.to_pylist()
    assert [row["checkpoint_id"] for row in rows] == [fact["checkpoint_id"] for fact in facts]
    for file, row, fact in zip(files, rows, facts, strict=True):
        assert {**row, "path": file["path"]} == {**file, "checkpoint_id": row["checkpoint_id"]}
        state = corpus.state_dict(fact["checkpoint_id"])
        assert all(torch.equal(tensor, state[name]) for name, tensor in load_state_dict(file["path"]).items())
        assert (fact["task_id"], fact["architecture"], fact["split"]) == (file["task"], file["network"], "unseen")
        assert (fact["example_loss"], fact["log_prob"]) == (file["example_loss"], file["log_prob"])
    assert set(corpus.tasks) == {row["task"] for row in rows}
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
        told = corpus.tasks[facts["task_id"]]
        loss = float(balanced_cross_entropy(module(told.samples_SF).detach().unsqueeze(0), told.labels_S))
        assert facts["example_loss"] == pytest.approx(loss, rel=1e-4)
        seen.append(loss)
    assert len(set(seen)) == 20, "draws must differ"


def test_the_first_draws_stay_when_more_are_asked_for(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    one = generate(config(zoo_corpus, bundle, tmp_path / "one", limit=3))
    more = generate(config(zoo_corpus, bundle, tmp_path / "more", limit=3, num=4))
    first = [row for row in more if row["draw"] == 0]
    for row, other in zip(one, first, strict=True):
        assert (row["task"], row["network"]) == (other["task"], other["network"])
        states = [load_state_dict(told["path"]) for told in (row, other)]
        # Other batch sizes round differently.
        torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    for into in ("files", "corpus"):
        whole = generate(config(zoo_corpus, bundle, tmp_path / "whole" / into, into=into, **SETTINGS))
        settings = config(zoo_corpus, bundle, tmp_path / into, into=into, **SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            generate(settings, stopping_after(6))
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / into).rglob("[!.]*") if path.is_file()}
        with pytest.raises(UnfinishedError, match=r"2 blocks of a run with other settings.*delete .*units"):
            generate(dataclasses.replace(settings, seed=1))
        told: list[tuple[int, int]] = []
        rows = generate(settings, lambda *step, told=told: told.append(step))
        assert told[0] == (6, 20), "two blocks of three or four networks were there"
        assert [row | {"path": ""} for row in rows] == [row | {"path": ""} for row in whole]
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.exists())
        assert not (tmp_path / into / "units").exists()
        assert same_weights(tmp_path / into, tmp_path / "whole" / into)


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
    told: list[tuple[int, int]] = []
    generate(settings, lambda *step: told.append(step))
    assert told[0][0] < 12
    assert told[-1][0] == 20
    assert same_weights(tmp_path / "out", tmp_path / "whole")


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
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    settings = config(zoo_corpus, str(mine), tmp_path / "out", into="corpus", **SETTINGS)
    rows = generate(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert generate(dataclasses.replace(settings, where="ray", num_actors=2)) == rows, "nothing is left to do for Ray"
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
    told = {"name": "tests.generation.test_write:WithNorm", "width": 5}
    settings = dataclasses.replace(settings, instruction="Is it?", data=str(tmp_path / "mine.npz"), networks=[told])
    with pytest.warns(UnknownLayoutWarning):
        rows = generate(settings)
    assert all("test_accuracy" not in row and not row["known"] for row in rows)
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.numpy(), y=1 - task.labels_S.numpy())
    with pytest.raises(CorpusError, match="another recipe"):
        generate(settings)  # The same samples with other labels are another task.
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tasks["custom"].instruction == "Is it?"
    assert torch.equal(corpus.tasks["custom"].samples_SF, task.samples_SF)
    for facts, state in corpus.checkpoints():
        WithNorm(5).load_state_dict(state, strict=True)
        assert math.isnan(facts["test_accuracy"])


def test_networks_that_are_not_finite_are_set_aside(zoo_corpus: Corpus, tmp_path: Path) -> None:
    job = job_of(zoo_corpus)
    blocks = plan_blocks(job, 1000)
    tasks = [dataclasses.replace(next(iter(zoo_corpus.tasks.values())), task_id=name) for name in job.names]
    keeper = CorpusKeeper(str(tmp_path), job, {}, tasks, "a test")
    for block, lost in zip(blocks, (1, 3), strict=True):
        values_RD = torch.zeros(3, job.networks[block.network].layout.num_values)
        values_RD[:lost, 4] = torch.nan
        facts = {"draw": 0, "instruction": "", "known": True, "example_loss": 1.0, "log_prob": None}
        rows = [{"task": name, "network": job.networks[block.network].name, **facts} for name in job.names]
        keeper.keep(Written(block=block, values_RD=values_RD, rows=rows))
    rows = keeper.finish(blocks, {})
    assert [row["task"] for row in rows] == ["b", "c"]
    assert all(row["log_prob"] is None for row in rows)
    corpus = Corpus.open(tmp_path)
    assert corpus.quarantine.num_rows == 4
    assert set(corpus.quarantine.column("reason").to_pylist()) == {"generated values are not finite"}


def test_no_finite_network_at_all_is_said(zoo_corpus: Corpus, tmp_path: Path) -> None:
    job = job_of(
        zoo_corpus, networks=[dataclasses.replace(next(iter(zoo_corpus.networks.values())), layout=layout_of())]
    )
    (block,) = plan_blocks(job, 1000)
    tasks = [dataclasses.replace(next(iter(zoo_corpus.tasks.values())), task_id=name) for name in job.names]
    keeper = CorpusKeeper(str(tmp_path), job, {}, tasks, "a test")
    facts = {"draw": 0, "instruction": "", "known": True, "example_loss": 1.0, "log_prob": None}
    rows = [{"task": name, "network": "n", **facts} for name in job.names]
    keeper.keep(Written(block=block, values_RD=torch.full((3, layout_of().num_values), torch.inf), rows=rows))
    with pytest.raises(CorpusError, match="no generated network is finite"):
        keeper.finish([block], {})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num": 0}, "num=0"),
        ({"num": 2, "temperature": 0.0}, "num=2 at temperature=0"),
        ({"where": "there"}, "here, ray"),
        ({"into": "zip"}, "files, corpus"),
        ({"out": "s3://bucket/networks"}, "into=corpus"),
        ({"threads": 0}, "threads=0"),
        ({"start_timeout": 0.0}, "start_timeout=0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GenerateConfig(**settings)
