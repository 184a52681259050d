"""The errors of few-shot comparisons."""

from __future__ import annotations


class FewShotError(ValueError):
    """A few-shot comparison cannot be made with these settings; the message names the reason and the remedy."""
