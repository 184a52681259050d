"""Writes the page of examples: what each program says of itself, and its code."""

from __future__ import annotations

import ast
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
_HEAD = """# Examples

Programs that run as they are, in a clone, each from data to result; tests run them at small size. A notebook of the
[quickstart](quickstart.md) lies beside them, `examples/quickstart.ipynb`."""


def example_page(folder: Path = EXAMPLES) -> str:
    """Returns the Markdown of the page, with the programs of a folder in the order of their names."""
    return "\n\n".join([_HEAD, *map(_example, sorted(folder.glob("*.py")))]) + "\n"


def _example(path: Path) -> str:
    code = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(code)) or ""
    # What follows the docstring; the docstring is the text above it.
    body = code.split('"""', 2)[-1].strip()
    indented = "\n".join(f"    {line}".rstrip() for line in body.splitlines())
    return f'## {path.stem}\n\n{about}\n\n??? example "examples/{path.name}"\n\n    ```python\n{indented}\n    ```'
