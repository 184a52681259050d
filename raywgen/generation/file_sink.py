"""Keeps generated networks as files: whole ones at once, large ones piece by piece.

Shape letters beyond the legend in `raywgen.weights`: X values of a piece.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from raywgen.config import to_yaml
from raywgen.corpus.writing import JOURNALS
from raywgen.generation.config import GenerateConfig
from raywgen.generation.network_files import NetworkFile, NetworkFiles
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkItem, WorkResult
from raywgen.generation.sink import Sink
from raywgen.locations import joined
from raywgen.sealed import file_checksum, sealed_json, unseal
from raywgen.weights import WeightsError, save_state_dict
from raywgen.weights.safetensors_writer import safetensors_bytes

CONFIG = "config.yaml"
INDEX = "networks.json"


class FileSink(Sink):
    """Writes one `.safetensors` file a network (or several with an index), an index, and the settings.

    The pieces of a network have a journal each. When all are there, its files get their names, and a further journal
    names these.
    """

    def __init__(self, config: GenerateConfig, plan: GenerationPlan, recipe: dict[str, Any]) -> None:
        super().__init__(config, plan, recipe)
        self._files = NetworkFiles(self._storage, JOURNALS, self._digest, config.max_file_bytes)
        self._done: set[int] = set()
        self._are_complete: dict[str, bool] = {}

    def pending(self) -> list[WorkItem]:
        """Returns the work items that no earlier run has done; those of finished networks are done."""
        pending = super().pending()
        self._done = {item.index for item in self.plan.items} - {item.index for item in pending}
        return pending

    def write(self, result: WorkResult) -> None:
        """Writes the networks of an item, or their piece, then its journal; with the last piece the files are named."""
        super().write(result)
        self._done.add(result.item.index)
        if result.item.piece is not None and self._done.issuperset(self._pieces(result.item)):
            self._complete(result.item)

    def kept(self, index: int) -> dict[str, torch.Tensor]:
        """Returns the tensors that an item kept for others."""
        return load_tensors(self._storage.read(self._kept_name(index)))

    def _is_done(self, item: WorkItem) -> bool:
        if item.piece is None:
            return super()._is_done(item)
        if self._is_complete(item):
            return True
        if not super()._is_done(item):
            return False
        return self._holds(item, unseal(self._storage.read(self._journal(item))))

    def _is_complete(self, item: WorkItem) -> bool:
        """Whether the networks that an item is a piece of have their files; these are read once in a run."""
        journal = self._networks_journal(item)
        if journal not in self._are_complete:
            self._are_complete[journal] = self._are_intact(journal)
        return self._are_complete[journal]

    def _holds(self, item: WorkItem, journal: dict[str, Any]) -> bool:
        """Whether unfinished files hold the values of a piece that its journal tells of."""
        assert item.piece is not None
        numbers, rows = range(item.start, item.stop), [NetworkRow(**row) for row in journal["rows"]]
        return all(
            self._files.holds(self._network_file(item, number, row), item.piece.start, item.piece.stop, checksum)
            for number, row, checksum in zip(numbers, rows, journal["values"], strict=True)
        )

    def _write(self, result: WorkResult) -> dict[str, Any]:
        item = result.item
        if item.piece is not None:
            return self._write_piece(result, item.piece.start)
        rows, files = [], {}
        are_several = self._files.are_several(self._layout(item))
        for number, row, values_D in zip(range(item.start, item.stop), result.rows, result.values_RD, strict=True):
            if are_several:
                network = self._network_file(item, number, row)
                self._files.write(network, 0, values_D)
                file, written = self._files.finish(network, self._kept_state(item), file_metadata(row))
            else:
                file = f"{self._name(row)}.safetensors"
                with self._storage.local_file(file) as path:
                    save_state_dict(self._state(item, values_D), path, file_metadata(row))
                    written = {file: file_checksum(path)}
            files |= written
            rows.append(replace(row, path=joined(self.out, file)).to_json())
        return {"rows": rows, "files": files}

    def _write_piece(self, result: WorkResult, start: int) -> dict[str, Any]:
        item, files = result.item, {}
        if result.kept:
            name = self._kept_name(item.index)
            files[name] = self._storage.write(name, safetensors_bytes(dict(result.kept), {}))
        numbers = range(item.start, item.stop)
        values = [
            self._files.write(self._network_file(item, number, row), start, values_X)
            for number, row, values_X in zip(numbers, result.rows, result.values_RD, strict=True)
        ]
        return {"rows": [asdict(row) for row in result.rows], "files": files, "values": values}

    def _complete(self, item: WorkItem) -> None:
        """Gives the files of networks whose pieces are all there their names.

        Raises:
            WeightsError: The files do not hold what was written to them; the next run writes it again.
        """
        items = [self.plan.items[index] for index in self._pieces(item)]
        pieces = [unseal(self._storage.read(self._journal(each))) for each in items]
        if not all(self._holds(each, piece) for each, piece in zip(items, pieces, strict=True)):
            raise WeightsError(
                f"{self.out}: the unfinished file of a network was changed or removed while it was written; run the "
                "same command again, which writes what is missing"
            )
        rows, files = [], {}
        for place, number in enumerate(range(item.start, item.stop)):
            shares = [NetworkRow(**piece["rows"][place]) for piece in pieces]
            row = replace(shares[-1], log_prob=_sum([share.log_prob for share in shares]))
            network = self._network_file(item, number, row)
            file, written = self._files.finish(network, self._kept_state(item), file_metadata(row))
            files |= written
            rows.append(replace(row, path=joined(self.out, file)).to_json())
        self._storage.write(self._networks_journal(item), sealed_json({"rows": rows, "files": files}).encode())
        self._are_complete[self._networks_journal(item)] = True

    def _finish(self, journals: list[dict[str, Any]]) -> list[NetworkRow]:
        rows = []
        for item, journal in zip(self.plan.items, journals, strict=True):
            if item.piece is None:
                rows += journal["rows"]
            elif item.index == self._pieces(item)[-1]:
                if not self._is_complete(item):
                    self._complete(item)
                rows += unseal(self._storage.read(self._networks_journal(item)))["rows"]
        self._storage.write(INDEX, json.dumps(rows, indent=1).encode())
        self._storage.write(CONFIG, to_yaml(self.config).encode())
        self._files.clear()
        return [NetworkRow(**row) for row in rows]

    def _pieces(self, item: WorkItem) -> range:
        """Returns the indices of the items that are pieces of the same networks."""
        assert item.piece is not None
        first = item.index - item.piece.index
        last = first
        while last + 1 < len(self.plan.items) and self.plan.items[last + 1].networks == item.networks:
            last += 1
        return range(first, last + 1)

    def _networks_journal(self, item: WorkItem) -> str:
        return f"{JOURNALS}/{self._digest}-{self._pieces(item)[0]:06d}-networks.json"

    def _kept_name(self, index: int) -> str:
        return f"{JOURNALS}/{self._digest}-{index:06d}.kept"

    def _network_file(self, item: WorkItem, number: int, row: NetworkRow) -> NetworkFile:
        key = f"{item.network:04d}-{number:06d}"
        return NetworkFile(name=self._name(row), key=key, layout=self._layout(item), metadata=file_metadata(row))

    def _name(self, row: NetworkRow) -> str:
        parts = [name.replace("/", "_").replace("\0", "_") for name in (row.network, row.task)]
        if self.plan.num > 1:
            parts.append(f"{row.draw:0{len(str(self.plan.num - 1))}d}")
        return "_".join(part for part in parts if part)


def file_metadata(row: NetworkRow) -> dict[str, str]:
    """Returns the facts of a network as its file's metadata."""
    return {key: str(value) for key, value in replace(row, path="").to_json().items()}


def _sum(shares: list[float | None]) -> float | None:
    """Returns the log-probability of a network, in single precision like that of a whole one, from its pieces."""
    known = [share for share in shares if share is not None]
    return float(torch.tensor(sum(known)).float()) if known else None
