from __future__ import annotations

import pytest

from raywgen.evaluation.report.words import counted, listed


@pytest.mark.parametrize(
    ("num", "said"),
    [(0, "0 networks"), (1, "1 network"), (1.2, "1 network"), (1.6, "2 networks"), (1234, "1,234 networks")],
)
def test_a_count_agrees_with_its_noun_as_it_is_shown(num: float, said: str) -> None:
    assert counted(num, "network") == said


@pytest.mark.parametrize(("names", "said"), [("", ""), ("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_names_are_listed_as_in_a_sentence(names: str, said: str) -> None:
    assert listed(list(names)) == said
