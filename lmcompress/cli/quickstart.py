"""``lmcompress quickstart``: a first run, on data that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcompress.cli.options import DryRun, Overrides, OverwriteStages
from lmcompress.errors import LmcompressError, nearest

QUICKSTARTS = {"classification": "quickstart", "lm": "quickstart-lm"}


def quickstart(
    overrides: Overrides = None,
    task: Annotated[
        str, typer.Option("--task", help="Task to learn: classification (CLINC150) or lm (inaugural addresses).")
    ] = "classification",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: runs/quickstart[-lm].")
    ] = None,
    dry_run: DryRun = False,
    overwrite: OverwriteStages = False,
) -> None:
    """Train a small teacher, distil a student from it, and compare them; a few minutes on a CPU, no network.

    The data come with the package. This runs the built-in recipe [bold]quickstart[/] (or quickstart-lm): lmcompress
    recipes show quickstart

    Examples:

      lmcompress quickstart

      lmcompress quickstart --task lm --output runs/lm
    """
    if task not in QUICKSTARTS:
        raise LmcompressError(f"no quickstart for the task {task!r}{nearest(task, QUICKSTARTS)}")
    from lmcompress.cli.making import run_recipe
    from lmcompress.recipes import load_recipe

    recipe = load_recipe(QUICKSTARTS[task], overrides or [])
    run_recipe(recipe, output or Path("runs") / QUICKSTARTS[task], dry_run=dry_run, overwrite=overwrite)
