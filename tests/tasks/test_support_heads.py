from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.tasks.support_heads import left_out_loss, nearest_means_head, ridge_blocks_head, sharpened

LABELS_S = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 2])


def features(num_features: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Features of three classes about means of their own, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mean_CE = torch.randn(3, num_features, generator=generator)
    noise_SE = torch.randn(len(LABELS_S), num_features, generator=generator)
    return 100 + mean_CE[LABELS_S] + spread * noise_SE


def test_nearest_means_are_the_nearest_by_distance() -> None:
    features_SE, others_XE = features(5), features(5, seed=1)
    mean_CE = torch.stack([features_SE[label == LABELS_S].mean(dim=0) for label in range(3)])
    distance_XC = (others_XE.unsqueeze(1) - mean_CE).square().sum(dim=2)
    logits_XC = nearest_means_head(features_SE, LABELS_S, 3)(others_XE)
    assert torch.equal(logits_XC.argmax(dim=1), distance_XC.argmin(dim=1))
    # Logits differ as squared distances do.
    gap_X = (distance_XC[:, 1] - distance_XC[:, 0]) / (logits_XC[:, 0] - logits_XC[:, 1])
    torch.testing.assert_close(gap_X, gap_X[:1].expand(len(gap_X)), rtol=1e-2, atol=0)


def test_nearest_means_without_an_example_are_those_of_all_others() -> None:
    features_SE = features(5)
    left_out_SC = nearest_means_head(features_SE, LABELS_S, 3).left_out_SC
    assert left_out_SC is not None
    for left_out, x_E in enumerate(features_SE):
        kept_S = torch.arange(len(LABELS_S)) != left_out
        others_SE, labels_S = features_SE[kept_S], LABELS_S[kept_S]
        mean_CE = torch.stack([others_SE[labels_S == label].mean(dim=0) for label in range(3)])
        distance_C = (x_E - mean_CE).square().sum(dim=1)
        ratio_C = (distance_C - distance_C[0])[1:] / (left_out_SC[left_out] - left_out_SC[left_out, 0])[1:]
        torch.testing.assert_close(ratio_C[0], ratio_C[1], rtol=1e-2, atol=0)
        assert distance_C.argmin() == left_out_SC[left_out].argmax()


def test_every_block_weighs_the_same_whatever_its_scale_and_place() -> None:
    blocks = [features(8), features(3, seed=2)]
    others = [features(8, seed=3), features(3, seed=4)]
    plain = ridge_blocks_head(blocks, LABELS_S, 3)(torch.cat(others, dim=1))
    moved = ridge_blocks_head([1000 * blocks[0] - 7, blocks[1]], LABELS_S, 3)
    found = moved(torch.cat([1000 * others[0] - 7, others[1]], dim=1))
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)
    alone = ridge_blocks_head(blocks[:1], LABELS_S, 3)(others[0])
    assert not torch.allclose(alone, plain, rtol=0.1, atol=0.1)
    constant = torch.full((len(LABELS_S), 2), 3.0)
    same = ridge_blocks_head([*blocks, constant], LABELS_S, 3)(torch.cat([*others, constant], dim=1))
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_single_example_cannot_be_left_out(blocks: bool) -> None:
    features_SE, labels_S = features(4)[:4], torch.tensor([2, 0, 1, 1])
    head = ridge_blocks_head([features_SE], labels_S, 3) if blocks else nearest_means_head(features_SE, labels_S, 3)
    assert head.left_out_SC is None
    assert sharpened(head, labels_S) is head


def test_logits_get_the_size_with_the_lowest_loss_on_left_out_examples() -> None:
    # Classes that overlap want small logits, classes far apart large ones.
    sizes = []
    for spread in (0.1, 3.0):
        features_SE = features(5, spread=spread)
        head = nearest_means_head(features_SE, LABELS_S, 3)
        best = sharpened(head, LABELS_S)
        factor = float(best.bias_C[0] / head.bias_C[0])
        assert 1 / 32 < factor < 32
        for other in (factor / 2, 2 * factor):
            assert left_out_loss(best, LABELS_S) < left_out_loss(head.times(other), LABELS_S)
        torch.testing.assert_close(best(features_SE), factor * head(features_SE), rtol=1e-2, atol=1e-2)
        sizes.append(factor)
    assert sizes[0] > sizes[1]


def test_right_answers_are_not_taken_for_certain() -> None:
    head = nearest_means_head(features(5, spread=0.01), LABELS_S, 3)
    assert head.left_out_SC is not None
    assert torch.equal(head.left_out_SC.argmax(dim=1), LABELS_S)
    assert left_out_loss(head.times(1000), LABELS_S) > left_out_loss(head, LABELS_S) > 0.1
