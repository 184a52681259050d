"""Windows of networks whose scales are tokens: given the moments of few header chunks, they are parts of the whole.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators.common.tokenizer import Tokenizer, TokenizerConfig
from raywgen.generators.common.tokenizer.config import Scales
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights import Layout, WeightBatch, layout_normalizer
from raywgen.weights.groups import groups_of
from tests.builders import weight_batch

pytestmark = pytest.mark.usefixtures("one_thread")
NUM = 3
LAYOUT = Layout.from_state_dict(
    nn.Sequential(
        nn.Conv2d(2, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 20, 3), nn.BatchNorm2d(20), nn.Flatten(), nn.Linear(20, 3)
    ).state_dict()
)


@torch.no_grad()
def tokenizer_of(scales: Scales, chunk_length: int) -> Tokenizer:
    """A tokeniser whose coders change chunks."""
    quantiser = QuantiserConfig(num_levels=2, num_codes=16)
    config = TokenizerConfig(chunk_length=chunk_length, quantiser=quantiser, width=16, scales=scales)
    tokenizer, draws = Tokenizer(config).eval(), torch.Generator().manual_seed(0)
    for parameter in tokenizer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    tokenizer.quantiser.initialise(torch.randn(200, chunk_length, generator=draws), 3, draws)
    return tokenizer


def networks() -> WeightBatch:
    values_BD = torch.randn(NUM, LAYOUT.num_values, generator=torch.Generator().manual_seed(1)).exp()
    batch = weight_batch(num=NUM)
    return WeightBatch(
        values_BD=values_BD,
        layout=LAYOUT,
        module=batch.module,
        condition=batch.condition,
        query=batch.query,
        sample_index_B=batch.sample_index_B,
    )


@pytest.mark.parametrize("by_code", [False, True])
@pytest.mark.parametrize("chunk_length", [1, 8, 30])
@pytest.mark.parametrize("scales", ["tensor", "filter"])
@torch.no_grad()
def test_windows_are_parts_of_whole_networks_wherever_they_begin(
    scales: Scales, chunk_length: int, by_code: bool
) -> None:
    tokenizer, batch, normalizer = tokenizer_of(scales, chunk_length), networks(), layout_normalizer(LAYOUT)
    chunks_BMK = tokenizer.chunks(batch.values_BD, LAYOUT, normalizer, by_code=by_code)
    count = tokenizer.num_chunks(LAYOUT)
    assert chunks_BMK.shape[1] == count
    assert tokenizer.num_header_chunks(LAYOUT) > 1
    for window in (1, 5, count):
        starts = range(0, count - window + 1, 7 if chunk_length == 1 else 1)
        for start in starts:
            # Another place in each network.
            first_B1 = torch.tensor([start, (start + 3) % (count - window + 1), count - window]).unsqueeze(1)
            index_BW = first_B1 + torch.arange(window)
            cut = tokenizer.cut(batch, tokenizer.windows_with(LAYOUT, index_BW), normalizer)
            assert cut.windows is not None
            header = tokenizer.window_header(cut, by_code=by_code)
            found_BWK = tokenizer.window_chunks(cut.values_BD, cut.windows, LAYOUT, normalizer, header)
            expected_BWK = torch.stack([c[i] for c, i in zip(chunks_BMK, index_BW, strict=True)])
            if by_code:  # Coders multiply matrices, which round by the number of their rows.
                torch.testing.assert_close(found_BWK, expected_BWK, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found_BWK, expected_BWK)


@pytest.mark.parametrize("scales", ["tensor", "filter"])
@torch.no_grad()
def test_a_window_of_values_needs_the_header_chunks_of_its_own_groups_alone(scales: Scales) -> None:
    tokenizer, K = tokenizer_of(scales, 8), 8
    lead = tokenizer.num_header_chunks(LAYOUT)
    groups = groups_of(LAYOUT, scales)
    tables = groups.tables(torch.device("cpu"))
    first_scale = groups.num_mean_chunks(K)
    for start in range(lead, tokenizer.num_chunks(LAYOUT) - 3):
        windows = tokenizer.windows_with(LAYOUT, start + torch.arange(4).unsqueeze(0))
        assert windows.header is not None
        place_X = windows.position_BX[0].clamp(max=LAYOUT.num_values - 1)
        scale_chunks = {first_scale + int(tables.scale_place_G[group]) // K for group in groups.of_values(place_X)}
        # The size of a group is about its decoded mean, and a chunk of scales is encoded with all its numbers.
        near = [g for g in range(groups.num_groups) if first_scale + int(tables.scale_place_G[g]) // K in scale_chunks]
        means = {int(tables.mean_place_G[group]) // K for group in near if group in groups.with_mean}
        assert windows.header.index_BY.tolist() == [sorted(scale_chunks | means)]


def test_the_header_of_a_vision_transformer_is_large_and_that_of_a_window_small() -> None:
    """ViT-L has 304 million values in 223 thousand groups of filters; a window of 8,192 values follows from few."""
    width, layers = 1024, 24
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 16, 16), "patch.bias": (width,)}
    for index in range(layers):
        shapes |= {f"{index}.norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
        for name, rows, columns in (
            ("qkv", 3 * width, width),
            ("out", width, width),
            ("up", 4 * width, width),
            ("down", width, 4 * width),
        ):
            shapes |= {f"{index}.{name}.weight": (rows, columns), f"{index}.{name}.bias": (rows,)}
    shapes |= {"head.weight": (1000, width), "head.bias": (1000,)}
    layout = Layout.from_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    tokenizer = tokenizer_of("filter", 16)
    assert layout.num_values > 300_000_000
    groups = groups_of(layout, "filter")
    assert 220_000 < groups.num_groups + groups.num_means < 230_000
    noise = torch.Generator().manual_seed(0)
    first_B1 = tokenizer.num_header_chunks(layout) + torch.randint(10**7, (64, 1), generator=noise)
    windows = tokenizer.windows_with(layout, first_B1 + torch.arange(512))
    assert windows.header is not None
    assert windows.header.index_BY.shape[1] < 10


def test_tokens_of_windows_come_with_those_of_their_header() -> None:
    tokenizer, batch, normalizer = tokenizer_of("filter", 8), networks(), layout_normalizer(LAYOUT)
    with torch.no_grad():
        codes_BML: Tensor = tokenizer.tokens(batch.values_BD, LAYOUT, normalizer)
        index_BW = torch.tensor([[2], [40], [9]]) + torch.arange(5)
        windows = tokenizer.windows_with(LAYOUT, index_BW)
        tokens = WeightBatch(
            values_BD=batch.values_BD[:, :0],
            codes_BWL=codes_BML,
            layout=LAYOUT,
            module=batch.module,
            condition=batch.condition,
            query=batch.query,
            sample_index_B=batch.sample_index_B,
        )
        headers = [tokenizer.window_header(tokenizer.cut(each, windows, normalizer)) for each in (batch, tokens)]
    assert headers[0] is not None
    assert headers[1] is not None
    assert torch.equal(headers[0].kept_BYK, headers[1].kept_BYK)
