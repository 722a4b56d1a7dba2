"""Pydantic's validation errors of a recipe in words: the key, its line, and the nearest valid name."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lmcompress.errors import nearest
from lmcompress.recipes.overrides import ON_COMMAND_LINE
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.text import Path_, dotted
from lmcompress.recipes.training import Training

MOST_PROBLEMS = 20
"""The greatest number of problems of a recipe that a message lists."""


def problems(error: ValidationError, lines: Mapping[Path_, int], document: Any) -> list[str]:
    """The validation errors of a recipe, a line each: the first :data:`MOST_PROBLEMS`, and the number of others.

    Args:
        error: validation error of :class:`~lmcompress.recipes.schema.Recipe`.
        lines: lines of the recipe's values.
        document: the parsed recipe.
    """
    found: dict[Path_, tuple[type[BaseModel] | None, Any]] = {}
    for problem in error.errors(include_url=False):
        path, model = _locate(problem["loc"], document)
        # if a value may have several types, the first error is enough
        found.setdefault((*path, *problem.get("ctx", {}).get("path", ())), (model, problem))
    said: list[str] = []
    for done, (path, (model, problem)) in enumerate(found.items()):
        if len(said) == MOST_PROBLEMS:
            return [*said, f"… and {len(found) - done} more"]
        # ... and the branch that came furthest is the one that was meant
        is_of_parts = problem["type"].endswith("_type") or problem["type"] == "too_short"
        # a custom part, or else a mapping that names one
        is_of_parts = is_of_parts or str(problem["loc"][-1:]).startswith("('function-plain")
        if is_of_parts and any(p[: len(path)] == path and len(p) > len(path) for p in found):
            continue
        said.append(f"{_line(path, lines)}{dotted(path, document)}: {_says(path, model, problem)}")
    return said


def _says(path: Path_, model: type[BaseModel] | None, problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key{_nearest_key(str(path[-1]), model)}"
    if problem["type"] == "missing":
        return "is needed"
    if problem["type"] == "union_tag_invalid":
        known = [word.strip(" '") for word in problem["ctx"]["expected_tags"].split(",")]
        return f"no kind {problem['ctx']['tag']!r}{nearest(problem['ctx']['tag'], known)}"
    if problem["type"] == "union_tag_not_found":
        return "needs a kind; lmcompress recipes schema lists them"
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] in ("value_error", "reference"):
        return message
    shown = json.dumps(problem["input"], default=str, ensure_ascii=False)
    return f"{message[:1].lower()}{message[1:]}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _locate(location: Sequence[str | int], document: Any) -> tuple[Path_, type[BaseModel] | None]:
    """The path of an error in the document, without pydantic's marks of unions; and the model of its last key."""
    annotation: Any = Recipe
    owner: type[BaseModel] | None = None
    path: list[str | int] = []
    for key in location:
        options = [option for option in _unfold(annotation) if option is not type(None)]
        if len(options) > 1:
            # pydantic names the branch of the union: by its type, or by the value of the discriminating field
            named = [option for option in options if _branch(option) and _branch(option) in str(key)]
            named = named or [option for option in options if _kind(option) == key]
            annotation = named[-1] if named else options[0]
            continue
        option = options[0] if options else None
        owner = option if isinstance(option, type) and issubclass(option, BaseModel) else None
        path.append(key)
        annotation = _step(option, owner, key)
    return tuple(path), owner


def _branch(option: Any) -> str:
    return str(getattr(option, "__name__", option))


def _kind(option: Any) -> str | None:
    """The discriminating value of a schedule."""
    kind = getattr(option, "model_fields", {}).get("kind")
    return None if kind is None else str(kind.default)


def _step(option: Any, model: type[BaseModel] | None, key: str | int) -> Any:
    if model is not None:
        field = model.model_fields.get(str(key))
        return field.annotation if field else None
    inside = [argument for argument in typing.get_args(option) if argument is not ...]
    if typing.get_origin(option) is tuple and isinstance(key, int) and key < len(inside):
        return inside[key]
    return inside[-1] if inside else None


def _nearest_key(key: str, model: type[BaseModel] | None) -> str:
    names = list(model.model_fields) if model else []
    if model is not Training:
        return nearest(key, names)
    # a list of a hundred names is no help
    close = nearest(key, names).partition(" Valid are")[0]
    own = [name for name in names if name in Training.__annotations__]
    return f"{close} Valid are the fields of transformers.TrainingArguments, most of all: {', '.join(own)}"


def _unfold(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _unfold(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _unfold(option)
    else:
        yield annotation


def _line(path: Path_, lines: Mapping[Path_, int]) -> str:
    for length in range(len(path), -1, -1):
        line = lines.get(path[:length])
        if line is not None:
            return "command line: " if line == ON_COMMAND_LINE else f"line {line}: "
    return ""
