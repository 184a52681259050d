from __future__ import annotations

import torch

from raywgen.evaluation.intervals import half_width


def test_the_interval_holds_the_mean_in_95_of_100_samples() -> None:
    values_XN = torch.randn(20_000, 100, generator=torch.Generator().manual_seed(0))
    deviation_X = values_XN.std(dim=1).tolist()
    width_X = torch.tensor([half_width(deviation, 100) for deviation in deviation_X])
    held = (values_XN.mean(dim=1).abs() <= width_X).float().mean()
    assert abs(held - 0.947) < 0.005  # Of the normal interval at 100 values; that of Student would hold 0.950.
