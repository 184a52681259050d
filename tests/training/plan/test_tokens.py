"""Tokens of a network by their number of levels, what they keep, and the rate at which a generator writes them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.pieces import GeneratedPiece
from raywgen.generators.reporting import KEPT, kept_at
from raywgen.training.plan import tokens as plan_tokens
from raywgen.training.plan.tokens import planned_tokens, values_per_second
from tests.builders import hypernetwork, igpg, igpg_config, layout_of, values_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tokens_are_those_that_the_tokeniser_writes() -> None:
    generator, layout = igpg(), layout_of()
    found = planned_tokens(generator, layout)
    assert found is not None
    (own,) = [row for row in found.rows if row.num_levels == found.num_levels]
    codes_BML = generator.tokens(values_of(num=1), layout)
    assert own.num_tokens == codes_BML.numel()
    num_codes = generator.tokenizer.quantiser.num_codes
    assert own.bits_per_value == pytest.approx(codes_BML.numel() * math.log2(num_codes) / layout.num_values)
    for less, more in pairwise(found.rows):
        assert less.num_levels < more.num_levels
        assert less.num_tokens * more.num_levels == more.num_tokens * less.num_levels


@pytest.mark.parametrize(("max_gib", "num_windows"), [(0.0, 3), (1e-9, 1)])
def test_memory_is_that_of_the_windows_written_at_once(max_gib: float, num_windows: int) -> None:
    config = igpg_config()
    config.prior.window = 2
    config.sampling = SamplingConfig(windows="parallel", max_rows=3, max_gib=max_gib)
    generator, layout = igpg(config), layout_of()
    found = planned_tokens(generator, layout)
    assert found is not None
    one, most = generator.bytes_at_once(layout, config.sampling, 1)
    assert found.windows_bytes == most == num_windows * one > 0


def test_a_generator_without_tokens_has_no_rows() -> None:
    assert planned_tokens(hypernetwork(), layout_of()) is None


def test_what_is_kept_lies_between_the_nearest_measured_bits() -> None:
    for kept in KEPT:
        assert kept_at(kept.bits_per_value) == kept
    assert kept_at(1.005 * KEPT[-1].bits_per_value) == KEPT[-1]
    below, above = KEPT[1:3]
    middle = kept_at((below.bits_per_value + above.bits_per_value) / 2)
    assert middle is not None
    assert middle.snr_db == pytest.approx((below.snr_db + above.snr_db) / 2)
    assert middle.points_lost == pytest.approx((below.points_lost + above.points_lost) / 2)
    assert kept_at(KEPT[0].bits_per_value / 2) is None
    assert kept_at(2 * KEPT[-1].bits_per_value) is None
    assert [kept.points_lost for kept in KEPT] == sorted((kept.points_lost for kept in KEPT), reverse=True)


@pytest.mark.parametrize("windows", ["sequential", "parallel"])
def test_the_rate_is_that_of_a_second_piece(windows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = igpg_config()
    config.prior.window = 2
    config.sampling = SamplingConfig(windows=windows, max_rows=1)  # pyright: ignore[reportArgumentType]
    generator, layout = igpg(config), layout_of()
    monkeypatch.setattr(plan_tokens, "_VALUES_OF_A_PIECE", 1)
    clock = iter([0.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    written: list[GeneratedPiece] = []
    write = IGPG.generate_piece

    def keep(self: IGPG, *given: object) -> GeneratedPiece:
        written.append(write(self, *given))  # pyright: ignore[reportArgumentType]
        return written[-1]

    monkeypatch.setattr(IGPG, "generate_piece", keep)
    assert len(generator.pieces(layout, generator.config.sampling, 1, 1)) > 2
    rate = values_per_second(generator, layout, generator.data)
    assert len(written) == 2
    assert rate == written[1].values_BX.numel() / 2.0


def test_a_small_network_is_written_twice_and_a_slow_piece_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, layout = hypernetwork(), layout_of()
    for times, expected in (([0.0, 1.0, 1.0, 5.0], layout.num_values / 4), ([0.0, 100.0], layout.num_values / 100)):
        clock = iter(times)
        monkeypatch.setattr("time.perf_counter", lambda clock=clock: next(clock))
        assert values_per_second(generator, layout, replace(generator.data)) == expected
