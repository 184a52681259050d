"""The tokeniser with each of its coders: the start, windows, training, bundles.

Shape legend: B networks, M chunks, W chunks of a window, K values of a chunk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.config import load_config
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.common.tokenizer.windows import covering_blocks, random_windows
from raywgen.generators.igpg import IGPG
from raywgen.generators.igpg.likelihood import _seen_tokens
from raywgen.nn.coders import CODERS
from tests.builders import (
    DEEP,
    SMALL,
    condition,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    tokenizer_stage,
    train,
    values_of,
    weight_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, LENGTH, NUM = 3, 4, 5


def generator_of(coder: str, *, is_trained: bool = True) -> IGPG:
    """Ten chunks of four values in SMALL, eleven in DEEP: four blocks of three, the last one not whole."""
    config = igpg_config()
    sizes = replace(config.tokenizer, coder=coder, context=CONTEXT, chunk_length=LENGTH, width=32)
    generator = igpg(replace(config, tokenizer=sizes))
    if is_trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for part in (generator.tokenizer.encoder, generator.tokenizer.decoder):
                for parameter in part.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return generator


def chunks_of(generator: IGPG, widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    tokenizer, layout = generator.tokenizer, layout_of(widths)
    chunks_BMK = tokenizer.chunks(values_of(widths)[:NUM], layout, generator.normalizer(layout))
    return chunks_BMK, tokenizer.positions(layout), tokenizer.mask(layout)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("widths", [SMALL, DEEP])
def test_networks_coded_in_passes_have_the_same_tokens_and_values(
    coder: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, layout, values_BD = generator_of(coder), layout_of(widths), values_of(widths)[:NUM]
    whole_BML, decoded_BD = generator.tokens(values_BD, layout), generator.reconstruct(values_BD, layout)
    monkeypatch.setattr("raywgen.generators.common.tokenizer.tokenizer._CHUNKS_OF_A_PASS", 5 * NUM)
    seen: list[int] = []
    generator.tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert torch.equal(generator.tokens(values_BD, layout), whole_BML)
    torch.testing.assert_close(generator.reconstruct(values_BD, layout), decoded_BD, rtol=1e-5, atol=1e-6)
    assert len(seen) > 2
    assert max(seen) <= 5


@pytest.mark.parametrize("coder", CODERS)
def test_an_untrained_tokenizer_is_its_quantiser(coder: str) -> None:
    generator = generator_of(coder, is_trained=False)
    chunks_BMK, positions_MG, mask_MK = chunks_of(generator, DEEP)
    codes_BML = generator.tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    plain_NL = generator.tokenizer.quantiser.encode(chunks_BMK.flatten(0, 1), mask_MK.repeat(NUM, 1))
    assert torch.equal(codes_BML.flatten(0, 1), plain_NL)
    decoded_BMK = generator.tokenizer.decode(codes_BML, positions_MG, mask_MK)
    assert torch.equal(decoded_BMK, generator.tokenizer.quantiser.decode(codes_BML))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("widths", [SMALL, DEEP])
def test_tokens_of_a_chunk_do_not_depend_on_the_window(coder: str, widths: tuple[int, ...]) -> None:
    generator = generator_of(coder)
    chunks_BMK, positions_MG, mask_MK = chunks_of(generator, widths)
    codes_BML = generator.tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    M, layout = len(positions_MG), layout_of(widths)
    batch = weight_batch(widths, NUM)
    for window in range(1, M + 1):
        for turn in range(M - window + 1):
            # Every network of the batch has a window of its own.
            start_B = (turn + torch.arange(NUM)) % (M - window + 1)
            index_BW = start_B.unsqueeze(1) + torch.arange(window)
            windows = generator.tokenizer.windows_with(layout, index_BW)
            values_BX, normalizer = batch.cut(windows).values_BD, generator.normalizer(layout)
            chunks_BXK = generator.tokenizer.window_chunks(values_BX, windows, layout, normalizer)
            seen_BWL = generator.tokenizer.encode_windows(chunks_BXK, layout, windows)
            assert torch.equal(seen_BWL, codes_BML[torch.arange(NUM).unsqueeze(1), index_BW])


def test_windows_cut_out_before_they_are_encoded_would_have_other_tokens() -> None:
    generator = generator_of("transformer")
    chunks_BMK, positions_MG, mask_MK = chunks_of(generator, DEEP)
    codes_BML = generator.tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    alone_BWL = generator.tokenizer.encode(chunks_BMK[:, 1:4], positions_MG[1:4], mask_MK[1:4])
    assert not torch.equal(alone_BWL, codes_BML[:, 1:4])


@pytest.mark.parametrize("coder", CODERS)
def test_the_prior_is_trained_on_the_tokens_of_whole_networks(coder: str) -> None:
    generator, batch = generator_of(coder), weight_batch(DEEP, NUM)
    tokenizer = generator.tokenizer
    positions_MG = tokenizer.positions(batch.layout)
    whole_BML = generator.tokens(batch.values_BD, batch.layout)
    generator.prior.config = replace(generator.prior.config, window=4)
    for seed in range(8):
        noise = noise_for(NUM, seed)
        seen = _seen_tokens(generator.prior, tokenizer, batch, generator.normalizers, noise)
        index_BW = random_windows(noise_for(NUM, seed), len(positions_MG), 4)
        assert torch.equal(seen.positions_WG, positions_MG[index_BW])
        assert torch.equal(seen.codes_BWL, whole_BML[torch.arange(NUM).unsqueeze(1), index_BW])


@pytest.mark.parametrize("block", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("num_chunks", [1, 7, 12])
def test_covering_blocks_are_whole_hold_the_window_and_are_no_more_than_needed(block: int, num_chunks: int) -> None:
    for window in range(1, num_chunks + 1):
        starts = torch.arange(num_chunks - window + 1)
        index_BX = covering_blocks(starts.unsqueeze(1) + torch.arange(window), block, num_chunks)
        first_B, length = index_BX[:, 0], index_BX.shape[1]
        assert torch.equal(index_BX, first_B.unsqueeze(1) + torch.arange(length))
        assert bool((first_B % block == 0).all())
        assert length % block == 0
        assert bool((first_B <= starts).all())
        assert bool((starts + window <= first_B + length).all())
        assert int(index_BX.max()) < -(-num_chunks // block) * block
        most_touched = max(int((start + window - 1) // block - start // block) + 1 for start in range(block))
        assert length // block <= most_touched


@pytest.mark.parametrize("coder", CODERS)
def test_padding_changes_no_token(coder: str) -> None:
    generator = generator_of(coder)
    chunks_BMK, positions_MG, mask_MK = chunks_of(generator, DEEP)
    assert float(mask_MK[-1].sum()) == 1
    codes_BML = generator.tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    if coder == "mlp":
        # Chunks are padded with zeros, which is all that a perceptron relies on.
        assert float(chunks_BMK[:, -1, 1:].abs().max()) == 0
        return
    garbage_BMK = torch.where(mask_MK > 0, chunks_BMK, torch.full_like(chunks_BMK, 9.0))
    assert torch.equal(generator.tokenizer.encode(garbage_BMK, positions_MG, mask_MK), codes_BML)


@pytest.mark.parametrize("coder", CODERS)
def test_the_gradient_reaches_both_coders_through_the_quantiser(coder: str) -> None:
    generator = generator_of(coder)
    stage = tokenizer_stage(generator).train()
    stage(weight_batch(DEEP), noise_for(8)).loss.backward()
    for part in (generator.tokenizer.encoder, generator.tokenizer.decoder):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("coder", CODERS)
def test_training_lowers_the_loss(coder: str) -> None:
    generator = generator_of(coder, is_trained=False)
    stage = tokenizer_stage(generator)
    batches = [weight_batch((SMALL, DEEP)[step % 2], 16) for step in range(150)]
    stage.setup(batches[:2], seed=0)
    losses = train(stage, batches)
    # These networks lie in three directions, which a trained coder finds and k-means does not.
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize("coder", CODERS)
def test_a_bundle_writes_bit_equal_networks(coder: str, tmp_path: Path) -> None:
    generator = generator_of(coder)
    save_bundle(generator, tmp_path, {"seed": 3})
    loaded = load_bundle(tmp_path)
    written = [
        each.generate(GenerationRequest(condition=condition(3), layout=layout_of(DEEP), noise=noise_for(3))).values_BD
        for each in (generator, loaded)
    ]
    assert torch.equal(*written)
    kept = [each.reconstruct(values_of(DEEP)[:3], layout_of(DEEP)) for each in (generator, loaded)]
    assert torch.equal(*kept)


def test_unknown_coders_are_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="coder=vit: give one of mlp, conv, transformer"):
        load_config(TokenizerConfig, None, ["coder=vit"])
    with pytest.raises(ValueError, match="coder=transformer: scales are coded before"):
        replace(igpg_config().tokenizer, coder="transformer", scales="tensor")
    with pytest.raises(ValueError, match="output_loss_weight=-1"):
        replace(igpg_config().tokenizer, output_loss_weight=-1.0)
