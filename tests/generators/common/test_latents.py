"""Mc-Di over the latents of a tokeniser: what it encodes, trains in which order, and writes.

Shape legend: B networks, k local targets, D values, M chunks, K values of a chunk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.generators import GenerationRequest, OptimizerConfig
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.common.denoisers import LatentWeights, build_denoiser
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import Tokenizer, TokenizerStage, VQVAEConfig
from raywgen.generators.mcdi import McDi
from raywgen.generators.mcdi.config import Meta
from raywgen.generators.mcdi.stages import DenoiserStage, McDiTaskLossStage
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights.chunks import to_chunks
from tests.builders import DEEP, SMALL, layout_of, noise_for, normalizers, train
from tests.generators.mcdi.builders import DATA, chunk_batch, config, mcdi, support_and_query

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = VQVAEConfig(
    chunk_length=12,
    quantiser=QuantiserConfig(num_levels=2, num_codes=8),
    width=16,
    num_steps=5,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=0),
)


def generator_of(task_loss: dict | None = None, *, is_trained: bool = True) -> McDi:
    settings = replace(config(network={"kind": "latents"}, task_loss=task_loss), tokenizer=TOKENIZER)
    generator = mcdi(settings, table=normalizers(SMALL, DEEP))
    assert generator.tokenizer is not None
    if is_trained:
        # The tokeniser begins at the identity, where a mistake in its use would not show.
        with torch.no_grad():
            for parameter in generator.tokenizer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return generator


def test_states_are_the_latents_of_every_target() -> None:
    generator, batch = generator_of(), chunk_batch(4)
    (layout, normalizer), tokenizer = generator.normalizers[batch.layout.id], generator.tokenizer
    assert isinstance(generator.denoiser, LatentWeights)
    assert tokenizer is not None
    assert batch.targets_BAD is not None
    states = generator.denoiser.encode(normalizer.normalise(batch.targets_BAD), batch.condition, layout)
    for i in range(batch.targets_BAD.shape[1]):
        chunks_BMK = tokenizer.chunks(batch.targets_BAD[:, i], layout, normalizer)
        wanted_BMK = tokenizer.latents(chunks_BMK, tokenizer.positions(layout))
        torch.testing.assert_close(to_chunks(states[:, i], 12), wanted_BMK)
    assert states.shape[-1] == generator.denoiser.num_states(layout) == 48  # 38 values in 4 chunks of 12
    written = generator.denoiser.decode(states[:, 0], batch.condition, layout)
    wanted = tokenizer.decode_latents(to_chunks(states[:, 0], 12), tokenizer.positions(layout))
    torch.testing.assert_close(written, wanted.flatten(1)[:, :38])


def test_an_untrained_tokeniser_changes_nothing() -> None:
    generator, batch = generator_of(is_trained=False), chunk_batch(4)
    torch.testing.assert_close(generator.reconstruct(batch.values_BD, batch.layout), batch.values_BD)


def test_the_tokeniser_is_trained_first_and_by_no_later_stage() -> None:
    generator = generator_of({"num_steps": 1})
    stages = generator.stages()
    assert [type(stage) for stage in stages] == [TokenizerStage, DenoiserStage, McDiTaskLossStage]
    assert generator.tokenizer is not None
    of_tokenizer = {id(parameter) for parameter in generator.tokenizer.parameters()}
    assert {id(parameter) for parameter in stages[0].parameters()} == of_tokenizer
    for stage in stages[1:]:
        assert not of_tokenizer & {id(parameter) for parameter in stage.parameters()}


@pytest.mark.parametrize("meta", ["reptile", "joint"])
def test_both_ways_of_training_learn_latents(meta: Meta) -> None:
    generator = generator_of(is_trained=False)
    generator.config.denoiser.meta = meta
    tokenizer_stage, stage = generator.stages()
    batches = [chunk_batch(8, step) for step in range(40)]
    tokenizer_stage.setup(batches[:4], 0)
    train(tokenizer_stage, batches[:5])
    stage.setup(batches[:1], 0)
    held = chunk_batch(32, seed=77)

    @torch.no_grad()
    def consistency() -> float:
        return float(stage.eval()(held, noise_for(32)).metrics["consistency"])

    before = consistency()
    train(stage, batches, learning_rate=2e-2)
    # These weights follow from nothing that is shown; what can be learned is where they lie.
    assert consistency() < 0.8 * before


def test_a_bundle_writes_bit_equal_networks(tmp_path: Path) -> None:
    generator, cond, layout = generator_of(), support_and_query(3, 2, seed=0)[0], layout_of(DEEP)
    save_bundle(generator, tmp_path, {"seed": 3})
    loaded = load_bundle(tmp_path)
    assert isinstance(loaded, McDi)
    assert loaded.config.tokenizer == TOKENIZER
    before, after = (
        each.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3))).values_BD
        for each in (generator, loaded)
    )
    assert torch.equal(before, after)
    assert before.shape == (3, layout.num_values)


def test_latents_need_a_tokeniser() -> None:
    with pytest.raises(ValueError, match="kind=latents: only mcdi has a tokeniser"):
        build_denoiser(NetworkConfig(kind="latents"), normalizers(SMALL), DATA)
    denoiser = build_denoiser(NetworkConfig(kind="latents"), normalizers(SMALL), DATA, Tokenizer(TOKENIZER))
    assert isinstance(denoiser, LatentWeights)
