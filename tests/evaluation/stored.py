"""Reads at once what an evaluation reads in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.evaluation.stored_networks import StoredNetworks


def every_value(stored: StoredNetworks) -> Tensor:
    """Returns the flat vectors of all stored networks."""
    return stored.values(torch.arange(len(stored)))
