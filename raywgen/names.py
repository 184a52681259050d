"""Says which name is meant by one that is wrong: every choice by name in configs and commands goes through here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """The known name that is most like another, whatever its case; the first one where none is like it."""
    names = [str(each) for each in known]
    assert names, "there is nothing to choose from"
    folded = {each.casefold(): each for each in reversed(names)}
    near = difflib.get_close_matches(str(name).casefold(), list(folded), n=1, cutoff=0.01)
    return folded[near[0]] if near else names[0]


def one_of(key: str, value: object, known: Iterable[object]) -> str:
    """Returns the message for a setting that takes one of some names and holds another."""
    names = [str(each) for each in known]
    return f"{key}={value}: give one of {', '.join(names)}; did you mean '{nearest(value, names)}'?"
