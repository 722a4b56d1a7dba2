"""Carries out the plan of a recipe: trains the stages, measures all of them, writes one self-contained folder."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lmcompress.errors import LmcompressError
from lmcompress.recipes.folder import CHECKPOINTS, begin, check_folder, finished_hash, stage_hashes
from lmcompress.recipes.materials import load_tokenizer
from lmcompress.recipes.measuring import STAGE_FILE, Entry, measure, notes_of, update_cards
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.planning import Plan, plan, run_folder
from lmcompress.recipes.progress import quiet_libraries
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

    A finished stage is not trained again unless its recipe has changed; an interrupted one
    resumes from its
    last checkpoint. So the same call after a crash continues the run.

    Args:
        recipe: validated recipe.
        output: folder; default: the recipe's.
        overwrite: whether to retrain stages that were made by a different recipe, instead of refusing.
        resume: whether to resume interrupted stages from their checkpoints; otherwise they restart.
        console: console for headlines and bars.

    Raises:
        LmcompressError: If the recipe does not fit its rows or models (see :func:`~lmcompress.recipes.planning.plan`),
            or the folder holds
            another recipe's stages. Both are checked before training.
    """
    console = console or Console()
    folder = run_folder(recipe, output)
    if folder.exists() and not folder.is_dir():
        raise LmcompressError(f"{folder} is a file; the output of a run is a folder")
    with quiet_libraries():
        console.print(f"[bold]{recipe.name}[/]: checking rows, models and layers")
        planned = plan(recipe, folder, measure=True)
        hashes = stage_hashes(planned)
        check_folder(folder, planned, hashes, overwrite)
        begin(folder, recipe)
        models: dict[str, Path] = {}
        for number, stage in enumerate(planned.stages, 1):
            target = folder / stage.stage.name
            models[stage.stage.name] = target
            headline = f"[bold]{number}/{len(planned.stages)} {stage.stage.name}[/] ({stage.role}, {stage.shape})"
            if finished_hash(target) == hashes[stage.stage.name]:
                console.print(f"{headline}: already finished, kept")
                continue
            does = f"{stage.steps:,} steps on {stage.train_rows:,} rows" if stage.steps else "without training"
            console.print(f"{headline}: {does}")
            StageRun(planned, stage, folder, hashes[stage.stage.name], console, resume).train()
            gc.collect()
        if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
            (folder / CHECKPOINTS).rmdir()
        console.print("[bold]measuring[/] quality, size and latency")
        report = _measured(planned, folder, models)
        write_report(report, folder)
        update_cards(report, list(models.values()))
    return RunResult(folder, report, models)


def _measured(planned: Plan, folder: Path, models: Mapping[str, Path]) -> dict[str, Any]:
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
    notes = [*planned.notes, *(note for entry in entries for note in notes_of(entry))]
    return measure(entries, planned.reference, notes)
