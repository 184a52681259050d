from __future__ import annotations

import ast
from pathlib import Path

import pytest

import raywgen

ROOT = Path(raywgen.__file__).parent
ORDER = {
    "generation": (
        *(
            "warn_caller",
            "statistics",
            "best",
            "conditions",
            "judge",
            "modules",
            "stored_names",
            "filled",
            "classifier",
            "head_names",
            "heads",
            "hub",
            "fill",
            "loading",
        ),
        *("adapt_config", "adapt_text", "adapt_next_word", "adapt"),
        *("config", "request", "plan", "worker", "executor", "early"),
        *("network_files", "sink", "file_sink", "adapter_sink", "sinks", "generate"),
        *("stored_network", "file_statistics"),
    ),
    "zoo": (
        "config",
        "draw",
        "meta_start",
        "plan",
        "execution",
        "measure",
        "stacks",
        "task_pool",
        "train",
        "replay",
        "describe",
    ),
}


@pytest.mark.parametrize("package", ORDER)
def test_no_module_imports_a_later_one(package: str) -> None:
    """Imports inside functions and for type checkers count too: they hide circles."""
    order = ORDER[package]
    assert set(order) == {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    for number, name in enumerate(order):
        imported = {
            node.module
            for node in ast.walk(ast.parse((ROOT / package / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        later = {f"raywgen.{package}.{other}" for other in order[number:]}
        assert not imported & {f"raywgen.{package}", *later}, name
