"""Condition encoders: what they see, what they must not see.

Shape legend: B networks, S samples, F features, M chunks, G place features, H width.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PlaceEncoder, SampleEncoder, TextEncoder
from tests.builders import DATA, condition

WIDTH, NUM_PLACE = 16, 5

_ENCODE = """
import torch
from raywgen.nn.conditions import TextEncoder
torch.manual_seed(0)
encoder = TextEncoder(8)
print(encoder(["Is the digit one of 1, 4, 7?", "zwölf Bäume", ""]).detach().numpy().tobytes().hex())
"""


def test_text_encoder_is_the_same_in_another_process() -> None:
    torch.manual_seed(0)
    here = TextEncoder(8)(["Is the digit one of 1, 4, 7?", "zwölf Bäume", ""]).detach().numpy().tobytes().hex()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", _ENCODE], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == here


def test_text_encoder_tells_words_apart_but_not_case_or_batch() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(WIDTH)
    texts = ["Is it 1?", "is IT 1?", "Is it 2?", ""]
    together_BH = encoder(texts)
    assert torch.equal(together_BH[0], together_BH[1])
    assert not torch.allclose(together_BH[0], together_BH[2], atol=1e-3)
    for row_H, text in zip(together_BH, texts, strict=True):
        # A row of a batch goes through another matrix kernel than alone.
        torch.testing.assert_close(encoder([text])[0], row_H, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def samples() -> SampleEncoder:
    torch.manual_seed(0)
    return SampleEncoder(DATA.num_features, 3, WIDTH)


def test_order_of_samples_does_not_matter(samples: SampleEncoder) -> None:
    told = condition(3)
    order = torch.randperm(told.labels_BS.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled_BH = samples(told.samples_BSF[:, order], told.labels_BS[:, order])
    # Sums in another order: float32 roundings of values of size 1.
    torch.testing.assert_close(shuffled_BH, samples(told.samples_BSF, told.labels_BS), rtol=1e-5, atol=1e-5)


def test_unit_and_offset_of_the_data_do_not_matter(samples: SampleEncoder) -> None:
    told = condition(3)
    offset_F = torch.linspace(-3, 5, told.samples_BSF.shape[2])
    moved_BH = samples(40 * told.samples_BSF + offset_F, told.labels_BS)
    torch.testing.assert_close(moved_BH, samples(told.samples_BSF, told.labels_BS), rtol=1e-4, atol=1e-4)


def test_samples_without_any_spread_are_no_nan(samples: SampleEncoder) -> None:
    told = condition(3)
    assert samples(torch.ones_like(told.samples_BSF), told.labels_BS).isfinite().all()


def test_labels_matter_and_showing_all_samples_twice_does_not(samples: SampleEncoder) -> None:
    told = condition(3)
    told_BH = samples(told.samples_BSF, told.labels_BS)
    assert not torch.allclose(samples(told.samples_BSF, 1 - told.labels_BS), told_BH, atol=1e-2)
    twice_BH = samples(told.samples_BSF.repeat(1, 2, 1), told.labels_BS.repeat(1, 2))
    torch.testing.assert_close(twice_BH, told_BH, rtol=1e-5, atol=1e-5)


def test_a_class_without_samples_is_no_nan(samples: SampleEncoder) -> None:
    told = condition(2)
    assert bool(samples(told.samples_BSF, torch.zeros_like(told.labels_BS)).isfinite().all())


def test_condition_encoder_gives_three_tokens_and_every_part_reaches_them() -> None:
    torch.manual_seed(0)
    encoder = ConditionEncoder(num_features=6, max_classes=2, num_place_features=NUM_PLACE, width=WIDTH)
    told, places_MG = condition(2), torch.randn(7, NUM_PLACE)
    tokens = encoder(told.instructions, told.samples_BSF, told.labels_BS, places_MG)
    assert tokens.shape == (2, ConditionEncoder.num_tokens, WIDTH)
    others = [
        encoder(("other", "words"), told.samples_BSF, told.labels_BS, places_MG),
        encoder(told.instructions, told.samples_BSF.flip(2), told.labels_BS, places_MG),
        encoder(told.instructions, told.samples_BSF, told.labels_BS, places_MG + 1),
    ]
    for place, other in enumerate(others):
        changed = [not torch.allclose(tokens[:, t], other[:, t], atol=1e-3) for t in range(3)]
        assert changed == [t == place for t in range(3)]


def test_condition_summary_is_its_formula() -> None:
    torch.manual_seed(0)
    summary, place = ConditionSummary(WIDTH), PlaceEncoder(NUM_PLACE, WIDTH)
    prefix_BTH, places_MH = torch.randn(2, 3, WIDTH), place(torch.randn(4, NUM_PLACE))
    result_BMH = summary(prefix_BTH, places_MH)
    assert result_BMH.shape == (2, 4, WIDTH)
    for b in range(2):
        told_H = summary.told(prefix_BTH[b].flatten())
        for m in range(4):
            expected_H = places_MH[m] + told_H + places_MH[m] * told_H
            torch.testing.assert_close(result_BMH[b, m], expected_H, rtol=1e-5, atol=1e-5)
