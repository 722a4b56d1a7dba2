"""``lmcompress compare``: several runs in one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcompress.errors import LmcompressError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of at least two runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Path of the HTML page.")] = Path("compare.html"),
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Name of a run in the page, one for each in order. Default: their folders' names."),
    ] = None,
) -> None:
    """Put the results of several runs side by side in one self-contained HTML page.

    Examples:

      lmcompress compare runs/quickstart runs/second

      lmcompress compare runs/quickstart runs/second --name first --name second --output both.html
    """
    if len(runs) < 2:
        raise LmcompressError(f"there is nothing to compare {runs[0]} with: name at least two runs")
    for folder in runs:
        if not folder.is_dir():
            raise LmcompressError(
                f"{folder} is a file; a run is a folder" if folder.exists() else f"no such folder: {folder}"
            )
    if name and len(name) != len(runs):
        raise LmcompressError(f"--name must be given once for each of the {len(runs)} runs, got {len(name)}")
    from lmcompress.recipes.progress import quiet_libraries
    from lmcompress.reporting.compare import compare_runs

    with quiet_libraries():
        page = compare_runs(runs, output, name)
    typer.echo(f"written: {page}")
