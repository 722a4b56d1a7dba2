"""Carries out the plan of a recipe: trains the stages, measures all of them, writes one self-contained folder."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lmcompress.errors import LmcompressError
from lmcompress.recipes.contents import dependencies, in_words
from lmcompress.recipes.exporting import check_exports, export_stages, notes_of_exports
from lmcompress.recipes.folder import CHECKPOINTS, begin, changes_since, check_folder, is_finished, locked
from lmcompress.recipes.materials import load_tokenizer
from lmcompress.recipes.measuring import STAGE_FILE, Entry, measure, notes_of, update_cards
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.planning import Plan, plan, run_folder
from lmcompress.recipes.progress import print_cautions, quiet_libraries
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.stage_run import StageRun
from lmcompress.reporting import write_report


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: with ``recipe.yaml``, ``results.json``, ``metrics.json``, ``report.md``, ``report.html``, ``plots/``
            and the models.
        report: contents of ``results.json``.
        models: name of a stage to the folder of its model.
    """

    folder: Path
    report: dict[str, Any]
    models: dict[str, Path]


def run(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Train the recipe's stages, measure their models, and write everything into one folder.

    A finished stage is not trained again unless something it depends on has changed: its recipe, the contents of the
    training rows, of the recipe's model, of teachers or earlier stages, custom code, or the version of lmcompress. An
    interrupted one resumes from its last checkpoint, so that the same call after a crash continues the run.

    Args:
        recipe: validated recipe.
        output: folder; default: the recipe's.
        overwrite: whether to retrain stages that were made from something else, instead of refusing.
        resume: whether to resume interrupted stages from their checkpoints; otherwise they restart.
        console: console for headlines and bars.

    Raises:
        LmcompressError: If the recipe does not fit its rows or models (see :func:`~lmcompress.recipes.planning.plan`),
            a library that an export needs is missing, or the folder holds stages that were made from something else:
            all of these are checked before training; or if a runtime cannot hold the model of a stage.
    """
    console = console or Console()
    folder = run_folder(recipe, output)
    if folder.exists() and not folder.is_dir():
        raise LmcompressError(f"{folder} is a file; the output of a run is a folder")
    with quiet_libraries():
        console.print(f"[bold]{recipe.name}[/]: checking rows, models and layers")
        check_exports(recipe)
        planned = plan(recipe, folder, measure=True)
        with locked(folder):
            models, report = _carried_out(planned, folder, overwrite, resume, console)
    return RunResult(folder, report, models)


def _carried_out(
    planned: Plan, folder: Path, overwrite: bool, resume: bool, console: Console
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The models and the report of a plan, in a folder that is this process's."""
    needs = dependencies(planned)
    check_folder(folder, planned, needs, overwrite)
    begin(folder, planned.recipe)
    print_cautions(console, planned)
    models: dict[str, Path] = {}
    for number, stage in enumerate(planned.stages, 1):
        target = folder / stage.stage.name
        models[stage.stage.name] = target
        headline = f"[bold]{number}/{len(planned.stages)} {stage.stage.name}[/] ({stage.role}, {stage.shape})"
        own = needs[stage.stage.name]
        if is_finished(target, own):
            console.print(f"{headline}: already finished, kept")
            continue
        does = f"{stage.steps:,} steps on {stage.train_rows:,} rows" if stage.steps else "without training"
        changed = changes_since(folder, stage.stage.name, own)
        again = f"{escape(in_words(changed))}: made again, " if changed else ""
        console.print(f"{headline}: {again}{does}", highlight=False)
        StageRun(planned, stage, folder, own, console, resume).train()
        gc.collect()
    if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
        (folder / CHECKPOINTS).rmdir()
    exports = export_stages(planned, folder, needs, console)
    console.print("[bold]measuring[/] quality, size and latency")
    report = _measured(planned, folder, models, exports)
    write_report(report, folder)
    update_cards(report, list(models.values()))
    return models, report


def _measured(planned: Plan, folder: Path, models: Mapping[str, Path], exports: list[dict[str, Any]]) -> dict[str, Any]:
    materials = planned.materials
    entries = [
        Entry(name, "teacher", name, materials.with_tokenizer(load_tokenizer(name, materials.task)))
        for name in planned.outside_teachers
    ]
    for staged in planned.stages:
        name = staged.stage.name
        marker = json.loads((models[name] / STAGE_FILE).read_text("utf-8"))
        done = {part.key: marker.get(part.key) for part in PARTS if part.reports}
        entry = Entry(name, staged.role, str(models[name]), staged.materials, True, marker["training"], done)
        entries.append(entry)
    notes = [*planned.notes, *(note for entry in entries for note in notes_of(entry)), *notes_of_exports(exports)]
    return measure(entries, planned.reference, notes) | {"exports": exports}
