"""Running a recipe from a verb: plan it, or carry it out and print the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmcompress.cli.console import output_console, print_how_to_load, print_notes

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Recipe
    from lmcompress.recipes.without_task import Alone


def run_recipe(recipe: Recipe, output: Path | None, *, dry_run: bool, overwrite: bool, resume: bool = True) -> None:
    """Carry out all stages of a recipe into one folder, or only check and plan it."""
    from lmcompress.recipes import plan, run
    from lmcompress.recipes.contents import dependencies
    from lmcompress.recipes.folder import check_folder
    from lmcompress.recipes.planning import run_folder
    from lmcompress.recipes.progress import quiet_libraries
    from lmcompress.reporting import print_plan, results_table

    console = output_console()
    if dry_run:
        with quiet_libraries():
            planned = plan(recipe, output)
            check_folder(run_folder(recipe, output), planned, dependencies(planned), overwrite)
            print_plan(planned, console)
        return
    result = run(recipe, output, overwrite=overwrite, resume=resume, console=console)
    console.print(results_table(result.report))
    print_notes(console, result.report["notes"])
    report = result.folder / "report.html"
    console.print(f"report: {report} (also .md, results.json, plots)", highlight=False, soft_wrap=True)
    print_how_to_load(console, result.report)


def print_alone(made: Alone, output: Path) -> None:
    """What was quantized without a task."""
    console = output_console()
    console.print(
        f"{made.matrices} matrices in {made.bits_per_weight:.2f} bits a weight, scales included: "
        f"{made.bytes_before / 1e6:.1f} MB of weights are {made.bytes_after / 1e6:.1f} MB",
        highlight=False,
    )
    if made.cosine is not None:
        console.print(f"cosine of embeddings before and after, mean over texts: {made.cosine:.4f}", highlight=False)
    console.print("note: its quality was not measured: --task does so", highlight=False)
    saved = f"saved to {output}, reloaded and compared\nload it:\n  {made.loads_with}"
    console.print(saved, highlight=False, soft_wrap=True, markup=False)


def compress(recipe: Recipe, output: Path, *, report: Path | None, dry_run: bool, overwrite: bool) -> None:
    """Compress one trained model without training by a recipe of one stage, or only check and plan it."""
    from lmcompress.recipes.checks import check_writable
    from lmcompress.recipes.progress import quiet_libraries
    from lmcompress.recipes.single import compress_once, plan_once
    from lmcompress.reporting import print_plan, results_table, shape_table, write_report

    console = output_console()
    if report is not None:
        check_writable(report)
    if dry_run:
        with quiet_libraries():
            print_plan(plan_once(recipe, output, overwrite=overwrite, measure_times=False), console)
        return
    found = compress_once(recipe, output, overwrite=overwrite, console=console)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_report(found, report)
    console.print(results_table(found))
    if any(stage.quantization is None for stage in recipe.stages):
        console.print(shape_table(found["rows"]))
    print_notes(console, found["notes"])
    print_how_to_load(console, found)
