"""``lmcompress push``: upload a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcompress.errors import LmcompressError


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, as a run wrote it.")],
    repository: Annotated[str, typer.Argument(help="Name on the Hub, as user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is created.")] = False,
) -> None:
    """Upload a model with its card and report to the Hugging Face Hub (log in first: hf auth login).

    Examples:

      lmcompress push runs/quickstart/student my-name/clinc150-small

      lmcompress push runs/quickstart/student my-name/clinc150-small --private
    """
    if repository.count("/") != 1:
        raise LmcompressError(f"the repository must be user/name, got {repository!r}")
    from lmcompress.checkpoint.saving import push_folder

    typer.echo(push_folder(folder, repository, private=private or None))
