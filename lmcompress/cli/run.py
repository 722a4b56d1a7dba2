"""``lmcompress run``: carry out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcompress.cli.options import DryRun, Overrides, OverwriteStages


def run(
    recipe: Annotated[
        str, typer.Argument(help="Path of a YAML file, or name of a built-in recipe (lmcompress recipes list).")
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: runs/ and the recipe's name.")
    ] = None,
    dry_run: DryRun = False,
    overwrite: OverwriteStages = False,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Resume interrupted stages from their checkpoints, or restart them."),
    ] = True,
) -> None:
    """Run a recipe: train its stages, measure all models together, and write one self-contained folder.

    Running the same command again keeps finished stages and resumes the interrupted one.

    Examples:

      lmcompress run quickstart --dry-run

      lmcompress run quickstart training.learning_rate=1e-3 stages.student.training.num_train_epochs=5 -o runs/second
    """
    from lmcompress.cli.making import run_recipe
    from lmcompress.cli.values import RECIPE_KEYS
    from lmcompress.errors import arguments_called
    from lmcompress.recipes import load_recipe

    with arguments_called(RECIPE_KEYS):
        run_recipe(load_recipe(recipe, overrides or []), output, dry_run=dry_run, overwrite=overwrite, resume=resume)
