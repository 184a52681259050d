"""Suggests the right name for a wrong one, for every choice by name in configs and commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns the known name most similar to another, ignoring case; the first one if none is similar."""
    names = [str(each) for each in known]
    assert names, "there is nothing to choose from"
    folded = {each.casefold(): each for each in reversed(names)}
    near = difflib.get_close_matches(str(name).casefold(), list(folded), n=1, cutoff=0.01)
    return folded[near[0]] if near else names[0]


def one_of(key: str, value: object, known: Iterable[object]) -> str:
    """Returns the message for a setting whose value is not one of the known names."""
    names = [str(each) for each in known]
    return f"{key}={value}: give one of {', '.join(names)}; did you mean '{nearest(value, names)}'?"
