"""Condition encoders: what they see, what they must not see.

Shape legend: B networks, S samples, F features, M chunks, G place features, H width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PositionEncoder, SampleEncoder
from tests.builders import DATA, condition

WIDTH, NUM_POSITION = 16, 5


@pytest.fixture(scope="module")
def samples() -> SampleEncoder:
    torch.manual_seed(0)
    return SampleEncoder(DATA.num_features, 3, WIDTH)


def test_order_of_samples_does_not_matter(samples: SampleEncoder) -> None:
    cond = condition(3)
    order = torch.randperm(cond.labels_BS.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled_BH = samples(cond.samples_BSF[:, order], cond.labels_BS[:, order])
    # Sums in another order: float32 roundings of values of size 1.
    torch.testing.assert_close(shuffled_BH, samples(cond.samples_BSF, cond.labels_BS), rtol=1e-5, atol=1e-5)


def test_unit_and_offset_of_the_data_do_not_matter(samples: SampleEncoder) -> None:
    cond = condition(3)
    offset_F = torch.linspace(-3, 5, cond.samples_BSF.shape[2])
    moved_BH = samples(40 * cond.samples_BSF + offset_F, cond.labels_BS)
    torch.testing.assert_close(moved_BH, samples(cond.samples_BSF, cond.labels_BS), rtol=1e-4, atol=1e-4)


def test_samples_without_any_spread_are_no_nan(samples: SampleEncoder) -> None:
    cond = condition(3)
    assert samples(torch.ones_like(cond.samples_BSF), cond.labels_BS).isfinite().all()


def test_labels_matter_and_showing_all_samples_twice_does_not(samples: SampleEncoder) -> None:
    cond = condition(3)
    encoded_BH = samples(cond.samples_BSF, cond.labels_BS)
    assert not torch.allclose(samples(cond.samples_BSF, 1 - cond.labels_BS), encoded_BH, atol=1e-2)
    twice_BH = samples(cond.samples_BSF.repeat(1, 2, 1), cond.labels_BS.repeat(1, 2))
    torch.testing.assert_close(twice_BH, encoded_BH, rtol=1e-5, atol=1e-5)


def test_an_encoded_set_is_the_mean_of_its_samples_and_the_directions_of_its_classes(samples: SampleEncoder) -> None:
    """Written out sample by sample and class by class."""
    cond = condition(3)
    for b in range(3):
        x_SF, y_S = cond.samples_BSF[b], cond.labels_BS[b]
        x_SF = x_SF - x_SF.mean(dim=0)
        x_SF = x_SF / x_SF.square().mean().sqrt()
        mixed = [samples.mix(samples.pixel(x_F) + samples.label.weight[y]) for x_F, y in zip(x_SF, y_S, strict=True)]
        wanted_H = torch.stack(mixed).mean(dim=0)
        for label in set(y_S.tolist()):
            mean_F = x_SF[y_S == label].mean(dim=0)
            wanted_H = wanted_H + mean_F / mean_F.square().mean().sqrt().clamp(min=1e-2) @ samples.per_class[label]
        found_H = samples(cond.samples_BSF[b : b + 1], cond.labels_BS[b : b + 1])[0]
        torch.testing.assert_close(found_H, samples.head(wanted_H), rtol=1e-4, atol=1e-5)


def test_a_class_mean_that_is_next_to_nothing_counts_for_little(samples: SampleEncoder) -> None:
    """The bound is a hundredth of the spread of the samples, whose number does not matter."""
    generator = torch.Generator().manual_seed(0)
    half_SF = torch.randn(500, DATA.num_features, generator=generator)
    tiny_F = 1e-3 * torch.ones(DATA.num_features)
    # Two classes whose means lie a thousandth of the spread to either side.
    x_SF = torch.cat([half_SF + tiny_F, -half_SF + tiny_F, half_SF - tiny_F, -half_SF - tiny_F])
    y_S = torch.arange(4).repeat_interleave(500) // 2
    known_BH = samples(x_SF.unsqueeze(0), y_S.unsqueeze(0))
    mixed_H = samples.mix(samples.pixel(x_SF / x_SF.square().mean().sqrt()) + samples.label(y_S)).mean(dim=0)
    directions_2F = torch.stack([tiny_F, -tiny_F]) / x_SF.square().mean().sqrt() / 1e-2
    wanted_H = mixed_H + torch.einsum("cf,cfh->h", directions_2F, samples.per_class[:2])
    torch.testing.assert_close(known_BH[0], samples.head(wanted_H), rtol=1e-3, atol=1e-4)


def test_a_class_without_samples_is_no_nan(samples: SampleEncoder) -> None:
    cond = condition(2)
    assert bool(samples(cond.samples_BSF, torch.zeros_like(cond.labels_BS)).isfinite().all())


def test_condition_encoder_gives_three_tokens_and_every_part_reaches_them() -> None:
    torch.manual_seed(0)
    encoder = ConditionEncoder(num_features=6, max_classes=2, num_position_features=NUM_POSITION, width=WIDTH)
    cond, mean_position_G = condition(2), torch.randn(NUM_POSITION)
    tokens = encoder(cond.instructions, cond.samples_BSF, cond.labels_BS, mean_position_G)
    assert tokens.shape == (2, ConditionEncoder.num_tokens, WIDTH)
    others = [
        encoder(("other", "words"), cond.samples_BSF, cond.labels_BS, mean_position_G),
        encoder(cond.instructions, cond.samples_BSF.flip(2), cond.labels_BS, mean_position_G),
        encoder(cond.instructions, cond.samples_BSF, cond.labels_BS, mean_position_G + 1),
    ]
    for place, other in enumerate(others):
        changed = [not torch.allclose(tokens[:, t], other[:, t], atol=1e-3) for t in range(3)]
        assert changed == [t == place for t in range(3)]


def test_a_dropped_part_is_not_seen_and_the_others_are_as_they_were() -> None:
    torch.manual_seed(0)
    encoder = ConditionEncoder(
        num_features=6, max_classes=2, num_position_features=NUM_POSITION, width=WIDTH, can_drop=True
    )
    assert encoder.dropped is not None
    torch.nn.init.normal_(encoder.dropped)
    cond, other, mean_position_G = condition(4), condition(4, seed=1), torch.randn(NUM_POSITION)
    other = replace(other, instructions=("a", "b", "c", "d"))
    is_dropped_B2 = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    whole, kept = (
        encoder(cond.instructions, cond.samples_BSF, cond.labels_BS, mean_position_G, dropped)
        for dropped in (None, is_dropped_B2)
    )
    changed = encoder(other.instructions, other.samples_BSF, other.labels_BS, mean_position_G, is_dropped_B2)
    for part in range(2):
        for b in range(4):
            assert torch.equal(kept[b, part], changed[b, part]) == bool(is_dropped_B2[b, part])
            assert torch.equal(kept[b, part], whole[b, part]) != bool(is_dropped_B2[b, part])
    assert torch.equal(kept[:, 2], whole[:, 2])


def test_condition_summary_is_its_formula() -> None:
    torch.manual_seed(0)
    summary, position = ConditionSummary(WIDTH), PositionEncoder(NUM_POSITION, WIDTH)
    prefix_BTH, positions_MH = torch.randn(2, 3, WIDTH), position(torch.randn(4, NUM_POSITION))
    result_BMH = summary(prefix_BTH, positions_MH)
    assert result_BMH.shape == (2, 4, WIDTH)
    for b in range(2):
        condition_H = summary.project(prefix_BTH[b].flatten())
        for m in range(4):
            expected_H = positions_MH[m] + condition_H + positions_MH[m] * condition_H
            torch.testing.assert_close(result_BMH[b, m], expected_H, rtol=1e-5, atol=1e-5)


def test_sets_of_one_class_differ_by_their_means() -> None:
    torch.manual_seed(0)
    samples, alone = SampleEncoder(6, 2, WIDTH), SampleEncoder(6, 1, WIDTH)
    one_BSF, labels_BS = torch.randn(1, 9, 6), torch.zeros(1, 9, dtype=torch.int64)
    other_BSF = one_BSF + torch.randn(6)
    assert torch.allclose(samples(one_BSF, labels_BS), samples(other_BSF, labels_BS), atol=1e-4)
    assert (alone(one_BSF, labels_BS) - alone(other_BSF, labels_BS)).abs().max() > 0.05
    assert torch.allclose(alone(one_BSF, labels_BS), alone(3 * one_BSF, labels_BS), atol=1e-5)
