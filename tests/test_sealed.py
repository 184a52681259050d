"""A changed digit is distinguished from what was written."""

from __future__ import annotations

import json
import math

import pytest

from raywgen.sealed import SealError, seal, sealed_json, unseal

CONTENT = {"step": 120, "rate": 0.1, "name": "é", "shape": (2, 3), "bad": float("nan"), "by": {7: "a", 10: "b"}}


def test_what_was_sealed_is_read_back() -> None:
    for text in (sealed_json(CONTENT), sealed_json(CONTENT, indent=1).encode(), json.dumps(seal(CONTENT))):
        found = unseal(text)
        assert math.isnan(found.pop("bad"))
        assert found == {"step": 120, "rate": 0.1, "name": "é", "shape": [2, 3], "by": {"7": "a", "10": "b"}}


def test_every_flipped_byte_is_refused_or_changes_nothing() -> None:
    text = sealed_json({name: value for name, value in CONTENT.items() if name != "bad"}).encode()
    whole = unseal(text)
    refused = 0
    for place in range(len(text)):
        for mask in (1, 4, 32):
            damaged = bytearray(text)
            damaged[place] ^= mask
            try:
                assert unseal(bytes(damaged)) == whole
            except SealError:
                refused += 1
    assert refused > 2.9 * len(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "Expecting value"), ("[]", "a list, not an object"), (b"\xff", "utf-8"), ('{"step": 1}', "no checksum")],
)
def test_what_holds_nothing_says_so(text: str | bytes, reason: str) -> None:
    with pytest.raises(SealError, match=reason):
        unseal(text)


def test_an_object_without_a_checksum_is_read_where_that_is_allowed() -> None:
    assert unseal('{"step": 1}', is_required=False) == {"step": 1}
