"""Plans a run before anything of it runs: sizes, memory, strategy, time and price."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from raywgen.nn.memory import gib
from raywgen.training.config import TrainConfig
from raywgen.training.early import check_batches
from raywgen.training.plan.config import PlanConfig
from raywgen.training.plan.corpus import PlannedCorpus, planned_corpus
from raywgen.training.plan.hours import Hours, planned_hours
from raywgen.training.plan.nodes import PlannedNodes, planned_nodes
from raywgen.training.plan.shapes import GeneratorShape, StageShape, generator_shape
from raywgen.training.plan.worker_bytes import Choice, WorkerBytes, checkpoint_bytes, worker_bytes
from raywgen.training.ray_source import store_bytes
from raywgen.training.strategy import StrategyError, allowed_choices, choose_strategy

_MOST_WORKERS = 4096


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """The plan of one stage.

    Attributes:
        shape: Its sizes.
        choice: How it is trained.
        reason: Why, under `strategy=auto`.
        bytes: What each worker takes.
        memory: Bytes that each worker has of its device; None where that is not known.
        refusal: Why it does not fit, with the nearest settings that do; empty where it fits.
    """

    shape: StageShape
    choice: Choice
    reason: str
    bytes: WorkerBytes
    memory: int | None
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        config: The run.
        corpus: Its corpus.
        nodes: The nodes that it is planned for.
        generator: Its generator.
        stages: Its stages.
        checkpoint_bytes: Bytes of the largest checkpoint.
        object_bytes: Bytes of the object store that batches may take; 0 where workers map the corpus.
        hours: Its time and price; None where no time of a step is known.
    """

    config: TrainConfig
    corpus: PlannedCorpus
    nodes: PlannedNodes
    generator: GeneratorShape
    stages: list[PlannedStage]
    checkpoint_bytes: int
    object_bytes: int
    hours: Hours | None

    @property
    def refusals(self) -> list[str]:
        """The reasons why the run cannot be trained on these nodes; none where it can."""
        wanted = self.config.min_workers
        device, num_reading = self.config.device, 0 if _reads_through_ray(self.config) else 1
        slots = self.nodes.num_slots(device, num_reading)
        found = [stage.refusal for stage in self.stages if stage.refusal]
        if wanted > slots:
            kind = "GPUs" if device == "cuda" else "CPUs, one of which reads the corpus," if num_reading else "CPUs"
            room = f"give num_workers={slots}, or more nodes" if slots else "give gpus_per_node, or device=cpu"
            found.insert(0, f"num_workers={wanted} is more than the {kind} of {self.nodes.describe()}: {room}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as a JSON object."""
        return {
            "method": self.config.method,
            "fits": not self.refusals,
            "refusals": self.refusals,
            "parameters": self.generator.num_parameters,
            "stages": [_stage_json(stage) for stage in self.stages],
            "corpus": {
                "name": self.corpus.name,
                "networks": self.corpus.num_networks,
                "bytes": self.corpus.num_bytes,
                "values_of_largest": self.corpus.largest.num_values,
            },
            "checkpoint_bytes": self.checkpoint_bytes,
            "bundle_bytes": 4 * self.generator.num_parameters + self.generator.buffer_bytes,
            "nodes": [asdict(node) for node in self.nodes.nodes],
            "object_store_bytes": sum(node.object_bytes for node in self.nodes.nodes),
            "object_store_used_bytes": self.object_bytes,
            "hours": None if self.hours is None else asdict(self.hours),
            "tokens_of_largest": None if self.generator.tokens is None else asdict(self.generator.tokens),
            "assumptions": list(self.assumptions()),
        }

    def assumptions(self) -> Iterator[str]:
        """Yields what the plan rests on, one sentence each."""
        yield from self.corpus.assumptions
        for stage in self.stages:
            if stage.shape.guess:
                yield (
                    f"Activations of '{stage.shape.name}' are estimated from below, as its step depends on values "
                    f"({stage.shape.guess})."
                )
            if stage.memory is None:
                yield "The memory of a worker is not known, so whether it suffices is not said."
                break
        if len(self.corpus.layouts) > 1:
            yield f"Steps are those of the largest of {len(self.corpus.layouts)} architectures."


def make_plan(config: TrainConfig, plan: PlanConfig) -> Plan:
    """Plans a run; nothing of the size of the generator or of a network is held, and nothing is written.

    Raises:
        ConfigError: There are more workers than a batch has networks, or the run cannot be measured.
        CorpusError: There is neither a corpus nor a manifest nor a `layout`.
    """
    check_batches(config)
    corpus, nodes = planned_corpus(config, plan), planned_nodes(config, plan)
    config = _with_device(config, nodes)
    generator = generator_shape(config, corpus)
    memory = nodes.device_memory(config.device, config.min_workers)
    stages = [_planned_stage(stage, generator, config, memory) for stage in generator.stages]
    return Plan(
        config=config,
        corpus=corpus,
        nodes=nodes,
        generator=generator,
        stages=stages,
        checkpoint_bytes=max((checkpoint_bytes(generator, stage) for stage in generator.stages), default=0),
        object_bytes=_object_bytes(config, generator),
        hours=planned_hours(config, plan, generator, nodes),
    )


def _reads_through_ray(config: TrainConfig) -> bool:
    """Whether workers read the corpus through Ray Data, whose readers reserve no CPU."""
    is_remote = "://" in config.corpus and not config.corpus.startswith("file://")
    return bool(config.max_workers) and (config.source == "ray" or (config.source == "auto" and is_remote))


def _object_bytes(config: TrainConfig, generator: GeneratorShape) -> int:
    if not _reads_through_ray(config):
        return 0
    shares = (math.ceil(stage.sizes.batch_size / config.min_workers) * stage.batch_bytes for stage in generator.stages)
    return config.max_workers * max((store_bytes(share) for share in shares), default=0)


def _with_device(config: TrainConfig, nodes: PlannedNodes) -> TrainConfig:
    """Decides `device=auto` as a launch does: GPUs where each worker can have one."""
    if config.device != "auto":
        return config
    num_gpus = sum(node.gpus for node in nodes.nodes)
    return replace(config, device="cuda" if num_gpus >= max(1, config.min_workers) else "cpu")


def _planned_stage(
    shape: StageShape, generator: GeneratorShape, config: TrainConfig, memory: int | None
) -> PlannedStage:
    given = Choice(config.min_workers, config.zero_stage, config.offload, config.accumulate)
    choice, reason, refusal = given, "", ""
    if config.strategy == "auto" and memory is not None:
        try:
            most = 2 if config.compile else 3
            can_offload = config.device == "cuda"
            found = choose_strategy(
                shape.sizes, config.min_workers, memory, can_offload=can_offload, max_zero_stage=most
            )
            choice = Choice(config.min_workers, found.zero_stage, found.offload, found.accumulate)
            reason = found.reason
        except StrategyError as error:
            refusal = f"stage '{shape.name}': {error}"
    taken = worker_bytes(generator, shape, config, choice)
    if memory is not None and taken.device > memory and not refusal:
        refusal = (
            f"stage '{shape.name}' takes {gib(taken.device)} of a worker, which has {gib(memory)}, with "
            f"{choice.settings()}; {_nearest(shape, generator, config, memory)}"
        )
    return PlannedStage(shape=shape, choice=choice, reason=reason, bytes=taken, memory=memory, refusal=refusal)


def _nearest(shape: StageShape, generator: GeneratorShape, config: TrainConfig, memory: int) -> str:
    """Says which settings fit that differ least from those given: parts, then sharding, then more workers."""
    for choice in _nearby(shape, config):
        if worker_bytes(generator, shape, config, choice).device <= memory:
            return f"{choice.settings()} fits"
    remedies = ["a smaller generator"]
    if shape.whole_networks:
        remedies.append("smaller networks, as this stage runs whole ones")
    elif not config.activation_checkpointing:
        remedies.insert(0, "activation_checkpointing=true")
    return f"no number of workers and parts fits: give {', '.join(remedies)}, or devices with more memory"


def _nearby(shape: StageShape, config: TrainConfig) -> Iterator[Choice]:
    num_workers, batch_size = config.min_workers, shape.sizes.batch_size
    while num_workers <= min(_MOST_WORKERS, batch_size):
        most_parts = batch_size // max(1, num_workers)
        parts = [2**power for power in range(most_parts.bit_length())]
        choices = allowed_choices(num_workers, can_offload=config.device == "cuda", max_zero_stage=3)
        ordered = [choice for choice in choices if choice[0] >= config.zero_stage] or choices
        yield from (Choice(num_workers, *choice, accumulate) for choice in ordered for accumulate in parts)
        num_workers = max(1, num_workers) * 2


def _stage_json(stage: PlannedStage) -> dict[str, Any]:
    shape, sizes = stage.shape, stage.shape.sizes
    return {
        "name": shape.name,
        "parameters": sizes.num_parameters,
        "steps": shape.num_steps,
        "batch_size": sizes.batch_size,
        "networks_per_worker": math.ceil(sizes.batch_size / max(1, stage.choice.num_workers)),
        "whole_networks": shape.whole_networks,
        "values_per_step": shape.num_values,
        "tokens_per_step": shape.num_tokens,
        "strategy": stage.choice._asdict() | {"reason": stage.reason},
        "bytes": asdict(stage.bytes),
        "memory": stage.memory,
        "fits": not stage.refusal,
        "estimated_from_below": bool(shape.guess),
    }
