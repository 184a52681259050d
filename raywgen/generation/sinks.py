"""Sinks keep generated networks as files or as a corpus, one work item after another.

The networks of an item are written first, then in one step its journal. So an interrupted run goes on: items with a
journal are not done again. When all have one, the folder gets its index, or the corpus its manifest, and the journals
are deleted.

Shape letters beyond the legend in `raywgen.weights`: N networks, P packed bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from raywgen.config import to_yaml
from raywgen.corpus import CheckpointFacts, Corpus, CorpusError, Shard, commit_corpus, write_shard
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS
from raywgen.generation.config import GenerateConfig
from raywgen.generation.loading import bundle_folder
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkItem, WorkResult, fresh_module
from raywgen.generation.request import NO_TASK
from raywgen.generators.bundle import bundle_digest
from raywgen.locations import joined
from raywgen.sealed import SealError, file_checksum, sealed_json, unseal
from raywgen.weights import StateDict, save_state_dict

CONFIG = "config.yaml"
INDEX = "networks.json"
_UNKNOWN = float("nan")
_SPLITS = {"seen": "train"}
"""Splits of networks that have another name than the split of their task."""


class UnfinishedError(ValueError):
    """A folder holds networks of other settings, of which some are still to be generated."""


class Sink(ABC):
    """Takes the results of work items.

    Args:
        config: The settings; `config.out` is the folder.
        plan: The plan of generation.
        recipe: Everything that decides what is written, as `sink_recipe` returns it.
    """

    def __init__(self, config: GenerateConfig, plan: GenerationPlan, recipe: dict[str, Any]) -> None:
        self.config, self.plan, self.recipe, self.out = config, plan, recipe, config.out
        self._storage = CorpusStorage.at(config.out)
        self._digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        self._states: tuple[int, Callable[[torch.Tensor], StateDict]] | None = None

    def existing(self) -> list[NetworkRow] | None:
        """Returns the rows of a finished run that need not be repeated; None where networks are to be generated."""
        return None

    def pending(self) -> list[WorkItem]:
        """Returns the work items that no earlier run has done.

        Raises:
            UnfinishedError: A run with other settings was interrupted.
        """
        journals = set(self._storage.list(JOURNALS))
        if strange := [name for name in journals if not name.startswith(f"{self._digest}-")]:
            raise UnfinishedError(
                f"{self.out} holds {len(strange)} work items of a run with other settings that was interrupted; give "
                f"those settings to go on, another folder, or delete {self.out}/{JOURNALS} to start anew"
            )
        return [
            item
            for item in self.plan.items
            if self._journal(item).rpartition("/")[2] not in journals or not self._is_done(item)
        ]

    def write(self, result: WorkResult) -> None:
        """Writes the networks of an item, then its journal.

        Raises:
            CorpusError, WeightsError: The disk is full or the folder cannot be written.
        """
        content = self._write(result)
        self._storage.write(self._journal(result.item), sealed_json(content).encode())

    def finish(self) -> list[NetworkRow]:
        """Joins the results of all items and returns a row for each network.

        Raises:
            CorpusError, WeightsError: The folder cannot be written, or nothing in it is finite.
        """
        rows = self._finish([unseal(self._storage.read(self._journal(item))) for item in self.plan.items])
        self._storage.delete(JOURNALS)
        return rows

    def _journal(self, item: WorkItem) -> str:
        return f"{JOURNALS}/{self._digest}-{item.index:06d}.json"

    def _is_done(self, item: WorkItem) -> bool:
        """Whether an item's journal and the files that it names are intact; otherwise the item is done again."""
        try:
            files = unseal(self._storage.read(self._journal(item)))["files"]
            return all(self._storage.sha256(name) == expected for name, expected in files.items())
        except (SealError, KeyError, CorpusError):
            return False

    def _state(self, item: WorkItem, values_D: torch.Tensor) -> StateDict:
        """Returns a network's `state_dict`; tensors that no generator writes come from a fresh or a stored network."""
        if self._states is None or self._states[0] != item.network:
            network = self.plan.request.networks[item.network]
            fresh = fresh_module(network, self.plan.seed).state_dict()
            counters = self.plan.request.kept_tensors.get(network.layout.id, {}) | fresh
            self._states = item.network, lambda values: network.layout.unflatten(values, counters)
        return self._states[1](values_D)

    @abstractmethod
    def _write(self, result: WorkResult) -> dict[str, Any]:
        """Writes the networks of an item.

        Returns:
            The content of its journal, in which `files` are the checksums of what was written, by name.
        """

    @abstractmethod
    def _finish(self, journals: list[dict[str, Any]]) -> list[NetworkRow]:
        """Joins the journals of all items, in order, into the final result."""


