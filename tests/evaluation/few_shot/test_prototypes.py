import pytest
import torch
from torch import Tensor

from raywgen.evaluation.few_shot import FewShotError, prototype_logits, prototypes

# Legend: B episodes, S support samples, Q query samples, E features, C classes.


def _episodes() -> tuple[Tensor, Tensor, Tensor]:
    """Three episodes of four classes with unequal numbers of samples, in mixed order."""
    rng = torch.Generator().manual_seed(0)
    y_S = torch.tensor([2, 0, 1, 3, 3, 0, 2, 2, 1])
    y_BS = torch.stack([y_S[torch.randperm(9, generator=rng)] for _ in range(3)])
    features = [torch.randn(3, num, 6, generator=rng, dtype=torch.float64) for num in (9, 7)]
    return features[0], y_BS, features[1]


def test_logits_are_those_of_a_loop_over_everything() -> None:
    support_BSE, y_BS, query_BQE = _episodes()
    logits_BQC = prototype_logits(support_BSE, y_BS, query_BQE, 4)
    for b in range(3):
        for c in range(4):
            mean_E = torch.stack([x_E for x_E, y in zip(support_BSE[b], y_BS[b], strict=True) if y == c]).mean(dim=0)
            torch.testing.assert_close(prototypes(support_BSE, y_BS, 4)[b, c], mean_E)
            for q in range(7):
                torch.testing.assert_close(logits_BQC[b, q, c], -((query_BQE[b, q] - mean_E) ** 2).sum())


def test_a_class_without_a_sample_is_named() -> None:
    support_BSE, y_BS, query_BQE = _episodes()
    y_BS[1][y_BS[1] == 3] = 0
    with pytest.raises(FewShotError, match="episode 1 has no support sample of class 3"):
        prototype_logits(support_BSE, y_BS, query_BQE, 4)


@pytest.mark.parametrize(("labels", "said"), [(torch.tensor([[0, 4]]), "labels from 0 to 4"), (torch.zeros(2), "give")])
def test_bad_labels_are_refused(labels: Tensor, said: str) -> None:
    with pytest.raises(FewShotError, match=said):
        prototypes(torch.zeros(1, 2, 3), labels, 4)
