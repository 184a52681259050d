"""The base of sinks, which keep generated networks as files or as a corpus, one work item after another.

The networks of an item are written first, then in one step its journal. So an interrupted run goes on: items with a
journal are not done again. When all have one, the folder gets its index, or the corpus its manifest, and the journals
are deleted.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import torch

from raywgen.corpus import CorpusError
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS
from raywgen.generation.config import GenerateConfig
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkItem, WorkResult, kept_state
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.weights import Layout, StateDict


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
        self._kept: tuple[int, StateDict] | None = None

    def existing(self) -> list[NetworkRow] | None:
        """Returns the rows of a finished run that need not be repeated; None where networks are to be generated."""
        return None

    def pending(self) -> list[WorkItem]:
        """Returns the work items that no earlier run has done.

        Raises:
            UnfinishedError: A run with other settings was interrupted.
        """
        found = self._storage.list(JOURNALS)
        journals = {name for name in found if name.endswith(".json")}
        if strange := [name for name in journals if not name.startswith(f"{self._digest}-")]:
            raise UnfinishedError(
                f"{self.out} holds {len(strange)} work items of a run with other settings that was interrupted; give "
                f"those settings to go on, another folder, or delete {self.out}/{JOURNALS} to start anew"
            )
        for name in found:
            if not name.startswith(f"{self._digest}-"):
                self._storage.delete(f"{JOURNALS}/{name}")  # A piece that was written in part, and has no journal.
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
        return self._are_intact(self._journal(item))

    def _are_intact(self, journal: str) -> bool:
        """Whether a journal and the files that it names are intact."""
        try:
            files = unseal(self._storage.read(journal))["files"]
            return all(self._storage.sha256(name) == expected for name, expected in files.items())
        except (SealError, KeyError, CorpusError):
            return False

    def _state(self, item: WorkItem, values_D: torch.Tensor) -> StateDict:
        """Returns a network's `state_dict`; tensors that no generator writes come from a fresh or a stored network."""
        return self._layout(item).unflatten(values_D, self._kept_state(item))

    def _kept_state(self, item: WorkItem) -> StateDict:
        """Returns the tensors that no generator writes."""
        if self._kept is None or self._kept[0] != item.network:
            network = self.plan.request.networks[item.network]
            stored = self.plan.request.kept_tensors.get(network.layout.id, {})
            self._kept = item.network, kept_state(network, self.plan.seed, stored)
        return self._kept[1]

    def _layout(self, item: WorkItem) -> Layout:
        return self.plan.request.networks[item.network].layout

    def kept(self, index: int) -> dict[str, torch.Tensor]:
        """Returns the tensors that an item kept for others; whole networks keep none."""
        return {}

    @abstractmethod
    def _write(self, result: WorkResult) -> dict[str, Any]:
        """Writes the networks of an item.

        Returns:
            The content of its journal, in which `files` are the checksums of what was written, by name.
        """

    @abstractmethod
    def _finish(self, journals: list[dict[str, Any]]) -> list[NetworkRow]:
        """Joins the journals of all items, in order, into the final result."""
