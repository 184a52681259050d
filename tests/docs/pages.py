"""What the pages of README and site hold: text, blocks of code and commands, in the order in which they are read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Its page, relative to the clone.
        language: The word behind the fence.
        text: Its lines.
    """

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.text.strip().splitlines()[0]}"


@dataclass(frozen=True)
class Line:
    """A command.

    Attributes:
        page: Its page, relative to the clone.
        words: As a shell splits it.
    """

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{' '.join(self.words)}"


class _Plain(yaml.SafeLoader):
    """Reads mkdocs.yml without what only mkdocs knows."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def navigation() -> list[str]:
    """The written pages of the site in the order of its table of contents."""
    content = yaml.load((ROOT / "mkdocs.yml").read_text(), _Plain)

    def places(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for one in entry.values() if isinstance(entry, dict) else entry:
                yield from places(one)

    return [place for place in places(content["nav"]) if (DOCS / place).is_file()]


PAGES = ["README.md", *(f"docs/{place}" for place in navigation()), "CONTRIBUTING.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    return [
        Block(page, kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in _BLOCK.findall(text_of(page))
    ]


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def lines_of(block: Block) -> Iterator[Line]:
    """Every command of a block for a shell; programs of a virtual environment stand under their own names."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(re.sub(r" >+ \S+", "", part), comments=True)
            if words:
                yield Line(block.page, (words[0].removeprefix(".venv/bin/"), *words[1:]))


def lines() -> Iterator[Line]:
    """Every command of every block for a shell."""
    for block in blocks("bash"):
        yield from lines_of(block)


def inline_commands(beginning: str) -> list[Line]:
    """Every command within a sentence that begins so."""
    found = []
    for page in PAGES:
        for code in _CODE.findall(_BLOCK.sub("", text_of(page))):
            text = " ".join(code.split())
            if text.startswith(beginning) and " " in text:
                found.append(Line(page, tuple(shlex.split(text))))
    return found
