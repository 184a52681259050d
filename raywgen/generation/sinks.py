"""Keeps generated networks as a corpus, and chooses the sink of a run.

Shape letters beyond the legend in `raywgen.weights`: N networks, P packed bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from typing import Any

import torch

from raywgen.corpus import CheckpointFacts, Corpus, CorpusError, Shard, commit_corpus, write_shard
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics
from raywgen.generation.adapter_sink import AdapterSink
from raywgen.generation.config import GenerateConfig, Into
from raywgen.generation.file_sink import FileSink
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkResult
from raywgen.generation.request import NO_TASK
from raywgen.generation.sink import Sink
from raywgen.generators.bundle import bundle_digest
from raywgen.generators.bundle_copies import bundle_folder

_UNKNOWN = float("nan")
_SPLITS = {"seen": "train"}
"""Splits of networks that have another name than the split of their task."""


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
                "linear": _number(row.linear),
                "against_chance": row.against_chance,
                "log_prob": _number(row.log_prob),
                "best_of": self.plan.request.best_of,
                "temperature": self.plan.temperature,
            },
        )


def make_sink(config: GenerateConfig, plan: GenerationPlan) -> Sink:
    """Builds the sink that `config.into` names."""
    sinks: dict[Into, type[Sink]] = {"files": FileSink, "adapters": AdapterSink, "corpus": CorpusSink}
    return sinks[config.into](config, plan, sink_recipe(config, plan))


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
    if plan.has_pieces:
        decisive["piece_values"] = config.piece_values
    if config.max_file_bytes:
        decisive["max_file_bytes"] = config.max_file_bytes
    if not config.try_on_samples:
        decisive["try_on_samples"] = False
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
            linear=_known(facts.get("linear")),
            test_accuracy=_known(facts.get("test_accuracy")),
        )
        for facts in corpus.facts.to_pylist()
    ]


def _number(value: float | None) -> float:
    return _UNKNOWN if value is None else value


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
