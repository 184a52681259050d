"""Every docstring of the library says something to a reader who knows only the signature."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARGUMENTS = re.compile(r"^Args:\n((?:    .*\n?|\n)*)", re.MULTILINE)
FRAGMENT = re.compile(
    r"""`?(
    about|after|alike|although|among|and|as|at|because|before|behind|below|besides?|between|beyond|but|by|during|for|from|how|
    in|inside|into|like|nor|of|off|on|onto|or|out|outside|over|per|since|than|that|therefore|those|through|towards?|to|under|
    until|what|where|which|whom?|whose|why|within|without|with
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
"""First words after which a text is a piece of a sentence, for which the reader has to guess the rest.

Full sentences seldom begin so in a docstring ("In training, ..."); these are said the other way round.
"""

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def offence(docstring: str) -> str | None:
    """Says what is wrong with a docstring, or None where nothing is."""
    if FRAGMENT.match(docstring):
        return "begins as a fragment"
    words = docstring.split()
    is_verb = bool(words) and words[0].isalpha() and words[0].endswith("s") and not words[0].endswith("ss")
    if len(words) < 3 or (len(words) == 3 and not is_verb):
        return "is too short to say anything"
    return None


def offences(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and complaint of each docstring of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
        if docstring is not None and (complaint := offence(docstring)):
            yield getattr(node, "lineno", 1), f"`{docstring.splitlines()[0] if docstring else ''}` {complaint}"


def test_docstrings_are_sentences() -> None:
    found: list[str] = []
    for path in sorted(file for top in ("raywgen", "jobs") for file in (ROOT / top).rglob("*.py")):
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in offences(path.read_text("utf-8"))]
    assert not found, (
        "Write plain English of three words at least that begins with a subject or a verb "
        '("The rows that ...", "Returns ...").\n' + "\n".join(found)
    )


def strangers(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and complaint of each argument that a docstring describes and its function does not have."""
    for node in ast.walk(ast.parse(source)):
        function: ast.AST | None = node
        if isinstance(node, ast.ClassDef):
            function = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
        if not isinstance(node, DEFINITIONS) or not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        found = function.args
        known = {argument.arg for argument in [*found.posonlyargs, *found.args, *found.kwonlyargs]}
        known |= {argument.arg for argument in (found.vararg, found.kwarg) if argument is not None}
        section = ARGUMENTS.search(ast.get_docstring(node) or "")
        for name in re.findall(r"^    (\w+):", section[1] if section else "", re.MULTILINE):
            if name not in known:
                yield getattr(node, "lineno", 1), f"describes '{name}', which is no argument"


def test_docstrings_describe_arguments_that_are_there() -> None:
    found: list[str] = []
    for path in sorted(file for top in ("raywgen", "jobs") for file in (ROOT / top).rglob("*.py")):
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in strangers(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_an_argument_that_was_renamed_is_seen() -> None:
    source = 'def f(a):\n    """Returns a.\n\n    Args:\n        b: Old name.\n        c: Gone.\n    """\n'
    assert [what for _, what in strangers(source)] == [f"describes '{name}', which is no argument" for name in "bc"]
    assert not list(strangers(source.replace("def f(a)", "def f(b, *, c)")))


@pytest.mark.parametrize(
    "docstring",
    [
        "Of the prior.",
        "As `Coder`.",
        "What `build_network` takes.",
        "`Of` it.",
        "L.",
        "One network.",
        "The denoiser.",
        "",
    ],
)
def test_fragments_and_single_words_are_refused(docstring: str) -> None:
    assert offence(docstring) is not None


@pytest.mark.parametrize(
    "docstring",
    [
        "Returns the layout.",
        "Number of tokens, L.",
        "One network of a corpus.",
        "Whether the run has ended.",
        "`forward(x)`, but without gradients.",
    ],
)
def test_sentences_and_noun_phrases_pass(docstring: str) -> None:
    assert offence(docstring) is None


def test_private_and_nested_definitions_are_looked_at() -> None:
    source = 'class A:\n    def _b(self):\n        """Of it."""\n        def c():\n            """L."""\n'
    assert [line for line, _ in offences(source)] == [2, 4]
