"""Seeding of torch's own generators."""

from __future__ import annotations

import torch

from raywgen.nn.devices import seed_torch


def test_a_seed_gives_the_numbers_that_torch_gives() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2**63 - 5)
        expected = torch.rand(4)
        seed_torch(2**63 - 5, torch.device("cpu"))
        assert torch.equal(torch.rand(4), expected)
