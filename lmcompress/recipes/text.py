"""YAML 1.2 with the line of every value: parsed, refusing features that have no place in a recipe, and written."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lmcompress.errors import LmcompressError

Path_ = tuple[str | int, ...]
"""Keys and indices from the top of a recipe."""

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 20_000, 32

_UNFOLDED = 1 << 30


_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")
"""What YAML finds plain values to be; all else was written as a tag."""


class _Constructor(SafeConstructor):
    """JSON types only: a date is a string."""


for _tag in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", SafeConstructor.construct_yaml_str)


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    """A mapping of keys to plain values, and the line of each.

    Args:
        text: YAML.
        where: the file's name in messages.

    Raises:
        LmcompressError: If it is not YAML or not a mapping, has a duplicate key, a tag, or too many values; with the
    """
    lines: dict[Path_, int] = {}
    reader = _reader()
    try:
        node = reader.compose(text)
        if node is None:
            raise LmcompressError(f"{where} is empty; lmcompress recipes show quickstart prints one to start from")
        if not isinstance(node, MappingNode):
            raise LmcompressError(f"{where} must be a mapping of keys to values, got something else on line 1")
        for count, (path, line) in enumerate(_walk(node, (), where, 0)):
            if count > MAX_NODES:
                raise LmcompressError(f"{where} has more than {MAX_NODES} values; a recipe is a page of YAML")
            lines[path] = line
        return reader.constructor.construct_document(node), lines
    except LmcompressError:
        raise
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or error
        at_line = f", line {mark.line + 1}" if mark is not None else ""
        raise LmcompressError(f"{where}{at_line}: not valid YAML: {reason}") from error


def yaml_value(text: str) -> Any:
    """The value of a text.

    Args:
        text: YAML on one line, such as ``1e-4`` or ``[1, 2]``.

    Raises:
        LmcompressError: If it is not YAML.
    """
    try:
        return _reader().load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise LmcompressError(f"not valid YAML: {text!r}") from error


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that :func:`read_yaml` reads back, without anchors.

    Args:
        values: JSON types.
    """
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style = False
    # declared as None
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    # exotic line ends would be written unchanged, and read as spaces
    writer.allow_unicode = json.dumps(values, ensure_ascii=False).isprintable()
    # a text of escapes is folded where it has no space, and read with one
    writer.width = 120 if writer.allow_unicode else _UNFOLDED
    writer.representer.ignore_aliases = lambda *_: True
    writer.dump(values, stream)
    return stream.getvalue()


def dotted(path: Path_, document: Any = None) -> str:
    """A path in the spelling of an override: stages by name.

    Args:
        path: keys and indices.
        document: the recipe, for the names of its stages.
    """
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int) and isinstance(document, dict):
        stages = document.get("stages")
        stage = stages[path[1]] if isinstance(stages, list) and path[1] < len(stages) else None
        if isinstance(stage, dict) and isinstance(stage.get("name"), str):
            path = ("stages", stage["name"], *path[2:])
    return ".".join(map(str, path)) or "recipe"


def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    return reader


def _walk(node: Node, path: Path_, where: str, depth: int) -> Iterator[tuple[Path_, int]]:
    line = node.start_mark.line + 1
    if depth > MAX_DEPTH:
        raise LmcompressError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
    tag = node.tag or ""
    if tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise LmcompressError(f"{where}, line {line}: the tag {tag!r} has no place in a recipe; write plain values")
    if isinstance(node, MappingNode):
        yield path, line
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise LmcompressError(f"{where}, line {at}: keys must be plain words")
            if key.value in seen:
                raise LmcompressError(
                    f"{where}, line {at}: {dotted((*path, key.value))} is there twice, first on line {seen[key.value]}"
                )
            seen[key.value] = at
            yield (*path, key.value), at
            for below, below_line in _walk(value, (*path, key.value), where, depth + 1):
                # a key's line, not that of the mapping under it
                if below != (*path, key.value):
                    yield below, below_line
    elif isinstance(node, SequenceNode):
        yield path, line
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), where, depth + 1)
    else:
        yield path, line
