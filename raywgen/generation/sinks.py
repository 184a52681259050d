"""Where written networks go, block by block, so that an interrupted run goes on: files, or a corpus.

A block's networks are written first, then in one step its journal. Blocks with a journal are not written again; when
all have one, the folder gets its index, or the corpus its manifest, and the journals go.

Shape legend: N networks, P packed bytes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from raywgen.corpus import CheckpointFacts, Corpus, CorpusError, Shard, TaskFacts, commit_corpus, write_shard
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.statistics import LayoutStatistics
from raywgen.corpus.storage import Storage
from raywgen.corpus.writing import JOURNALS
from raywgen.files import write_text
from raywgen.generation.plan import Block, Job, Written, blank_network
from raywgen.generation.request import NO_TASK
from raywgen.sealed import SealError, file_checksum, sealed_json, unseal
from raywgen.weights import StateDict, save_state_dict

INDEX = "networks.json"
_UNKNOWN = float("nan")
_MEASURES = ("example_loss", "example_accuracy", "chance", "majority")
_SPLITS = {"seen": "train"}
"""Split of a network by that of its task; else they are the same."""


class UnfinishedError(ValueError):
    """A folder with networks of other settings, of which some are still to be written."""


class Keeper(ABC):
    """Takes written blocks.

    Args:
        out: Folder, a path or URI.
        job: What is written.
        recipe: All that decides it, as JSON has it.
    """

    def __init__(self, out: str, job: Job, recipe: dict[str, Any]) -> None:
        self.out, self.job, self.recipe = out, job, recipe
        self._storage = Storage.at(out)
        self._digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        self._states: tuple[int, Callable[[torch.Tensor], StateDict]] | None = None

    def left(self, blocks: list[Block]) -> list[Block]:
        """The blocks that no earlier run has written.

        Raises:
            UnfinishedError: One with other settings was interrupted.
        """
        kept = set(self._storage.list(JOURNALS))
        if strange := [name for name in kept if not name.startswith(f"{self._digest}-")]:
            raise UnfinishedError(
                f"{self.out} holds {len(strange)} blocks of a run with other settings that was interrupted; give those "
                f"settings to go on, another folder, or delete {self.out}/{JOURNALS} to start anew"
            )
        return [
            block for block in blocks if self._journal(block).rpartition("/")[2] not in kept or not self._is_done(block)
        ]

    def _is_done(self, block: Block) -> bool:
        """Whether a block's journal and the files that it names are whole; else the block is written again."""
        try:
            files = unseal(self._storage.read(self._journal(block)))["files"]
            return all(self._storage.sha256(name) == expected for name, expected in files.items())
        except (SealError, KeyError, CorpusError):
            return False

    def keep(self, written: Written) -> None:
        """Writes a block, then that it is there.

        Raises:
            CorpusError, WeightsError: The disk is full or the folder cannot be written.
        """
        content = self._keep(written)
        self._storage.write(self._journal(written.block), sealed_json(content).encode())

    def finish(self, blocks: list[Block], config: dict[str, Any]) -> list[dict[str, Any]]:
        """Makes one of all blocks; one row for each network.

        Raises:
            CorpusError, WeightsError: The folder cannot be written, or nothing in it is finite.
        """
        rows = self._finish([unseal(self._storage.read(self._journal(block))) for block in blocks], config)
        self._storage.delete(JOURNALS)
        return rows

    def _journal(self, block: Block) -> str:
        return f"{JOURNALS}/{self._digest}-{block.index:06d}.json"

    def _state(self, block: Block, values_D: torch.Tensor) -> StateDict:
        """The `state_dict` of a flat vector; what no generator writes is that of a fresh or of a stored network."""
        if self._states is None or self._states[0] != block.network:
            network = self.job.networks[block.network]
            fresh = blank_network(network, self.job.seed).state_dict()
            counters = self.job.kept.get(network.layout.id, {}) | fresh
            self._states = block.network, lambda values: network.layout.unflatten(values, counters)
        return self._states[1](values_D)

    @abstractmethod
    def _keep(self, written: Written) -> dict[str, Any]:
        """Writes a block; what its journal is to hold: `files` are the checksums of what was written, by name."""

    @abstractmethod
    def _finish(self, journals: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
        """From the journals of all blocks, in order."""


class FileKeeper(Keeper):
    """One `.safetensors` file a network, and an index."""

    def _keep(self, written: Written) -> dict[str, Any]:
        rows, files = [], {}
        for row, values_D in zip(written.rows, written.values_RD, strict=True):
            parts = [str(row[name]).replace("/", "_").replace("\0", "_") for name in ("network", "task")]
            if self.job.num > 1:
                parts.append(f"{row['draw']:0{len(str(self.job.num - 1))}d}")
            name = "_".join(part for part in parts if part)
            path = str(Path(self.out) / f"{name}.safetensors")
            metadata = {key: str(value) for key, value in row.items()}
            save_state_dict(self._state(written.block, values_D), path, metadata)
            rows.append({"path": path, **row})
            files[f"{name}.safetensors"] = file_checksum(path)
        return {"rows": rows, "files": files}

    def _finish(self, journals: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
        rows = [row for journal in journals for row in journal["rows"]]
        write_text(Path(self.out) / INDEX, json.dumps(rows, indent=1))
        return rows


class CorpusKeeper(Keeper):
    """One shard a block; a network that is not finite is set aside.

    Args:
        out: As for all.
        job: As for all.
        recipe: As for all.
        tasks: What the networks are for; none where no task is known.
        source: Where they come from, in words.
    """

    def __init__(self, out: str, job: Job, recipe: dict[str, Any], tasks: list[TaskFacts], source: str) -> None:
        super().__init__(out, job, recipe)
        self._tasks = {task.task_id: task for task in tasks}
        self._source = source

    def existing(self) -> Corpus | None:
        """The corpus of these settings, where it is there already.

        Raises:
            CorpusError: There is one of others.
        """
        if self._storage.size(MANIFEST) is None:
            return None
        corpus = Corpus.open(self.out)
        if corpus.manifest["recipe"].get("generated") != self.recipe:
            raise CorpusError(
                f"{self.out} already holds a corpus of another recipe; give another folder, or delete this one"
            )
        return corpus

    def _keep(self, written: Written) -> dict[str, Any]:
        layout = self.job.networks[written.block.network].layout
        facts = [self._facts(row, layout.id) for row in written.rows]
        finite_N = written.values_RD.isfinite().all(dim=1)
        kept = finite_N.nonzero().flatten().tolist()
        lost = [facts[n].checkpoint_id for n in (~finite_N).nonzero().flatten().tolist()]
        journal: dict[str, Any] = {"lost": lost, "layout_id": layout.id, "shard": None, "files": {}}
        if kept:
            packed_NP = torch.stack([layout.pack(self._state(written.block, written.values_RD[n])) for n in kept])
            name = f"{self._digest}-{written.block.index:06d}"
            shard = write_shard(self.out, name, layout, [facts[n] for n in kept], packed_NP, is_finite=True)
            statistics = LayoutStatistics.measure(layout, packed_NP)
            journal |= {"shard": asdict(shard), "statistics": statistics.to_json(), "files": {shard.path: shard.sha256}}
        return journal

    def _finish(self, journals: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
        if all(journal["shard"] is None for journal in journals):
            raise CorpusError(f"{self.out}: no generated network is finite; train the generator longer, or anew")
        statistics: dict[str, LayoutStatistics] = {}
        for journal in journals:
            if journal["shard"] is not None:
                sums, key = LayoutStatistics.from_json(journal["statistics"]), journal["layout_id"]
                statistics[key] = statistics[key] + sums if key in statistics else sums
        corpus = commit_corpus(
            self.out,
            shards=[Shard(**journal["shard"]) for journal in journals if journal["shard"] is not None],
            tasks=list(self._tasks.values()),
            networks=self.job.networks,
            recipe={"generated": self.recipe, "config": config},
            quarantine=[
                {"checkpoint_id": name, "file": "", "reason": "generated values are not finite"}
                for journal in journals
                for name in journal["lost"]
            ],
            statistics=statistics,
        )
        return rows_of(corpus)

    def _facts(self, row: dict[str, Any], layout_id: str) -> CheckpointFacts:
        task = self._tasks.get(row["task"])
        name = "/".join(str(part) for part in (row["network"], row["task"], row["draw"]) if part != NO_TASK)
        log_prob = row["log_prob"]
        return CheckpointFacts(
            checkpoint_id=name,
            trajectory_id=name,
            task_id=None if task is None else task.task_id,
            layout_id=layout_id,
            step=0,
            split="train" if task is None else _SPLITS.get(task.split, task.split),
            start="generated",
            base_id=None,
            start_seed=self.job.seed,
            order_seed=-1,
            optimizer="none",
            learning_rate=0.0,
            train_loss=_UNKNOWN,
            test_accuracy=row.get("test_accuracy", _UNKNOWN),
            source=self._source,
            licence="unknown",
            architecture=row["network"],
            more={
                "draw": row["draw"],
                "instruction": row["instruction"],
                "known": row["known"],
                **{name: row.get(name, _UNKNOWN) for name in _MEASURES},
                "against_chance": row.get("against_chance", ""),
                "log_prob": _UNKNOWN if log_prob is None else log_prob,
                "best_of": self.job.best_of,
                "temperature": self.job.temperature,
            },
        )


def rows_of(corpus: Corpus) -> list[dict[str, Any]]:
    """What a corpus of generated networks says of each."""
    rows = []
    for facts in corpus.facts.to_pylist():
        row = {name: facts[name] for name in ("checkpoint_id", "draw", "instruction", "known")}
        row |= {"task": facts["task_id"] or NO_TASK, "network": facts["architecture"]}
        row["log_prob"] = None if facts["log_prob"] != facts["log_prob"] else facts["log_prob"]
        measured = ((name, facts.get(name)) for name in (*_MEASURES, "test_accuracy"))
        row |= {name: value for name, value in measured if value is not None and value == value}
        if verdict := facts.get("against_chance"):
            row["against_chance"] = verdict
        rows.append(row)
    return rows
