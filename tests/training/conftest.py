"""What several tests of training share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def lasting_group(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A group of this process alone, as Ray Train makes one of all workers; DeepSpeed takes no second one."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


@pytest.fixture
def process_group(lasting_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group, and the variables that DeepSpeed reads even where a group is there already."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
