"""Exports of a run: models of its stages for other runtimes, made after the last stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lmcompress.errors import LmcompressError
from lmcompress.export import ExportConfig, export_model
from lmcompress.export.folder import RECORD
from lmcompress.export.optional import check_exporter
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.contents import Dependencies
from lmcompress.recipes.files import write_json
from lmcompress.recipes.fingerprints import digest
from lmcompress.recipes.materials import drawn_batches
from lmcompress.recipes.planning import Plan, StagePlan
from lmcompress.recipes.schema import EXPORTS, Recipe

_MADE_FROM = "made_from.json"

_ROWS, _ROWS_AT_ONCE = 64, 8


def check_exports(recipe: Recipe) -> None:
    """Refuse exports for which a library is missing, before anything is trained.

    Args:
        recipe: validated recipe.

    Raises:
        LmcompressError: If a library is missing or too old; the message names the stage.
    """
    for stage in recipe.stages:
        for config in stage.export:
            try:
                check_exporter(config.to)
            except LmcompressError as error:
                raise LmcompressError(f"stage {stage.name!r}, export to {config.to}: {error}") from error


def export_stages(
    planned: Plan, folder: Path, needs: Mapping[str, Dependencies], console: Console
) -> list[dict[str, Any]]:
    """Make the exports of a run whose stages are finished; those made from the same model and settings are kept.

    Training rows are what ranges are calibrated on where a runtime needs others, and what the exports are checked with.

    Args:
        planned: the plan.
        folder: folder of the run.
        needs: what each stage depends on.
        console: console for a line for each export.

    Returns:
        For each export ``stage``, ``folder`` (within the run's) and the record of the export, as JSON types.

    Raises:
        LmcompressError: If a runtime cannot hold a model; the message names the stage.
    """
    found = []
    for entry in planned.stages:
        for config in entry.stage.export:
            place = Path(EXPORTS) / entry.stage.name / config.to
            made_from = {"hash": digest([needs[entry.stage.name].hash, config.model_dump(mode="json")])}
            if _made_from(folder / place) == made_from:
                console.print(f"{place}: already finished, kept")
            else:
                _export(planned, entry, config, folder, place)
                write_json(folder / place / _MADE_FROM, made_from)
                console.print(f"[bold]exported[/] {entry.stage.name} to {place}")
            record = json.loads((folder / place / RECORD).read_text("utf-8"))
            found.append({"stage": entry.stage.name, "folder": place.as_posix()} | record)
    return found


def notes_of_exports(exports: list[dict[str, Any]]) -> list[str]:
    """One sentence for each export, for readers of the table.

    Args:
        exports: from :func:`export_stages`.
    """
    return [_note(export) for export in exports]


def _note(export: Mapping[str, Any]) -> str:
    # the error of a graph is a share of the norm, that of a checkpoint of the largest output
    checked = export.get("comparison") or export["equivalence"]
    of = "their norm" if export.get("comparison") else "the largest"
    products = export.get("products")
    integer = f", {products['integer']} of {products['total']} matmuls in integers" if products else ""
    return (
        f"{export['stage']}: exported to {export['to']}, {export['bytes'] / 1e6:.1f} MB{integer}; outputs differ from "
        f"the model's by at most {checked['relative_error']:.1e} of {of} ({export['folder']})"
    )


def _export(planned: Plan, entry: StagePlan, config: ExportConfig, folder: Path, place: Path) -> None:
    model = auto_class(entry.materials.task).from_pretrained(folder / entry.stage.name).eval()
    batches = drawn_batches(entry.materials, _ROWS, _ROWS_AT_ONCE, planned.recipe.seed)
    try:
        export_model(model, folder / place, config, batches=batches, tokenizer=entry.materials.tokenizer)
    except LmcompressError as error:
        raise type(error)(f"stage {entry.stage.name!r}, export to {config.to}: {error}") from error


def _made_from(folder: Path) -> Any:
    file = folder / _MADE_FROM
    return json.loads(file.read_text("utf-8")) if file.is_file() and (folder / RECORD).is_file() else None
