"""The errors of few-shot comparisons."""

from __future__ import annotations


class FewShotError(ValueError):
    """A comparison that cannot be made as asked; the message names what is wrong and the remedy."""
