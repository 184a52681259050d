from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("own", "found"), [(None, "1"), ("0", "0")])
def test_large_pages_are_asked_for_unless_the_user_said_otherwise(own: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if own is None else {"THP_MEM_ALLOC_ENABLE": own}
    command = "import os, sys, raywgen; assert 'torch' not in sys.modules; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    output = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == found
