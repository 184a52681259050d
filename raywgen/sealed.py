"""JSON objects that carry their own checksum, so that a change of the file is detected."""

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


def seal(content: Mapping[str, object]) -> dict[str, Any]:
    """Returns a JSON object with its checksum as the last key."""
    # The checksum is that of the parsed text, in which tuples are lists and all keys are text.
    parsed: dict[str, Any] = json.loads(json.dumps(content))
    return parsed | {CHECKSUM: checksum(parsed)}


def sealed_json(content: Mapping[str, object], indent: int | None = None) -> str:
    """Returns the text of a JSON object with its checksum."""
    return json.dumps(seal(content), indent=indent)


def unseal(text: str | bytes, *, is_required: bool = True) -> dict[str, Any]:
    """Returns the content that `sealed_json` was given.

    Args:
        text: The text that `sealed_json` returned.
        is_required: Whether to refuse an object without a checksum.

    Raises:
        SealError: The text is no JSON object, has no checksum, or was changed since it was written.
    """
    try:
        content = parse_json(text)
    except ValueError as error:  # Also raised for bytes that are not UTF-8.
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


def checksum(content: Mapping[str, object]) -> str:
    """Returns the SHA-256 of a JSON object; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: str | Path) -> str:
    """Returns the SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
