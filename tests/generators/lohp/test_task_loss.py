from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.generators import GenerationRequest
from raywgen.generators.common.writing import Rows
from raywgen.generators.lohp import LoHp
from raywgen.generators.lohp.following import follow
from raywgen.generators.lohp.stages import PolicyStage
from raywgen.generators.lohp.task_loss import LoHpTaskLossStage
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, stacked_logits
from raywgen.training.engine import LocalEngine
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import noise_for
from tests.generators.derivatives import check_derivative
from tests.generators.lohp.builders import TABLES, config, lohp
from tests.generators.mcdi.builders import chunk_batch, head_batch, repeated

pytestmark = pytest.mark.usefixtures("one_thread")


def generator_of(kind: str = "head", width: int = 16, policy: dict[str, Any] | None = None, **task_loss: Any) -> LoHp:
    settings = config(network={"kind": kind, "width": width}, policy=policy, task_loss={"num_steps": 1} | task_loss)
    return lohp(settings, table=TABLES[kind]())


def stage_of(generator: LoHp) -> LoHpTaskLossStage:
    return LoHpTaskLossStage(generator.config, generator.policy, generator.normalizers)


def batch_of(kind: str, num: int = 8, seed: int = 0) -> WeightBatch:
    batch = head_batch(num, seed) if kind == "head" else chunk_batch(num, seed)
    return replace(batch, condition=replace(batch.condition, policies=("adam",) * num))


def test_the_stage_is_the_last_one_and_may_be_left_out() -> None:
    assert [type(stage) for stage in generator_of().stages()] == [PolicyStage, LoHpTaskLossStage]
    assert [type(stage) for stage in generator_of(num_steps=0).stages()] == [PolicyStage]
    assert [type(stage) for stage in generator_of(policy={"num_steps": 0}).stages()] == [LoHpTaskLossStage]


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_raises_the_accuracy_of_what_is_written_from_nothing(kind: str, temperature: float) -> None:
    generator = generator_of(kind, policy={"num_steps": 0}, temperature=temperature, num_steps=60)
    # Whole networks of `chunk_batch` follow from nothing; they learn the task that all share alone.
    one = batch_of("chunks", 1)

    def drawn(num: int, seed: int) -> WeightBatch:
        return batch_of("head", num, seed) if kind == "head" else repeated(one, num, seed)

    stage, held = stage_of(generator), drawn(64, 77)
    stage.setup([drawn(16, step) for step in range(2)], seed=0)

    def judged() -> tuple[float, float]:
        with torch.no_grad():
            result = stage.eval()(held, KeyedNoise(1, held.sample_index_B))
        return float(result.loss), float(result.metrics["accuracy"])

    loss_before, accuracy_before = judged()
    engine = LocalEngine(stage.train())
    for step in range(60):
        batch = drawn(16, step)
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-2)
    loss, accuracy = judged()
    assert loss < 0.6 * loss_before
    # Chance is a half; heads begin at the means of their samples, and are right from the start.
    assert kind == "head" or accuracy_before < 0.65
    assert accuracy > 0.85


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_its_loss_is_that_of_the_networks_which_generate_writes(temperature: float) -> None:
    generator, batch = generator_of(temperature=temperature), batch_of("head")
    result = stage_of(generator)(batch, noise_for(8))
    request = GenerationRequest(
        condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=temperature
    )
    state_B = batch.layout.unflatten(generator.generate(request).values_BD)
    samples_BSF = torch.cat([batch.condition.samples_BSF, batch.query.samples_BSF], dim=1)
    labels_BS = torch.cat([batch.condition.labels_BS, batch.query.labels_BS], dim=1)
    logits_BSC = stacked_logits(batch.module, state_B, samples_BSF)
    torch.testing.assert_close(result.loss, balanced_cross_entropy(logits_BSC, labels_BS).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.metrics["accuracy"], balanced_accuracy(logits_BSC, labels_BS).mean())


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_the_loss_reaches_every_parameter_of_the_forward_policy(kind: str) -> None:
    generator = generator_of(kind)
    stage_of(generator)(batch_of(kind), noise_for(8)).loss.backward()
    for name, parameter in generator.policy.forward_net.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
    assert generator.policy.names_net.grad is not None
    assert bool(generator.policy.names_net.grad.abs().sum() > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_path_is_differentiable_by_finite_differences(temperature: float) -> None:
    generator, batch = generator_of(), batch_of("head", 4)
    policy = generator.policy

    def end() -> Tensor:
        embedded = policy.embed_forward_condition(batch.condition, batch.layout)
        rows = Rows(embedded, KeyedNoise(0, torch.arange(4)), None, batch.layout.num_values)
        return follow(policy, rows, batch.layout, 3, temperature).square().sum()

    end().backward()
    net: Any = policy.forward_net.net
    for parameter, index in ((net.row.weight, (2, 5)), (net.time.net[0].weight, (3, 1)), (net.direct.weight, (1, 2))):
        # Differences of a sum up to 1,000 carry 1e-13 / 1e-6 of rounding.
        check_derivative(end, parameter, index, rounding=1e-6)


def test_a_temperature_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature=-1.0: must be at least 0"):
        config(task_loss={"temperature": -1.0})


def test_it_needs_no_trajectories_where_it_is_the_only_stage() -> None:
    assert generator_of(policy={"num_steps": 0}).needs.num_targets == 0
    assert generator_of().needs.num_targets == 3
