import pytest
import torch
from torch import Tensor, nn

from raywgen.evaluation.few_shot import FewShotError, fit_head_autograd, fit_heads, head_accuracies, head_logits

# Legend: B episodes, S support samples, Q query samples, E features, C classes.


def _episodes(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    # As after a ReLU: some features are zero for all, and have no gradient.
    support_BSE = torch.randn(4, 15, 8, generator=rng, dtype=dtype).relu()
    support_BSE[..., 3] = 0
    # No class has a fifth of the samples: its bias would have no gradient at first, and Adam a step of rounding error.
    labels_S = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4])
    return support_BSE, torch.stack([labels_S[torch.randperm(15, generator=rng)] for _ in range(4)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_heads_at_once_are_those_of_autograd_and_adam(rate: float, dtype: torch.dtype, tolerance: float) -> None:
    support_BSE, y_BS = _episodes(dtype)
    heads = fit_heads(support_BSE, y_BS, 5, learning_rate=rate, num_steps=[20, 0, 1, 7])
    assert sorted(heads) == [0, 1, 7, 20]
    for steps, (weight_BCE, bias_BC) in heads.items():
        for b in range(4):
            weight_CE, bias_C = fit_head_autograd(support_BSE[b], y_BS[b], 5, learning_rate=rate, num_steps=steps)
            torch.testing.assert_close(weight_BCE[b], weight_CE, rtol=0, atol=tolerance)
            torch.testing.assert_close(bias_BC[b], bias_C, rtol=0, atol=tolerance)


def test_many_episodes_are_one_problem_of_torch_adam() -> None:
    """Adam works on each value alone, so that the sum of the losses fits all heads at once."""
    support_BSE, y_BS = _episodes(torch.float64)
    weight_BCE = torch.zeros(4, 5, 8, dtype=torch.float64, requires_grad=True)
    bias_BC = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight_BCE, bias_BC], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        logits_BSC = torch.einsum("bse,bce->bsc", support_BSE, weight_BCE) + bias_BC.unsqueeze(1)
        (nn.functional.cross_entropy(logits_BSC.flatten(0, 1), y_BS.flatten()) * 4).backward()
        optimizer.step()
    weight, bias = fit_heads(support_BSE, y_BS, 5, learning_rate=0.1, num_steps=[20])[20]
    torch.testing.assert_close(weight, weight_BCE.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(bias, bias_BC.detach(), rtol=0, atol=1e-5)


def test_accuracies_are_those_of_each_head() -> None:
    support_BSE, y_BS = _episodes(torch.float64)
    accuracies = head_accuracies(
        support_BSE, y_BS, support_BSE[:, :6], y_BS[:, :6], 5, num_steps=[0, 50], learning_rates=[0.03, 0.3]
    )
    assert sorted(accuracies) == [(0.03, 0), (0.03, 50), (0.3, 0), (0.3, 50)]
    weight_BCE, bias_BC = fit_heads(support_BSE, y_BS, 5, learning_rate=0.3, num_steps=[50])[50]
    guess_BQ = head_logits(weight_BCE, bias_BC, support_BSE[:, :6]).argmax(dim=-1)
    torch.testing.assert_close(accuracies[0.3, 50], (guess_BQ == y_BS[:, :6]).float().mean(dim=1))
    assert accuracies[0.3, 50].mean() > accuracies[0.3, 0].mean()


@pytest.mark.parametrize(("rate", "steps"), [(0.0, [1]), (0.1, []), (0.1, [-1])])
def test_bad_settings_are_refused(rate: float, steps: list[int]) -> None:
    with pytest.raises(FewShotError, match="give a rate above 0"):
        fit_heads(*_episodes(torch.float32), 5, learning_rate=rate, num_steps=steps)
