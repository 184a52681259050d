"""The search space: its form in YAML, and drawing one knob after another.

A knob with `when` exists only where another knob has one of the values named there; otherwise its key keeps its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raywgen.config import ConfigError
from raywgen.names import nearest

if TYPE_CHECKING:
    import optuna

KINDS = ("choice", "uniform", "loguniform", "int")
_WHEN = "when"
Values = dict[str, Any]
"""Values of the knobs that exist, by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One key that is searched over.

    Attributes:
        key: Dotted key.
        kind: One of `KINDS`.
        choices: Values of a choice, in order.
        low: Lowest value of the other kinds, inclusive.
        high: Highest value, inclusive.
        when: Key of another knob -> its values for which this one exists; all must hold.
    """

    key: str
    kind: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def exists(self, drawn: Values) -> bool:
        """Whether the knob exists beside these values of other knobs."""
        return all(key in drawn and drawn[key] in values for key, values in self.when.items())

    def corners(self) -> tuple[Any, ...]:
        """Returns the extreme values: all choices, or both ends."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)


def flatten(tree: Mapping[Any, Any], is_leaf: Callable[[Any], bool], prefix: str = "") -> dict[str, Any]:
    """Turns nested mappings into dotted keys; keys that are dotted already may be among them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= {name: value} if is_leaf(value) else flatten(value, is_leaf, f"{name}.")
    return flat


def parse_space(tree: Mapping[str, Any]) -> tuple[Knob, ...]:
    """Reads a space and orders its knobs so that each comes after those that it depends on.

    Raises:
        ConfigError: A knob is malformed, or depends on an unknown knob or on itself; the message names it.
    """
    found = flatten(tree, lambda value: not isinstance(value, dict) or not value or bool(set(KINDS) & set(value)))
    if not found:
        raise ConfigError("space is empty: name a knob, for instance {train.seed: {int: [0, 9]}}")
    left = {key: _knob(key, value) for key, value in found.items()}
    for knob in left.values():
        for key, values in knob.when.items():
            _check_when(knob.key, left, key, values)
    ordered: dict[str, Knob] = {}
    while left:
        ready = [knob for knob in left.values() if set(knob.when) <= set(ordered)]
        if not ready:
            raise ConfigError(f"space: {', '.join(left)} wait for each other by `when`; take one out")
        for knob in ready:
            ordered[knob.key] = left.pop(knob.key)
    return tuple(ordered.values())


def _knob(key: str, spec: Any) -> Knob:
    hint = "write it as {choice: [a, b]}, {uniform: [low, high]}, {loguniform: [low, high]} or {int: [low, high]}"
    kinds = [kind for kind in KINDS if isinstance(spec, dict) and kind in spec]
    if len(kinds) != 1:
        raise ConfigError(f"space: {key} is {spec!r}; {hint}")
    if unknown := set(spec) - {*kinds, _WHEN}:
        raise ConfigError(f"space: {key} has {', '.join(sorted(map(str, unknown)))}; {hint}, and `when` beside it")
    (kind,), values = kinds, spec[kinds[0]]
    when = _conditions(key, spec.get(_WHEN) or {})
    if not isinstance(values, list | tuple):
        raise ConfigError(f"space: {key}: {kind} takes a list, not {values!r}; {hint}")
    if kind == "choice":
        if not values or any(values.count(value) > 1 for value in values):
            raise ConfigError(f"space: {key}: choice takes values that differ, at least one, not {values!r}")
        return Knob(key=key, kind=kind, choices=tuple(values), when=when)
    numbers = int if kind == "int" else int | float
    if len(values) != 2 or not all(isinstance(end, numbers) and not isinstance(end, bool) for end in values):
        raise ConfigError(f"space: {key}: {kind} takes two {'whole ' * (kind == 'int')}numbers, not {values!r}")
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (kind == "loguniform" and low <= 0):
        more = " above 0" if kind == "loguniform" else ""
        raise ConfigError(f"space: {key}: {kind} takes a lower and a higher number{more}, not {values!r}")
    return Knob(key=key, kind=kind, low=low, high=high, when=when)


def _conditions(key: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, dict):
        raise ConfigError(f"space: {key}: `when` takes OTHER_KEY: value, not {when!r}")
    flat = flatten(when, lambda value: not isinstance(value, dict))
    return {other: tuple(value) if isinstance(value, list) else (value,) for other, value in flat.items()}


def _check_when(key: str, knobs: Mapping[str, Knob], other: str, values: tuple[Any, ...]) -> None:
    if other not in knobs:
        near = nearest(other, knobs)
        raise ConfigError(f"space: {key} exists when {other} has a value, which is no knob; did you mean {near}?")
    known = knobs[other]
    for value in values:
        if not (value in known.choices if known.kind == "choice" else known.low <= value <= known.high):
            raise ConfigError(f"space: {key} exists when {other} is {value!r}, which it never is")


def draw(knobs: tuple[Knob, ...], trial: optuna.Trial) -> Values:
    """Draws, by Optuna's sampler, one value for each knob that exists beside the values before it."""
    drawn: Values = {}
    for knob in knobs:
        if not knob.exists(drawn):
            continue
        if knob.kind == "choice":
            # The index is drawn, because Optuna takes no lists as choices.
            drawn[knob.key] = knob.choices[trial.suggest_categorical(knob.key, list(range(len(knob.choices))))]
        elif knob.kind == "int":
            drawn[knob.key] = trial.suggest_int(knob.key, int(knob.low), int(knob.high))
        else:
            is_log = knob.kind == "loguniform"
            drawn[knob.key] = trial.suggest_float(knob.key, knob.low, knob.high, log=is_log)
    return drawn
