"""What can be wrong with a few-shot comparison."""

from __future__ import annotations


class FewShotError(ValueError):
    """A comparison that cannot be made as asked; the message names what is wrong and the remedy."""
