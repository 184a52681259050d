"""The kind of device that networks are generated on, decided before anything begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raywgen.generation import GenerateConfig
from raywgen.generation.executor import chosen_device, say_place
from raywgen.nn.devices import DeviceError


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("where", ["here", "ray"])
def test_a_gpu_that_is_not_there_is_noticed_before_ray_starts(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(DeviceError, match=r"^device=cuda: torch"):
        chosen_device(GenerateConfig(where=where, device="cuda"))


def test_actors_take_gpus_where_ray_has_some(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for found, device in ((2.0, "cuda"), (0.0, "cpu")):
        monkeypatch.setattr(ray, "cluster_resources", lambda found=found: {"CPU": 4.0, "GPU": found})
        asked = GenerateConfig(where="ray", out="x")
        assert chosen_device(asked) == device
        say_place(replace(asked, device=chosen_device(asked)), asked.device)
        assert chosen_device(GenerateConfig(where="ray", device="cpu")) == "cpu"
        say_place(replace(asked, device="cpu"), "cpu")
    assert capfd.readouterr().err.splitlines() == ["x: generates on GPUs of Ray", "x: generates on CPUs of Ray"]
    with pytest.raises(DeviceError, match="the Ray cluster has no GPU"):
        chosen_device(GenerateConfig(where="ray", device="cuda"))
