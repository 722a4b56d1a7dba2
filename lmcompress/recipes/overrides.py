"""Values of a recipe given on the command line."""

from __future__ import annotations

from typing import Any

from lmcompress.errors import LmcompressError, nearest
from lmcompress.recipes.text import Path_, dotted, yaml_value

ON_COMMAND_LINE = 0
"""The line number of a value that was given on the command line."""


def override(document: dict[str, Any], text: str, lines: dict[Path_, int]) -> None:
    """Set one value in a parsed recipe.

    Args:
        document: the recipe; modified in place.
        text: ``key.path=value``, as for :func:`~lmcompress.recipes.loading.parse_recipe`.
        lines: lines of its values; modified in place.

    Raises:
        LmcompressError: If the text is malformed, or the key does not exist.
    """
    path_text, equals, value_text = text.partition("=")
    keys = path_text.strip().split(".")
    if not equals or not all(keys):
        raise LmcompressError(f"an override must look like key.path=value, got {text!r}")
    try:
        value = yaml_value(value_text)
    except LmcompressError as error:
        raise LmcompressError(f"the value of the override {text!r} is not valid YAML") from error
    stages = document.get("stages")
    if keys[0] == "training":
        if len(keys) < 2:
            raise LmcompressError(
                "training=... needs a field, such as training.learning_rate=1e-4; it is for all stages"
            )
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            if isinstance(stage, dict):
                _set(document, ("stages", index, *keys), value, lines, text)
        return
    path: list[str | int] = list(keys)
    if keys[0] == "stages" and len(keys) > 1:
        path[1] = _stage_index(stages, keys[1], text)
    _set(document, tuple(path), value, lines, text)


def _stage_index(stages: Any, key: str, text: str) -> int:
    names = [str(s.get("name")) if isinstance(s, dict) else "" for s in stages] if isinstance(stages, list) else []
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(names):
        return int(key)
    raise LmcompressError(f"override {text!r}: no stage {key!r}{nearest(key, names)}")


def _set(document: Any, path: Path_, value: Any, lines: dict[Path_, int], text: str) -> None:
    at = document
    resolved: list[str | int] = []
    for depth, key in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(at, list):
            if not (isinstance(key, int) or key.isdecimal()) or int(key) >= len(at):
                raise LmcompressError(f"override {text!r}: {dotted(path[:depth])} has {len(at)} entries, no {key!r}")
            key = int(key)
        elif not isinstance(at, dict):
            raise LmcompressError(f"override {text!r}: {dotted(path[:depth])} is {at!r}, which has no {key!r}")
        resolved.append(key)
        if is_last:
            at[key] = value
        else:
            # an empty key in YAML is None
            if isinstance(at, dict) and at.get(key) is None:
                at[key] = {}
            at = at[key]
    for length in range(1, len(resolved) + 1):
        lines.setdefault(tuple(resolved[:length]), ON_COMMAND_LINE)
    lines[tuple(resolved)] = ON_COMMAND_LINE