class FileSink(Sink):
    """Writes one `.safetensors` file a network, an index, and the settings."""

    def _write(self, result: WorkResult) -> dict[str, Any]:
        rows, files = [], {}
        for row, values_D in zip(result.rows, result.values_RD, strict=True):
            parts = [name.replace("/", "_").replace("\0", "_") for name in (row.network, row.task)]
            if self.plan.num > 1:
                parts.append(f"{row.draw:0{len(str(self.plan.num - 1))}d}")
            name = "_".join(part for part in parts if part)
            file, metadata = f"{name}.safetensors", {key: str(value) for key, value in row.to_json().items()}
            with self._storage.local_file(file) as path:
                save_state_dict(self._state(result.item, values_D), path, metadata)
                files[file] = file_checksum(path)
            rows.append(replace(row, path=joined(self.out, file)).to_json())
        return {"rows": rows, "files": files}

    def _finish(self, journals: list[dict[str, Any]]) -> list[NetworkRow]:
        rows = [row for journal in journals for row in journal["rows"]]
        self._storage.write(INDEX, json.dumps(rows, indent=1).encode())
        self._storage.write(CONFIG, to_yaml(self.config).encode())
        return [NetworkRow(**row) for row in rows]


class CorpusSink(Sink):
    """Writes one shard an item; a network that is not finite is set aside."""

    def existing(self) -> list[NetworkRow] | None:
        """Returns the rows of the corpus of these settings; None where there is none.

        Raises:
            CorpusError: There is a corpus of other settings.
        """
        if self._storage.size(MANIFEST) is None:
            return None
        corpus = Corpus.open(self.out)
        if corpus.manifest["recipe"].get("generated") != self.recipe:
            raise CorpusError(
                f"{self.out} already holds a corpus of another recipe; give another folder, or delete this one"
            )
        return rows_of(corpus)

    def _write(self, result: WorkResult) -> dict[str, Any]:
        layout = self.plan.request.networks[result.item.network].layout
        facts = [self._facts(row, layout.id) for row in result.rows]
        finite_N = result.values_RD.isfinite().all(dim=1)
        kept = finite_N.nonzero().flatten().tolist()
        lost = [facts[n].checkpoint_id for n in (~finite_N).nonzero().flatten().tolist()]
        journal: dict[str, Any] = {"lost": lost, "layout_id": layout.id, "shard": None, "files": {}}
        if kept:
            packed_NP = torch.stack([layout.pack(self._state(result.item, result.values_RD[n])) for n in kept])
            name = f"{self._digest}-{result.item.index:06d}"
            shard = write_shard(self.out, name, layout, [facts[n] for n in kept], packed_NP, is_finite=True)
            statistics = LayoutStatistics.measure(layout, packed_NP)
            journal |= {"shard": asdict(shard), "statistics": statistics.to_json(), "files": {shard.path: shard.sha256}}
        return journal

    def _finish(self, journals: list[dict[str, Any]]) -> list[NetworkRow]:
        if all(journal["shard"] is None for journal in journals):
            raise CorpusError(f"{self.out}: no generated network is finite; train the generator longer, or anew")
        statistics: Statistics = {}
        for journal in journals:
            if journal["shard"] is not None:
                key = journal["layout_id"], journal["shard"]["facts"][0]["split"]
                add_statistics(statistics, key, LayoutStatistics.from_json(journal["statistics"]))
        corpus = commit_corpus(
            self.out,
            shards=[Shard(**journal["shard"]) for journal in journals if journal["shard"] is not None],
            tasks=self.plan.request.tasks,
            networks=self.plan.request.networks,
            recipe={"generated": self.recipe, "config": asdict(self.config)},
            quarantine=[
                {"checkpoint_id": name, "file": "", "reason": "generated values are not finite"}
                for journal in journals
                for name in journal["lost"]
            ],
            statistics=statistics,
        )
        return rows_of(corpus)

    def _facts(self, row: NetworkRow, layout_id: str) -> CheckpointFacts:
        task = next((task for task in self.plan.request.tasks if task.task_id == row.task), None)
        name = "/".join(str(part) for part in (row.network, row.task, row.draw) if part != NO_TASK)
        return CheckpointFacts(
            checkpoint_id=name,
            trajectory_id=name,
            task_id=None if task is None else task.task_id,
            layout_id=layout_id,
            step=0,
            split="train" if task is None else _SPLITS.get(task.split, task.split),
            start="generated",
            base_id=None,
            start_seed=self.plan.seed,
            order_seed=-1,
            optimizer="none",
            learning_rate=0.0,
            train_loss=_UNKNOWN,
            test_accuracy=_number(row.test_accuracy),
            source=f"raywgen generate by {self.config.generator}",
            licence="unknown",
            architecture=row.network,
            more={
                "draw": row.draw,
                "instruction": row.instruction,
                "known": row.known,
                "example_loss": _number(row.example_loss),
                "example_accuracy": _number(row.example_accuracy),
                "chance": _number(row.chance),
                "majority": _number(row.majority),
                "against_chance": row.against_chance,
                "log_prob": _number(row.log_prob),
                "best_of": self.plan.request.best_of,
                "temperature": self.plan.temperature,
            },
        )


