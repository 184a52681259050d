from __future__ import annotations

import pytest

from raywgen.names import nearest, one_of


@pytest.mark.parametrize(("typed", "meant"), [("MCDI", "mcdi"), ("mcid", "mcdi"), ("igp", "igpg"), ("", "igpg")])
def test_the_nearest_name_is_found_whatever_its_case(typed: str, meant: str) -> None:
    assert nearest(typed, ["igpg", "mcdi", "lohp"]) == meant


def test_a_choice_names_all_and_the_nearest() -> None:
    assert one_of("search", "optun", ("optuna", "random")) == (
        "search=optun: give one of optuna, random; did you mean 'optuna'?"
    )
