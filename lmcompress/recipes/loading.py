"""From YAML to a validated recipe, with errors that name the key, the line and the nearest valid name."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lmcompress.errors import LmcompressError, nearest
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.training import Training

Path_ = tuple[str | int, ...]
"""Keys and indices from the top of a recipe."""

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 20_000, 32

ON_COMMAND_LINE = 0
"""The line number of a value that was given on the command line."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``on`` is a word and ``1e-4`` a number, which is not so in the YAML 1.1 of PyYAML."""


_Loader.yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))

# YAML 1.1 reads 010 as eight
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _number(node.value))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or one of the built-in ones by its name.

    Args:
        source: path of a YAML file, or a name of :func:`builtin_recipes`.
        overrides: ``key.path=value`` each, as on the command line: see :func:`parse_recipe`.

    Raises:
        LmcompressError: no such recipe, or it is not valid; the message names key and line.
    """
    path = Path(source)
    if path.is_file():
        if path.stat().st_size > MAX_BYTES:
            raise LmcompressError(f"{path} is larger than {MAX_BYTES >> 20} MiB; a recipe is a page of YAML")
        try:
            return parse_recipe(path.read_text("utf-8"), overrides, where=str(path))
        except UnicodeDecodeError as error:
            raise LmcompressError(f"{path} is not text in UTF-8: {error}") from error
    library = builtin_recipes()
    name = str(source)
    if name in library:
        return parse_recipe(library[name], overrides, where=f"built-in recipe {name}")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise LmcompressError(f"no such file: {path}")
    raise LmcompressError(f"no recipe {name!r}: neither a file nor built in{nearest(name, library)}")


def builtin_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to YAML text, sorted."""
    return {
        file.stem: file.read_text("utf-8") for file in sorted(_library().rglob("*.yaml"), key=lambda file: file.stem)
    }


def _library() -> Path:
    """The folder of built-in recipes: ``recipes/`` of a checkout, ``lmcompress/recipes/library/`` of a wheel.

    Raises:
        LmcompressError: If neither is there.
    """
    here = Path(__file__).resolve()
    for folder in (here.parent / "library", here.parents[2] / "recipes"):
        if next(folder.rglob("*.yaml"), None):
            return folder
    raise LmcompressError(
        f"the built-in recipes are missing from {here.parent / 'library'} and {here.parents[2] / 'recipes'}: "
        "reinstall lmcompress"
    )


def parse_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Validates a recipe's text. Nothing in it is executed or expanded.

    Args:
        text: YAML.
        overrides: ``key.path=value`` each, the value in YAML. Stages go by name
            (``stages.student.training.max_steps=10``) or number;
            ``training.…`` is for all stages.
        where: the file's name, for messages.

    Raises:
        LmcompressError: not YAML, a key twice, an unknown key, a value of the wrong type; every problem with its line.
    """
    document, lines = _read(text, where)
    for override in overrides:
        _apply(document, override, lines)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = list(_problems(error, lines, document))
        count = f"{len(problems)} problems" if len(problems) > 1 else "not valid"
        raise LmcompressError("\n  ".join([f"{where}: {count}", *problems])) from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that gives the same recipe when it is read.

    Args:
        recipe: any.

    Example:
        >>> text = "{name: a, model: m, task: {name: t}, stages: [{name: s}]}"
        >>> parse_recipe(dump_recipe(parse_recipe(text))) == parse_recipe(text)
        True
    """
    values = recipe.model_dump(mode="json", exclude_none=True)
    # PyYAML writes exotic line ends as they are, and reads them as spaces
    readable = json.dumps(values, ensure_ascii=False).isprintable()
    return yaml.dump(values, sort_keys=False, allow_unicode=readable, width=120, Dumper=_Dumper)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


