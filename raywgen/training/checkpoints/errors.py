"""Errors and warnings of checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class CheckpointWarning(UserWarning):
    """A checkpoint is passed over, and training goes on from the one before."""


class SaveError(RuntimeError):
    """A checkpoint that cannot be written; the message says why, and which is the last one that is durable."""
