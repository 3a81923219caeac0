"""Formulas of the pages as MathML, which browsers draw themselves: nothing is loaded for them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Return a page with its formulas converted; called by mkdocs."""

    def converted(match: re.Match[str]) -> str:
        text = unescape(match[2]).strip().replace("{aligned}", "{align*}")
        if match[1] == "span":
            return str(convert(text))
        # Browsers take the alignment of cells from styles only.
        block = re.sub(
            r'columnalign="(\w+)"', r'style="text-align:\1"', convert(text, display="block")
        )
        return f'<div style="overflow-x:auto">{block}</div>'

    return _FORMULA.sub(converted, html)
