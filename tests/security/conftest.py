"""Here nobody trusts anything but what a test says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raywgen import trust
from raywgen.corpus import Corpus
from tests.security.hostile import Payload, make_bundle, make_payload


@pytest.fixture(autouse=True)
def _no_trust() -> Iterator[None]:
    token = trust._TRUSTED.set(frozenset())
    yield
    trust._TRUSTED.reset(token)


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Payload:
    return make_payload(tmp_path, monkeypatch)


@pytest.fixture
def bundle(zoo_corpus: Corpus, tmp_path: Path) -> Path:
    return make_bundle(zoo_corpus, tmp_path / "run" / "generator")
