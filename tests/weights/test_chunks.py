"""Chunks: cut and join without loss, and places described alike for every layout.

Shape legend: B networks, D values, M chunks, K values of a chunk, G place features.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raywgen.weights import Layout
from raywgen.weights.chunks import (
    chunk_features,
    chunk_mask,
    from_chunks,
    mean_position_features,
    num_chunks,
    num_position_features,
    position_features,
    span_features,
    to_chunks,
)


@pytest.fixture
def layout() -> Layout:
    return Layout.from_state_dict(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict())


@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 20))
@settings(max_examples=80)
def test_chunks_join_to_what_was_cut(num_networks: int, num_values: int, chunk_length: int) -> None:
    values_BD = torch.arange(num_networks * num_values, dtype=torch.float32).reshape(num_networks, num_values) + 1
    chunks_BMK = to_chunks(values_BD, chunk_length)
    assert chunks_BMK.shape == (num_networks, -(-num_values // chunk_length), chunk_length)
    assert torch.equal(from_chunks(chunks_BMK, num_values), values_BD)
    assert torch.count_nonzero(chunks_BMK) == values_BD.numel()


@pytest.mark.parametrize("chunk_length", [1, 4, 7, 1000])
def test_mask_counts_the_values(layout: Layout, chunk_length: int) -> None:
    mask_MK = chunk_mask(layout, chunk_length)
    assert mask_MK.shape == (num_chunks(layout, chunk_length), chunk_length)
    assert int(mask_MK.sum()) == layout.num_values


@pytest.mark.parametrize("chunk_length", [1, 4, 7, 1000])
def test_places_are_finite_bounded_and_differ(layout: Layout, chunk_length: int) -> None:
    positions_MG = position_features(layout, chunk_length)
    assert positions_MG.shape == (num_chunks(layout, chunk_length), num_position_features())
    assert bool(torch.isfinite(positions_MG).all())
    assert float(positions_MG.abs().max()) <= 2.0
    assert len(torch.unique(positions_MG, dim=0)) == len(positions_MG)


def test_places_are_a_function_of_the_layout_alone(layout: Layout) -> None:
    again = Layout.from_json(layout.to_json())
    assert torch.equal(position_features(again, 4), position_features(layout, 4))


def test_a_place_is_that_of_its_first_and_last_value(layout: Layout) -> None:
    last = layout.num_values - 1
    first_M = torch.arange(num_chunks(layout, 4)) * 4
    expected = span_features(layout, first_M, (first_M + 3).clamp(max=last))
    assert torch.equal(position_features(layout, 4), expected)
    values_MG = span_features(layout, first_M, first_M)
    half = num_position_features() // 2
    assert torch.equal(expected[:, :half], values_MG[:, :half])
    assert not torch.equal(expected[:, half:], values_MG[:, half:])


def test_values_of_a_row_share_its_waves_and_values_of_a_column_its_own() -> None:
    """A matrix of 5 rows and 7 columns: value 8 lies in row 1 and column 1."""
    matrix = Layout.from_state_dict({"weight": torch.zeros(5, 7)})
    place = torch.arange(35)
    waves = span_features(matrix, place, place)[:, : num_position_features() // 2][:, -36:]
    row, column, whole = (part.unflatten(0, (5, 7)) for part in waves.split(12, dim=1))
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:1].expand_as(column))
    for fraction, found in ((1 / 5, row[1, 0]), (1 / 7, column[0, 1]), (8 / 35, whole[1, 1])):
        angle = torch.pi * fraction * 2.0 ** torch.arange(6)
        torch.testing.assert_close(found, torch.cat([angle.sin(), angle.cos()]))


def test_features_and_mask_of_some_chunks_are_rows_of_the_whole_tables(layout: Layout) -> None:
    index_23 = torch.tensor([[0, 4, 1], [2, 3, 0]])
    assert torch.equal(chunk_features(layout, 4, index_23), position_features(layout, 4)[index_23])
    assert torch.equal(chunk_mask(layout, 4, index_23), chunk_mask(layout, 4)[index_23])
    last = num_chunks(layout, 4) - 1
    beyond = chunk_features(layout, 4, torch.tensor([last + 5]))
    assert torch.equal(beyond[0, : beyond.shape[1] // 2], beyond[0, beyond.shape[1] // 2 :])


def test_the_mean_of_the_features_of_a_large_layout_needs_no_table() -> None:
    layout = Layout.from_state_dict({"a.weight": torch.empty(300, 400), "a.bias": torch.empty(300)})
    found = mean_position_features(layout, 4)
    torch.testing.assert_close(found, position_features(layout, 4).double().mean(dim=0).float(), rtol=1e-5, atol=1e-6)
