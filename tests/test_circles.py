"""No module of the library imports itself by way of others, inside functions and for types alone included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Circles that are still to be broken; this list only shrinks.
KNOWN = (
    (
        "raywgen.corpus.batch_stream",
        "raywgen.corpus.chunk_stream",
        "raywgen.corpus.corpus",
        "raywgen.corpus.dataset",
        "raywgen.corpus.summary",
        "raywgen.corpus.trajectory_stream",
    ),
)


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {_module(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "raywgen").rglob("*.py")}
    assert len(modules) > 200
    assert circles(modules) - set(KNOWN) == set()


def test_imports_in_functions_and_for_types_count_and_a_chain_does_not() -> None:
    modules = {
        "p": "",
        "p.a": "def f():\n    from p.b import g\n",
        "p.b": "if TYPE_CHECKING:\n    from p import c\n",
        "p.c": "import p.a\n",
        "p.d": "from p.e import thing\n",
        "p.e": "from p.c import other\n",
    }
    assert circles(modules) == {("p.a", "p.b", "p.c")}


def circles(modules: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Returns the groups of modules that import each other, sorted by name; modules are given by name and source."""
    imported = {name: set(_imports(source, modules)) - {name} for name, source in modules.items()}
    reached = {name: _reached(name, imported) for name in modules}
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in modules}
    return {group for group in groups if len(group) > 1}


def _imports(source: str, modules: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules or node.module in modules:
                    yield inner if inner in modules else str(node.module)


def _reached(start: str, imported: Mapping[str, set[str]]) -> set[str]:
    reached, pending = set(), [start]
    while pending:
        following = imported[pending.pop()] - reached
        reached |= following
        pending.extend(following)
    return reached


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
