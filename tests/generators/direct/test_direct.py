from __future__ import annotations

import pytest
import torch

from raywgen.generators import GenerationRequest, OptimizerConfig, StageConfig
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.direct import Direct, DirectConfig, RegressionStage
from raywgen.generators.igpg import SamplingConfig
from raywgen.generators.settings import SamplingError
from raywgen.training.engine import LocalEngine
from raywgen.weights import KeyedNoise
from tests.builders import DATA, SMALL, layout_of, normalizers, weight_batch

NETWORK = NetworkConfig(width=32, num_heads=2, num_layers=1)
OFF = StageConfig(num_steps=0)
ON = StageConfig(num_steps=60, optimizer=OptimizerConfig(weight_decay=0.0, warmup_steps=1))


def direct(regression: StageConfig = ON, task_loss: StageConfig = OFF) -> Direct:
    torch.manual_seed(0)
    return Direct(DirectConfig(network=NETWORK, regression=regression, task_loss=task_loss), normalizers(SMALL), DATA)


def trained(generator: Direct, rate: float, num_steps: int) -> list[dict[str, torch.Tensor]]:
    (stage,) = generator.stages()
    batch = weight_batch(SMALL)
    stage.setup([batch], 0)
    engine = LocalEngine(stage)
    return [engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), rate) for _ in range(num_steps)]


def test_only_stages_that_are_switched_on_are_trained() -> None:
    assert [stage.name for stage in direct(ON, ON).stages()] == ["regression", "task_loss"]
    assert [stage.name for stage in direct(OFF, ON).stages()] == ["task_loss"]


def test_regression_is_the_mean_squared_error_in_units_of_the_scale() -> None:
    generator, batch = direct(), weight_batch(SMALL)
    (stage,) = generator.stages()
    assert isinstance(stage, RegressionStage)
    noise = KeyedNoise(0, batch.sample_index_B)
    loss = stage(batch, noise).loss
    written_BD = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise)
    ).values_BD
    scale_D = generator.normalizers[batch.layout.id][1].scale_D
    expected = ((written_BD - batch.values_BD) / scale_D).square().mean()
    torch.testing.assert_close(loss, expected)


def test_regression_comes_near_the_stored_weights() -> None:
    losses = [float(row["loss"]) for row in trained(direct(), 3e-3, 60)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_task_loss_stage_raises_accuracy_on_the_task() -> None:
    rows = trained(direct(OFF, ON), 3e-3, 60)
    assert float(rows[-1]["accuracy"]) > max(0.75, float(rows[0]["accuracy"]))


def test_the_same_support_set_gives_the_same_network_whatever_noise_and_temperature() -> None:
    generator, batch = direct(), weight_batch(SMALL)
    written = [
        generator.generate(
            GenerationRequest(
                condition=batch.condition,
                layout=layout_of(),
                noise=KeyedNoise(seed, batch.sample_index_B),
                temperature=temperature,
            )
        ).values_BD
        for seed, temperature in ((0, 0.0), (1, 1.0))
    ]
    assert torch.equal(*written)


def test_sampling_of_another_method_is_refused() -> None:
    batch = weight_batch(SMALL)
    request = GenerationRequest(
        condition=batch.condition,
        layout=layout_of(),
        noise=KeyedNoise(0, batch.sample_index_B),
        sampling=SamplingConfig(top_k=1),
    )
    with pytest.raises(SamplingError, match="method 'direct' takes Sampling, not SamplingConfig"):
        direct().generate(request)
