"""Docstrings for the site: their roles and directives become Markdown, descriptions of fields become docstrings."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

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


def field_of(annotation: str) -> tuple[str, str] | None:
    """Type and description of ``Annotated[type, Field(description=...)]``; None for other annotations.

    Args:
        annotation: its source.
    """
    node = ast.parse(annotation, mode="eval").body
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated" and annotation.count("Field(")):
        return None
    wanted, *metadata = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for call in metadata:
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                return ast.unparse(wanted), str(keyword.value.value)
    return None


class Site(Extension):
    """Rewrites every docstring that is loaded, and gives fields of configurations one."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if isinstance(obj, Attribute) and obj.docstring is None and obj.annotation is not None:
            field = field_of(str(obj.annotation))
            if field is not None:
                obj.annotation, text = field
                obj.docstring = Docstring(text, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
