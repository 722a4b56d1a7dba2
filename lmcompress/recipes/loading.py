"""From YAML to a validated recipe, with errors that give the key, the line and the nearest valid name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmcompress.errors import LmcompressError, nearest
from lmcompress.recipes.overrides import override
from lmcompress.recipes.problems import MOST_PROBLEMS, problems
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.text import MAX_BYTES, read_yaml, write_yaml


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or a built-in one by name.

    Args:
        source: path of a YAML file, or a name in :func:`builtin_recipes`.
        overrides: ``key.path=value`` each, as on the command line: see :func:`parse_recipe`.

    Raises:
        LmcompressError: If there is no such recipe, or it is not valid; the message gives key and line.
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
        where: the file's name in messages.

    Raises:
        LmcompressError: If it is not YAML, or has a duplicate key, an unknown key or a value of
            the wrong type; the first twenty problems with their lines.
    """
    document, lines = read_yaml(text, where)
    for one in overrides:
        override(document, one, lines)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        found = problems(error, lines, document)
        many = f"more than {MOST_PROBLEMS}" if len(found) > MOST_PROBLEMS else str(len(found))
        count = f"{many} problems" if len(found) > 1 else "not valid"
        raise LmcompressError("\n  ".join([f"{where}: {count}", *found])) from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that reads back as the same recipe.

    Args:
        recipe: any recipe.

    Example:
        >>> text = "{name: a, model: m, task: {name: t}, stages: [{name: s}]}"
        >>> parse_recipe(dump_recipe(parse_recipe(text))) == parse_recipe(text)
        True
    """
    return write_yaml(recipe.model_dump(mode="json", exclude_none=True))


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
