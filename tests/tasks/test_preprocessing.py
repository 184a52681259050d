from __future__ import annotations

import torch

from raywgen.tasks.preprocessing import InputForm


def test_inverted_samples_are_those_of_inverted_pixels() -> None:
    form = InputForm(size=4, channels=3, mean=(0.1, 0.5, 0.8), std=(0.3, 0.2, 0.4))
    x_SCHW = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples_SF = form.standardised(x_SCHW)
    torch.testing.assert_close(form.inverted(samples_SF), form.standardised(255 - x_SCHW))
    torch.testing.assert_close(form.pixels(samples_SF).view(x_SCHW.shape), x_SCHW / 255)
