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

    Only the files that a user of the model needs are uploaded; what a run keeps beside them stays here.

    Examples:

      lmcompress push runs/quickstart/student my-name/clinc150-small

      lmcompress push runs/quickstart/student my-name/clinc150-small --private
    """
    if repository.count("/") != 1:
        raise LmcompressError(f"the repository must be user/name, got {repository!r}")
    from lmcompress.checkpoint.pushing import check_name, push_folder
    from lmcompress.recipes.lookup import check_model_folder, check_weights

    check_name(repository)
    if not folder.is_dir():
        raise LmcompressError(f"{folder} holds no checkpoint: there is no such folder")
    check_model_folder(folder)
    check_weights(folder)
    if not any(folder.glob("*.safetensors")):
        raise LmcompressError(f"{folder} has no weights in safetensors; load the model and save it again")
    typer.echo(push_folder(folder, repository, private=private or None))
