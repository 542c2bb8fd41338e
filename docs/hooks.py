"""What mkdocs does to a page first: formulas become MathML, which browsers draw without a script, and links out of the
manual, to files that the site doesn't have, become plain text.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK_OUT = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **unused: Any) -> str:
    with_formulas = FORMULA.sub(lambda block: convert(block[1], display="block"), markdown)
    return LINK_OUT.sub(r"\1", with_formulas)
