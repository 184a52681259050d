"""Pieces of a large network: written one by one they are the network that is written at once, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.pieces import GeneratedPiece, joined_units
from raywgen.weights import Layout, Normalizer
from tests.builders import NUM_FEATURES, SMALL, condition, igpg, igpg_config, noise_for, normalizers

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = (NUM_FEATURES, 40, 40, 2)
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"windows": "sequential"},
    "parallel": {"windows": "parallel", "max_rows": 16},
    "independent": {"chunks": "independent", "max_rows": 64},
    "mean of two": {"windows": "parallel", "decoding": "tokens", "num_averaged": 2, "max_rows": 16},
}


def normed() -> nn.Module:
    """A network with running variances, which are coded by their logarithms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(NUM_FEATURES, 37), nn.BatchNorm1d(37), nn.ReLU(), nn.Linear(37, 37))


def trained(scales: Any, window: int, *, has_start: bool = True, coder: Any = "mlp") -> tuple[IGPG, Layout]:
    """A generator of such networks whose parameters are none of those at the start, which are zeros in part."""
    layout = Layout.from_state_dict(normed().state_dict())
    start_D = layout.flatten(normed().state_dict())
    values_ND = start_D * (1 + 0.1 * torch.randn(8, len(start_D), generator=torch.Generator().manual_seed(1)))
    measured = Normalizer.measure(layout, values_ND, start_D if has_start else None)
    config = igpg_config()
    config = dataclasses.replace(
        config,
        tokenizer=dataclasses.replace(config.tokenizer, scales=scales, coder=coder, context=4),
        prior=dataclasses.replace(config.prior, window=window),
        task_loss=dataclasses.replace(config.task_loss, diversity_weight=1.0),
    )
    generator = igpg(config, normalizers(SMALL, LONG))
    for parameter in generator.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    generator.normalizers[layout.id] = (layout, measured)
    return generator, layout


def request_for(layout: Layout, sampling: SamplingConfig, num: int = 3) -> GenerationRequest:
    return GenerationRequest(
        condition=condition(num), layout=layout, noise=noise_for(num), temperature=0.7, sampling=sampling
    )


def written(generator: IGPG, request: GenerationRequest, max_values: int, order: int = 1) -> list[GeneratedPiece]:
    """All pieces, those that need no other in the given order."""
    assert isinstance(request.sampling, SamplingConfig)
    pieces = generator.pieces(request.layout, request.sampling, len(request.condition), max_values)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    done: dict[int, GeneratedPiece] = {}
    while len(done) < len(pieces):
        ready = [each for each in pieces if each.index not in done and done.keys() >= set(each.needs)]
        piece = ready[::order][0]
        kept: dict[str, Tensor] = {}
        for index in piece.needs:
            kept |= done[index].kept
        done[piece.index] = generator.generate_piece(request, piece, kept)
        assert done[piece.index].values_BX.shape == (len(request.condition), piece.num_values)
    return [done[index] for index in range(len(pieces))]


@pytest.mark.parametrize("scales", ["normalizer", "filter"])
@pytest.mark.parametrize("mode", MODES)
def test_pieces_are_the_whole_network_bit_for_bit(mode: str, scales: str) -> None:
    for window, has_start in ((5, True), (10, False)):
        generator, layout = trained(scales, window, has_start=has_start)
        request = request_for(layout, SamplingConfig(**MODES[mode]))
        whole = generator.generate(request)
        assert whole.log_prob_B is not None
        for order in (1,) if mode == "sequential" else (1, -1):
            pieces = written(generator, request, max_values=100, order=order)
            assert len(pieces) > 2
            assert torch.equal(torch.cat([piece.values_BX for piece in pieces], dim=1), whole.values_BD)
            log_probs = [piece.log_prob_B for piece in pieces if piece.log_prob_B is not None]
            torch.testing.assert_close(torch.stack(log_probs).sum(dim=0).float(), whole.log_prob_B)


def test_pieces_depend_on_each_other_only_where_windows_do() -> None:
    for scales, first in (("normalizer", ()), ("filter", (0,))):
        generator, layout = trained(scales, 5)
        for mode in MODES:
            pieces = generator.pieces(layout, SamplingConfig(**MODES[mode]), 3, 100)
            values = [piece for piece in pieces if piece.num_values]
            assert (pieces[0].num_values == 0) == bool(first)
            assert values[0].needs == first
            for piece in values[1:]:
                assert piece.needs == (*first, *((piece.index - 1,) if mode == "sequential" else ()))


def test_what_cannot_be_cut_is_one_piece() -> None:
    for coder, sampling in (
        ("transformer", SamplingConfig(windows="parallel", max_rows=16)),
        ("mlp", SamplingConfig(chunks="shuffled")),
        ("mlp", SamplingConfig(windows="parallel")),
    ):
        generator, layout = trained("normalizer", 5, coder=coder)
        (piece,) = generator.pieces(layout, sampling, 3, 100)
        assert (piece.start, piece.stop) == (0, layout.num_values)
        request = request_for(layout, sampling)
        assert torch.equal(
            generator.generate_piece(request, piece, {}).values_BX, generator.generate(request).values_BD
        )


def test_memory_bounds_how_many_windows_are_written_at_once() -> None:
    generator, layout = trained("normalizer", 5)
    many = generator.pieces(layout, SamplingConfig(windows="parallel", max_gib=1e-4), 3, 1)
    few = generator.pieces(layout, SamplingConfig(windows="parallel", max_gib=4e-4), 3, 1)
    assert len(many) > len(few) > 1


def test_units_are_joined_up_to_a_bound() -> None:
    assert joined_units([3, 3, 3, 9, 1, 1], 6) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert joined_units([1], 6) == [(0, 1)]
    assert joined_units([], 6) == []
