"""The codebooks, positions and conditions of the prior's tests, sized by constants of the test's module."""

from __future__ import annotations

import pytest
import torch

from raywgen.generators.common.tokenizer.chunk_table import ChunkTable
from raywgen.nn.quantisers import ResidualQuantiser
from raywgen.weights import Condition
from raywgen.weights.chunks import num_position_features
from tests.builders import condition


@pytest.fixture(scope="module")
def rvq(request: pytest.FixtureRequest) -> ResidualQuantiser:
    """Returns random codebooks of `NUM_LEVELS` levels with `NUM_CODES` codes of `LENGTH` values."""
    sizes = request.module
    quantiser = ResidualQuantiser(sizes.NUM_LEVELS, sizes.NUM_CODES, sizes.LENGTH)
    quantiser.codebooks_LVK.normal_(generator=torch.Generator().manual_seed(1))
    return quantiser


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> ChunkTable:
    """Returns random position features of `NUM_CHUNKS` chunks."""
    generator = torch.Generator().manual_seed(2)
    return ChunkTable(positions_MG=torch.randn(request.module.NUM_CHUNKS, num_position_features(), generator=generator))


@pytest.fixture(scope="module")
def cond() -> Condition:
    """Returns the conditions of four networks."""
    return condition(4)