class _Dumper(yaml.SafeDumper):
    """Without anchors; what either reader would take for something else than a text is quoted."""

    # ours reads 08 as a number, PyYAML's own as a text
    yaml_implicit_resolvers = {
        first: [
            *_Loader.yaml_implicit_resolvers.get(first, []),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read(text: str, where: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    lines: dict[Path_, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise LmcompressError(f"{where} is empty; lmcompress recipes show quickstart prints one to start from")
            if not isinstance(node, MappingNode):
                raise LmcompressError(f"{where} must be a mapping of keys to values, got something else on line 1")
            for count, (path, line) in enumerate(_walk(node, (), where, 0)):
                if count > MAX_NODES:
                    raise LmcompressError(f"{where} has more than {MAX_NODES} values; a recipe is a page of YAML")
                lines[path] = line
            document = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, LmcompressError):
            raise
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or error
        at_line = f", line {mark.line + 1}" if mark is not None else ""
        raise LmcompressError(f"{where}{at_line}: not valid YAML: {reason}") from error
    return document, lines


def _walk(node: Node, path: Path_, where: str, depth: int) -> Iterator[tuple[Path_, int]]:
    line = node.start_mark.line + 1
    if depth > MAX_DEPTH:
        raise LmcompressError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise LmcompressError(
            f"{where}, line {line}: the tag {node.tag!r} has no place in a recipe; write plain values"
        )
    if isinstance(node, MappingNode):
        yield path, line
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise LmcompressError(f"{where}, line {at}: keys must be plain words")
            if key.value in seen:
                raise LmcompressError(
                    f"{where}, line {at}: {_dotted((*path, key.value))} is there twice, first on line {seen[key.value]}"
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


def _apply(document: dict[str, Any], override: str, lines: dict[Path_, int]) -> None:
    """Sets one value in the document that was read."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise LmcompressError(f"an override must look like key.path=value, got {override!r}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LmcompressError(f"the value of the override {override!r} is not valid YAML") from error
    stages = document.get("stages")
    if keys[0] == "training":
        if len(keys) < 2:
            raise LmcompressError(
                "training=... needs a field, such as training.learning_rate=1e-4; it is for all stages"
            )
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            if isinstance(stage, dict):
                _set(document, ("stages", index, *keys), value, lines, override)
        return
    path: list[str | int] = list(keys)
    if keys[0] == "stages" and len(keys) > 1:
        path[1] = _stage_index(stages, keys[1], override)
    _set(document, tuple(path), value, lines, override)


def _stage_index(stages: Any, key: str, override: str) -> int:
    names = [str(s.get("name")) if isinstance(s, dict) else "" for s in stages] if isinstance(stages, list) else []
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(names):
        return int(key)
    raise LmcompressError(f"override {override!r}: no stage {key!r}{nearest(key, names)}")


def _set(document: Any, path: Path_, value: Any, lines: dict[Path_, int], override: str) -> None:
    at = document
    resolved: list[str | int] = []
    for depth, key in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(at, list):
            if not (isinstance(key, int) or key.isdecimal()) or int(key) >= len(at):
                raise LmcompressError(
                    f"override {override!r}: {_dotted(path[:depth])} has {len(at)} entries, no {key!r}"
                )
            key = int(key)
        elif not isinstance(at, dict):
            raise LmcompressError(f"override {override!r}: {_dotted(path[:depth])} is {at!r}, which has no {key!r}")
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


def _problems(error: ValidationError, lines: Mapping[Path_, int], document: Any) -> Iterator[str]:
    found: dict[Path_, tuple[type[BaseModel] | None, Any]] = {}
    for problem in error.errors(include_url=False):
        path, model = _locate(problem["loc"], document)
        # where a value may be of several types, the first one tells enough
        found.setdefault((*path, *problem.get("ctx", {}).get("path", ())), (model, problem))
    for path, (model, problem) in found.items():
        # ... and the branch that came furthest is the one that was meant
        is_of_parts = problem["type"].endswith("_type") or problem["type"] == "too_short"
        if is_of_parts and any(p[: len(path)] == path and len(p) > len(path) for p in found):
            continue
        yield f"{_line(path, lines)}{_dotted(path, document)}: {_says(path, model, problem)}"


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
            # pydantic names the branch of the union: by its type, or by the value of the field that tells them apart
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
    """The word by which a schedule is told from the others."""
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
    # a hundred names are no help
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


def _dotted(path: Path_, document: Any = None) -> str:
    """The path as an override would write it: stages by name."""
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int) and isinstance(document, dict):
        stages = document.get("stages")
        stage = stages[path[1]] if isinstance(stages, list) and path[1] < len(stages) else None
        if isinstance(stage, dict) and isinstance(stage.get("name"), str):
            path = ("stages", stage["name"], *path[2:])
    return ".".join(map(str, path)) or "recipe"


def _number(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))


__all__ = ["builtin_recipes", "dump_recipe", "load_recipe", "parse_recipe", "recipe_schema"]