def make_sink(config: GenerateConfig, plan: GenerationPlan) -> Sink:
    """Builds the sink that `config.into` names."""
    sink = CorpusSink if config.into == "corpus" else FileSink
    return sink(config, plan, sink_recipe(config, plan))


def sink_recipe(config: GenerateConfig, plan: GenerationPlan) -> dict[str, Any]:
    """Returns all settings that decide the content of the networks and their files, but not where or by whom."""
    request = plan.request
    recipes = [task.recipe for task in request.tasks]
    tasks = hashlib.sha256(json.dumps([request.task_ids, recipes, request.condition.instructions]).encode())
    for tensor in (request.condition.samples_BSF, request.condition.labels_BS):
        tasks.update(tensor.contiguous().numpy().data)
    decisive = {
        "generator": bundle_digest(bundle_folder(config.generator)),
        "networks": [[network.name, network.layout.id, network.recipe] for network in request.networks],
        "tasks": tasks.hexdigest()[:32],
        "sampling": asdict(plan.sampling),
        "best_of": request.best_of,
    }
    if config.device == "cuda":
        decisive["device"] = "cuda"  # Networks differ in rounding from those of a CPU.
    names = ("into", "num", "temperature", "seed", "batch_size", "threads", "num_unlabelled")
    return json.loads(json.dumps(decisive | {name: getattr(config, name) for name in names}))


def rows_of(corpus: Corpus) -> list[NetworkRow]:
    """Returns the row of each network of a generated corpus."""
    return [
        NetworkRow(
            task=facts["task_id"] or NO_TASK,
            draw=facts["draw"],
            instruction=facts["instruction"],
            network=facts["architecture"],
            known=facts["known"],
            checkpoint_id=facts["checkpoint_id"],
            against_chance=facts.get("against_chance") or "",
            log_prob=_known(facts["log_prob"]),
            example_loss=_known(facts.get("example_loss")),
            example_accuracy=_known(facts.get("example_accuracy")),
            chance=_known(facts.get("chance")),
            majority=_known(facts.get("majority")),
            test_accuracy=_known(facts.get("test_accuracy")),
        )
        for facts in corpus.facts.to_pylist()
    ]


def _number(value: float | None) -> float:
    return _UNKNOWN if value is None else value


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
