"""Keeps generated adapters of a text encoder as folders that the PEFT library loads, each with its head beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raywgen.generation.config import GenerateConfig
from raywgen.generation.file_sink import FileSink, file_metadata
from raywgen.generation.plan import GenerationPlan, WorkResult
from raywgen.locations import joined
from raywgen.tasks.networks.text_adapter import HEAD, TextAdapters, is_text_adapter
from raywgen.weights.adapters import CONFIG, TENSORS, AdapterError, adapter_config, adapter_tensors
from raywgen.weights.safetensors_writer import safetensors_bytes


class AdapterSink(FileSink):
    """Writes a folder a network: the two files of an adapter, and `head.safetensors` where the network has a head.

    Raises:
        AdapterError: A network is no adapter of a text encoder.
    """

    def __init__(self, config: GenerateConfig, plan: GenerationPlan, recipe: dict[str, Any]) -> None:
        super().__init__(config, plan, recipe)
        for network in plan.request.networks:
            if not is_text_adapter(network.recipe):
                raise AdapterError(
                    f"into=adapters: network '{network.name}' is no adapter of a text encoder; leave into out, or "
                    "train on a zoo such as configs/zoo/sentence-lora.yaml"
                )
        self._adapters = [TextAdapters(network.recipe) for network in plan.request.networks]

    def _write(self, result: WorkResult) -> dict[str, Any]:
        adapters = self._adapters[result.item.network]
        rows, files = [], {}
        for row, values_D in zip(result.rows, result.values_RD, strict=True):
            adapter, head = adapters.split(self._state(result.item, values_D))
            folder, metadata = self._name(row), file_metadata(row)
            contents = {TENSORS: safetensors_bytes(adapter_tensors(adapter), metadata)}
            contents[CONFIG] = adapter_config(adapter).encode()
            if head:
                contents[HEAD] = safetensors_bytes(head, metadata)
            for name, content in contents.items():
                files[f"{folder}/{name}"] = self._storage.write(f"{folder}/{name}", content)
            rows.append(replace(row, path=joined(self.out, folder)).to_json())
        return {"rows": rows, "files": files}
