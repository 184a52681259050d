"""Files by which an interrupted zoo goes on: damage is named with the file and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.corpus import CorpusError
from raywgen.sealed import sealed_json
from raywgen.zoo import train_zoo
from tests.conftest import TINY_ZOO


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "units" / "zoo.json"
    path.parent.mkdir()
    whole = sealed_json({"zoo": TINY_ZOO.recipe(), "executions": {"mlp": "stacked"}})
    for content in ("", whole[:-9], whole.replace("stacked", "stocked")):
        path.write_text(content)
        with pytest.raises(CorpusError, match=r"units/zoo\.json is damaged .*; delete it and run the same command"):
            train_zoo(TINY_ZOO, str(tmp_path), distributed=False)
