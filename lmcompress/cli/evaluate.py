"""``lmcompress evaluate``: the quality of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from lmcompress.cli.options import (
    AnyModel,
    AsJson,
    DataFolder,
    LabelColumn,
    MetricNames,
    RowLimit,
    TaskName,
    TextColumns,
)


def evaluate(
    model: AnyModel,
    task: TaskName,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="Split to evaluate. Default: validation; a task that is one file is evaluated whole."
        ),
    ] = None,
    metric: MetricNames = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Maximum length of an input, or of a window for perplexity, in tokens. Default: 128, or what the "
            "model has positions for.",
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens between windows for perplexity. Default: no overlap.")
    ] = None,
    limit: RowLimit = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of rows in a batch.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Measure the quality of a model on a task: the GLUE metrics, others by name, or perplexity.

    Examples:

      lmcompress evaluate runs/quickstart/student --task embedded/clinc150 --split test

      lmcompress evaluate my-model --task reviews.csv --text-column review --label-column sentiment --metric f1_macro
    """
    import json

    from rich.table import Table

    from lmcompress.cli.console import output_console, print_notes
    from lmcompress.cli.values import evaluation_spec, messages_name_options, task_spec
    from lmcompress.recipes.one_model import evaluate_once

    with messages_name_options():
        spec = task_spec(task, data, text_column, label_column, limit, max_length)
        evaluation = evaluation_spec(
            "validation" if split is None else split, metric, batch_size=batch_size, stride=stride
        )
        found = evaluate_once(model, spec, evaluation, split=split)
    if as_json:
        shown = {name: found[name] for name in ("split", "metrics", "notes")}
        typer.echo(json.dumps({"model": model, "task": task} | shown, indent=2))
        return
    table = Table("metric", "value", title=f"{model} on {found['task']}, {found['split']} ({found['rows']:,} rows)")
    table.columns[1].justify = "right"
    for name, value in found["metrics"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console = output_console()
    console.print(table)
    print_notes(console, found["notes"])
