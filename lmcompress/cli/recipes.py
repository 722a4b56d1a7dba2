"""``lmcompress recipes``: list and print the built-in recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from lmcompress.cli.usage import Verb, Verbs
from lmcompress.errors import LmcompressError, nearest

recipes_app = typer.Typer(
    cls=Verbs, no_args_is_help=True, help="Look at the recipes that come with lmcompress.", rich_markup_mode="rich"
)


@recipes_app.command("list", cls=Verb)
def list_recipes() -> None:
    """List the built-in recipes.

    Examples:

      lmcompress recipes list

      lmcompress recipes list | grep prun
    """
    from rich.table import Table

    from lmcompress.cli.console import output_console
    from lmcompress.recipes import builtin_recipes, load_recipe

    table = Table("recipe", "what it does", "stages")
    for name in builtin_recipes():
        recipe = load_recipe(name)
        table.add_row(name, recipe.description.strip(), ", ".join(stage.name for stage in recipe.stages))
    output_console().print(table)


@recipes_app.command("show", cls=Verb, no_args_is_help=True)
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a built-in recipe, as in lmcompress recipes list.")],
) -> None:
    """Print a built-in recipe, as a starting point for one's own.

    Examples:

      lmcompress recipes show quickstart

      lmcompress recipes show quickstart-prune > my.yaml
    """
    from rich.syntax import Syntax

    from lmcompress.cli.console import output_console
    from lmcompress.recipes import builtin_recipes

    library = builtin_recipes()
    if name not in library:
        raise LmcompressError(f"no built-in recipe {name!r}{nearest(name, library)}")
    console = output_console()
    if console.is_terminal:
        console.print(Syntax(library[name], "yaml", background_color="default"))
    else:
        typer.echo(library[name], nl=False)


@recipes_app.command("schema", cls=Verb)
def show_schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    Examples:

      lmcompress recipes schema

      lmcompress recipes schema > recipe.schema.json
    """
    import json

    from lmcompress.recipes import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
