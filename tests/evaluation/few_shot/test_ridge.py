from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from raywgen.evaluation.few_shot import FewShotError, ridge_logits, standardise_blocks

# Legend: B episodes, S support samples, Q query samples, E features, C classes.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def _episodes(num_features: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    y_S = torch.tensor([2, 0, 1, 3, 3, 0, 2, 2, 1])
    y_BS = torch.stack([y_S[torch.randperm(9, generator=rng)] for _ in range(3)])
    features = [torch.randn(3, num, num_features, generator=rng, dtype=torch.float64) for num in (9, 7)]
    features[0] += torch.nn.functional.one_hot(y_BS, num_features)
    return features[0], y_BS, features[1]


def _by_hand(x_SE: Tensor, y_S: Tensor, query_QE: Tensor, num_classes: int) -> tuple[Tensor, float]:
    """Fits every strength with one sample left out in turn, then the best strength to all."""
    y_SC = torch.nn.functional.one_hot(y_S, num_classes).double()
    centred_SE = x_SE - x_SE.mean(dim=0)
    unit = float(centred_SE.square().sum() / len(x_SE))
    errors = {}
    for strength in STRENGTHS:
        missed = 0.0
        for s in range(len(x_SE)):
            kept = [other for other in range(len(x_SE)) if other != s]
            model = Ridge(alpha=strength * unit).fit(x_SE[kept].numpy(), y_SC[kept].numpy())
            missed += float((torch.from_numpy(model.predict(x_SE[s : s + 1].numpy())) - y_SC[s]).square().sum())
        errors[strength] = missed
    best = min(errors, key=errors.__getitem__)
    model = Ridge(alpha=best * unit).fit(x_SE.numpy(), y_SC.numpy())
    return torch.from_numpy(model.predict(query_QE.numpy())), best


@pytest.mark.parametrize("num_features", [6, 40])
def test_scores_are_those_of_leaving_each_sample_out_by_hand(num_features: int) -> None:
    support_BSE, y_BS, query_BQE = _episodes(num_features)
    logits_BQC = ridge_logits(support_BSE, y_BS, query_BQE, 4, strengths=STRENGTHS)
    chosen = set()
    for b in range(3):
        wanted_QC, best = _by_hand(support_BSE[b], y_BS[b], query_BQE[b], 4)
        torch.testing.assert_close(logits_BQC[b], wanted_QC)
        chosen.add(best)
    # A choice at the same end of the range every time would show nothing of the choosing.
    assert chosen != {STRENGTHS[0]}
    assert len(chosen) > 1 or num_features == 40


def test_every_block_weighs_the_same_and_is_centred_by_the_support() -> None:
    support_BSE, _, query_BQE = _episodes()
    wide, narrow = support_BSE.repeat(1, 1, 5) * 100 + 7, support_BSE[..., :2]
    wide_query, narrow_query = query_BQE.repeat(1, 1, 5) * 100 + 7, query_BQE[..., :2]
    support, query = standardise_blocks([wide, narrow], [wide_query, narrow_query])
    assert support.shape == (3, 9, 32)
    assert query.shape == (3, 7, 32)
    torch.testing.assert_close(support.mean(dim=1), torch.zeros(3, 32, dtype=torch.float64))
    for block in (support[..., :30], support[..., 30:]):
        torch.testing.assert_close(block.square().sum(dim=2).mean(dim=1), torch.ones(3, dtype=torch.float64))
    # A query sample equal to a support sample lands on the same place.
    same, _ = standardise_blocks([narrow], [narrow])
    torch.testing.assert_close(standardise_blocks([narrow], [narrow[:, :2]])[1], same[:, :2])


def test_a_constant_block_adds_nothing() -> None:
    support_BSE, y_BS, query_BQE = _episodes()
    constant, constant_query = torch.full_like(support_BSE, 3.0), torch.full_like(query_BQE, 3.0)
    alone = ridge_logits(*_joined([support_BSE], y_BS, [query_BQE]), 4)
    both = ridge_logits(*_joined([support_BSE, constant], y_BS, [query_BQE, constant_query]), 4)
    torch.testing.assert_close(alone, both)


def _joined(support: list[Tensor], y_BS: Tensor, query: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    joined, joined_query = standardise_blocks(support, query)
    return joined, y_BS, joined_query


def test_labels_out_of_range_are_refused() -> None:
    support_BSE, y_BS, query_BQE = _episodes()
    with pytest.raises(FewShotError, match="labels from 0 to 3"):
        ridge_logits(support_BSE, y_BS, query_BQE, 3)
