"""Writes the formulas of a page as MathML, which browsers show without scripts and without a network."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of `$...$` and `$$...$$`.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def with_mathml(page: str) -> str:
    """Returns the HTML of a page with its formulas as MathML."""
    return _FORMULA.sub(_formula, page)


def _formula(found: re.Match[str]) -> str:
    display = "block" if found["open"] == "[" else "inline"
    latex = html.unescape(found["latex"]).strip()
    # Browsers draw the overline of U+203E across its base, and the macron of U+00AF as a dot.
    mathml = convert(latex, display=display).replace("&#x000AF;", "&#x0203E;")
    # The source stands beside it for those who cannot see the formula.
    return mathml.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
