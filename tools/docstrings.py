"""Docstrings for the site: the roles and directives that they have become Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(
    r":(?:py:)?(?:class|func|meth|mod|data|attr|exc|obj):"
    r"`~?(?:[\w.]*\.)?([\w ]+(?:\(\))?)(?: <[^>]*>)?`"
)
_RULE = r"=+(?:[ ]+=+)+[ ]*"
_TABLE = re.compile(rf"^([ ]*){_RULE}\n(?:\1.*\n)*?\1{_RULE}\n(?:\1.*\n)*?\1{_RULE}$", re.MULTILINE)
# griffe knows the section by its plural; an "Example:" would be prose, and its indexing `a[0][1]` a link
_EXAMPLE = re.compile(r"^([ ]*)Example:$", re.MULTILINE)
_MATH_ROLE = re.compile(r":math:`([^`]*)`")
_MATH = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n(?:\1[ ]+.*|[ ]*))*)", re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring with cross-references as code, and tables and formulas as blocks of code."""
    text = _TABLE.sub(lambda found: _block(found[1], "text", found[0]), text)
    text = _EXAMPLE.sub(r"\1Examples:", _MATH.sub(_formula, text))
    return _MATH_ROLE.sub(r"`\1`", _ROLE.sub(r"`\1`", text)).replace("``", "`")


def _formula(found: re.Match[str]) -> str:
    return _block(found[1], "tex", found[2])


def _block(indent: str, language: str, text: str) -> str:
    """Text as a block of code."""
    body = textwrap.dedent(text).strip()
    return textwrap.indent(f"~~~{language}\n{body}\n~~~\n\n", indent)


class Roles(Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
