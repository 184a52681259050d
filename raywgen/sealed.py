"""JSON that carries its own checksum, so that a changed digit is told from what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywgen.inputs import open_regular, parse_json

CHECKSUM = "checksum"


class SealError(ValueError):
    """A JSON object that is damaged; the message says how."""


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as a last key."""
    # Read back as it will be read: numbers, keys and tuples compare as JSON has them.
    told: dict[str, Any] = json.loads(json.dumps(content))
    return told | {CHECKSUM: checksum(told)}


def sealed_json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """The text of a JSON object with its checksum."""
    return json.dumps(seal(content), indent=indent)


def unseal(text: str | bytes, *, is_required: bool = True) -> dict[str, Any]:
    """The content that `sealed_json` was given.

    Args:
        text: What was written.
        is_required: Whether an object without a checksum is refused, or returned as it is.

    Raises:
        SealError: The text is no JSON object, has no checksum, or was changed since it was written.
    """
    try:
        content = parse_json(text)
    except ValueError as error:  # Bytes that are no UTF-8, too.
        raise SealError(str(error)) from error
    if not isinstance(content, dict):
        raise SealError(f"it holds a {type(content).__name__}, not an object")
    found = content.pop(CHECKSUM, None)
    if found is None:
        if is_required:
            raise SealError("it has no checksum")
    elif found != checksum(content):
        raise SealError("it was changed since it was written: its checksum differs")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
