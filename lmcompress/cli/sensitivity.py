"""``lmcompress sensitivity``: how much each block can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli.options import (
    DEFAULT_CRITERION,
    CalibrationRows,
    CriterionName,
    DataFolder,
    LabelColumn,
    LabelSource,
    MaxLength,
    MetricNames,
    PartNames,
    RowLimit,
    SplitName,
    TaskName,
    TextColumns,
    TrainedModel,
)


def sensitivity(
    model: TrainedModel,
    task: TaskName,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            "--share", help="Share of a block's units to mask; may be given several times. Default: 0.25, 0.5, 0.75, 1."
        ),
    ] = None,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    max_length: MaxLength = None,
    limit: RowLimit = 1000,
    split: SplitName = "validation",
    metric: MetricNames = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for sensitivity.json, sensitivity.png and importance.png."),
    ] = None,
) -> None:
    """Measure how much each block can be pruned: quality with a share of its heads or neurons masked, block by block.

    Nothing is cut or trained: the least important units of one block at a time are masked. It also scores every head.
    One evaluation for each block, part and share: with --limit 1000 a few minutes for BERT-base on a CPU.

    Examples:

      lmcompress sensitivity runs/quickstart/teacher --task embedded/clinc150 --limit 500 -o runs/sensitivity

      lmcompress sensitivity my-model --task reviews.csv --share 0.5 --share 1 --metric f1_macro
    """
    from lmcompress.cli.console import output_console, print_notes
    from lmcompress.cli.values import evaluation_spec, messages_name_options, parts_of, task_spec, validated
    from lmcompress.pruning.structured.config import PruningConfig
    from lmcompress.pruning.structured.targets import Target
    from lmcompress.recipes.checks import check_writable
    from lmcompress.recipes.one_model import measure_sensitivity
    from lmcompress.reporting import sensitivity_table

    if output is not None:
        check_writable(output)
    # any target will do: nothing is removed
    values = {"target": Target(sparsity=0.5), "parts": parts_of(parts), "criterion": criterion, "labels": labels}
    console = output_console()
    with messages_name_options():
        found = measure_sensitivity(
            model,
            task_spec(task, data, text_column, label_column, limit, max_length),
            validated(PruningConfig, values | {"calibration_rows": rows}),
            shares=tuple(share or (0.25, 0.5, 0.75, 1.0)),
            evaluation=evaluation_spec(split, metric),
            console=console,
        )
    console.print(sensitivity_table(found))
    print_notes(console, found["notes"])
    if output is not None:
        written = ", ".join(map(str, _write(found, output)))
        console.print(f"written: {written}", highlight=False)


def _write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    import json

    from lmcompress.reporting import importance_map, sensitivity_curves

    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "sensitivity.json"
    table.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    quality, lower_is_better = found["metric"].replace("_", " "), found["lower_is_better"]
    curves = folder / "sensitivity.png"
    files = [table, sensitivity_curves(found["rows"], curves, quality=quality, lower_is_better=lower_is_better)]
    if "heads" in found["scores"]:
        title = f"heads by {found['criterion']}"
        files.append(importance_map(found["scores"]["heads"], folder / "importance.png", title=title))
    return files
