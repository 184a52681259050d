"""What padding has a say in: no code, and no token of its own.

Shape legend: N vectors, K values, L tokens.
"""

from __future__ import annotations

import pytest
import torch

from raywgen.nn.quantisers import (
    Annealing,
    FiniteScalarQuantiser,
    GumbelQuantiser,
    Quantiser,
    ResidualQuantiser,
)
from raywgen.weights import KeyedNoise

WIDTH, NUM = 12, 60


def quantisers() -> dict[str, Quantiser]:
    torch.manual_seed(0)
    return {
        "gumbel": GumbelQuantiser(4, 6, WIDTH, Annealing()),
        "finite_scalar": FiniteScalarQuantiser(3, 3, WIDTH),
        "residual": ResidualQuantiser(4, 6, WIDTH),
    }


@pytest.mark.parametrize("kind", ["gumbel", "finite_scalar", "residual"])
def test_a_token_is_real_where_a_value_could_change_it(kind: str) -> None:
    quantiser, draws = quantisers()[kind], torch.Generator().manual_seed(1)
    vectors_NK = torch.randn(NUM, WIDTH, generator=draws)
    quantiser.initialise(vectors_NK, 5, draws)
    mask_NK = (torch.rand(NUM, WIDTH, generator=draws) < 0.2).float()
    is_real_NL = quantiser.real_tokens(mask_NK)
    assert is_real_NL.dtype == torch.bool
    changes_NL = torch.zeros(NUM, quantiser.num_tokens, dtype=torch.bool)
    before_NL = quantiser.encode(vectors_NK, mask_NK)
    for _ in range(200):
        other_NK = 3 * torch.randn(NUM, WIDTH, generator=draws)
        changes_NL |= quantiser.encode(other_NK, mask_NK) != before_NL
    assert torch.equal(changes_NL, is_real_NL)
    assert not bool(is_real_NL.all())
    if kind != "residual":
        zeros_NL = quantiser.encode(torch.zeros(1, WIDTH)).expand_as(before_NL)
        assert torch.equal(before_NL[~is_real_NL], zeros_NL[~is_real_NL])


def test_gumbel_draws_no_code_for_padding() -> None:
    quantiser, draws = quantisers()["gumbel"].train(), torch.Generator().manual_seed(1)
    vectors_NK = torch.randn(NUM, WIDTH, generator=draws)
    mask_NK = (torch.rand(NUM, WIDTH, generator=draws) < 0.2).float()
    is_real_NL = quantiser.real_tokens(mask_NK)
    drawn_NL = quantiser(vectors_NK, mask_NK, KeyedNoise(0, torch.arange(NUM)).gumbel).codes_NL
    likeliest_NL = quantiser.encode(vectors_NK, mask_NK)
    assert torch.equal(drawn_NL[~is_real_NL], likeliest_NL[~is_real_NL])
    assert not torch.equal(drawn_NL[is_real_NL], likeliest_NL[is_real_NL])
