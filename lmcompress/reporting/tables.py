"""The table at the end of a run, for terminal, card and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]
"""The contents of ``results.json``."""


def card_rows(report: Report) -> list[dict[str, str]]:
    """The table of a run as text: one dictionary per model, the same keys in all.

    Args:
        report: see :func:`lmcompress.recipes.runner.run`.
    """
    rows = report["rows"]
    reference = next((row for row in rows if row["name"] == report["reference"]), rows[0])
    batches = sorted({entry["batch_size"] for row in rows for entry in row["latency"]})
    titles = dict.fromkeys(title for row in rows for title in row.get("columns", {}))
    table = []
    for row in rows:
        cells = {
            "model": row["name"],
            "role": row["role"],
            metric_title(report): number(quality_of(report, row)),
            f"of {reference['name']}": "" if row is reference else kept(report, row, reference),
            **{_title(name): number(row["metrics"][report["split"]][name]) for name in report.get("beside", ())},
            "parameters": f"{row['parameters']:,}",
            "MB on disk": "–" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.2f}",
        }
        cells |= {title: row.get("columns", {}).get(title, "–") for title in titles}
        for batch in batches:
            cells[f"batch {batch}"] = _latency_cell(row, batch)
        table.append(cells)
    return table


def results_table(report: Report) -> Table:
    """The same table for a terminal.

    Args:
        report: see :func:`card_rows`.
    """
    rows = card_rows(report)
    caption = f"{report['task']}, {report['split']}; latency: medians, side by side in one process"
    table = Table(title=report["recipe"], caption=caption, title_style="bold")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for cells in rows:
        shown = [cell.replace(" ms, ", " ms\n") for cell in cells.values()]
        table.add_row(*shown, style="bold" if cells["role"] not in ("teacher", "control", "model") else None)
    return table


def latency_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Latencies of several models.

    Args:
        rows: fields of :class:`~lmcompress.evaluation.LatencyRow`, and ``verdict``.
    """
    table = Table(
        caption="medians and quartiles of rounds in random order; CPU: time of all threads of the process; again: the "
        "baseline timed a second time, whose ratio is 1 on a quiet machine"
    )
    for name, justify in (
        ("batch", "right"),
        ("model", "left"),
        ("median ms", "right"),
        ("quartiles", "right"),
        ("CPU ms", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        quartiles = f"{row['lower_ms']:.2f} – {row['upper_ms']:.2f}"
        times = f"{row['median_ms']:.2f}", quartiles, f"{row['cpu_ms']:.2f}"
        table.add_row(str(row["batch_size"]), row["model"], *times, row["verdict"])
    return table


def plan_table(stages: Sequence[Any]) -> Table:
    """The stages of a plan.

    Args:
        stages: :class:`~lmcompress.recipes.planning.StagePlan` each.
    """
    table = Table()
    for name in ("stage", "role", "from", "shape", "learns from"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "parameters", "MB"):
        table.add_column(name, justify="right", overflow="fold")
    for entry in stages:
        table.add_row(
            entry.stage.name,
            entry.role,
            entry.start,
            entry.shape,
            _learns_from(entry),
            f"{entry.steps:,}",
            f"{entry.parameters:,}",
            f"{entry.bytes_estimate / 1e6:.1f}",
        )
    return table


def print_plan(plan: Any, console: Console) -> None:
    """A plan in a table and a few sentences.

    Args:
        plan: :class:`~lmcompress.recipes.planning.Plan`.
        console: console for the output.
    """
    data = plan.materials.data
    splits = ", ".join(f"{name} {rows.num_rows:,}" for name, rows in data.splits().items())
    console.print(f"[bold]{plan.recipe.name}[/]  {plan.recipe.description}", highlight=False)
    console.print(f"task: {data.task.name} ({data.task.kind}), rows: {splits}", highlight=False)
    console.print(plan_table(plan.stages))
    for entry in plan.stages:
        for words in entry.words:
            console.print(f"{entry.stage.name}: {words}", highlight=False)
        loads = (
            "stock Transformers can load it (save: vanilla)"
            if entry.vanilla_obstacle is None
            else entry.vanilla_obstacle
        )
        console.print(f"{entry.stage.name}: {loads}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    console.print("Nothing was trained. Parameters are exact unless stated otherwise, MB are of float32 or packed.")


def pruned_blocks(pruning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The remaining units of each block, for a table.

    Args:
        pruning: entry of a row of the report.

    Returns:
        For each original block: ``number``, ``heads``, ``heads_before``, ``kept`` (numbers of heads, as text), ``ffn``,
        ``ffn_before``.
    """
    before, after = pruning["before"]["blocks"], pruning["after"]["blocks"]
    numbers = [block.get("source", index) for index, block in enumerate(before)]
    left = {block.get("source", numbers[index]): block for index, block in enumerate(after)}
    nothing = {"heads": 0, "ffn": 0}
    return [
        {
            "number": number,
            "heads": left.get(number, nothing)["heads"],
            "heads_before": block["heads"],
            "kept": ", ".join(map(str, kept)),
            "ffn": left.get(number, nothing)["ffn"],
            "ffn_before": block["ffn"],
        }
        for number, block, kept in zip(numbers, before, pruning["kept_heads"], strict=True)
    ]


def shape_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Heads and neurons of each block, for several models.

    Args:
        rows: of a report: ``name`` and ``blocks``, as a :class:`~lmcompress.checkpoint.schema.BlockShape` is written.
    """
    table = Table(caption="heads + neurons of each block; –: the block is pruned")
    table.add_column("block", justify="right")
    for row in rows:
        table.add_column(str(row["name"]), justify="right", overflow="fold")
    numbered = [{block.get("source", index): block for index, block in enumerate(row["blocks"])} for row in rows]
    for number in sorted({number for blocks in numbered for number in blocks}):
        found = [blocks.get(number) for blocks in numbered]
        cells = ["–" if block is None else f"{block['heads']} + {block['ffn']:,}" for block in found]
        table.add_row(str(number), *cells)
    return table


def sensitivity_table(found: Mapping[str, Any]) -> Table:
    """Quality with shares of one block's units pruned: a row for each block and part.

    Args:
        found: from :func:`~lmcompress.recipes.one_model.measure_sensitivity`.
    """
    rows = found["rows"]
    shares = sorted({row["share"] for row in rows if row["part"] != "none"})
    better = " (lower is better)" if found["lower_is_better"] else ""
    whole = next(row["quality"] for row in rows if row["part"] == "none")
    table = Table(
        title=f"{found['metric'].replace('_', ' ')}{better} of {found['model']} with a share of one block pruned",
        caption=f"{found['task']}, {found['split']}; units by {found['criterion']}; the whole model: {number(whole)}",
    )
    table.add_column("block", justify="right")
    table.add_column("part")
    for share in shares:
        table.add_column(f"{share:.0%} pruned", justify="right")
    for part in ("heads", "neurons"):
        own = [row for row in rows if row["part"] == part]
        for block in sorted({row["block"] for row in own}):
            values = {row["share"]: row["quality"] for row in own if row["block"] == block}
            table.add_row(str(block), part, *(number(values[share]) for share in shares))
        table.add_section()
    return table


def quality_of(report: Report, row: Mapping[str, Any]) -> float:
    """The main number of a row.

    Args:
        report: determines which it is.
        row: row of the report.
    """
    return float(row["metrics"][report["split"]][report["metric"]])


def metric_title(report: Report) -> str:
    """The name of the main number.

    Args:
        report: report of a run.
    """
    return "perplexity" if report["lower_is_better"] else str(report["metric"]).replace("_", " ")


def kept(report: Report, row: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """The share of the reference's quality that a row keeps: 100 % is as good, more is better, for every metric.

    Where lower is better, such as for perplexity, it is the reference's number divided by the row's.

    Args:
        report: determines whether lower is better.
        row: row of the report.
        reference: row of the reference.
    """
    mine, theirs = quality_of(report, row), quality_of(report, reference)
    above, below = (theirs, mine) if report["lower_is_better"] else (mine, theirs)
    return f"{above / below * 100:.1f} %" if below > 0 and theirs > 0 else "–"


def number(value: float) -> str:
    """A number with four significant digits.

    Args:
        value: any number.

    Example:
        >>> number(0.93412), number(48.2351), number(12345.6)
        ('0.9341', '48.24', '12346')
    """
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def _title(metric: str) -> str:
    return "macro F1" if metric == "f1_macro" else metric.replace("_", " ")


def _latency_cell(row: Mapping[str, Any], batch: int) -> str:
    found = next((entry for entry in row["latency"] if entry["batch_size"] == batch), None)
    if found is None:
        return "–"
    return f"{found['median_ms']:.2f} ms" + ("" if found["verdict"] == "baseline" else f", {found['verdict']}")


def _learns_from(entry: Any) -> str:
    if not entry.steps:
        return "nothing: no training"
    with_labels = "distillation" not in entry.plans or entry.plans["distillation"].label_weight > 0
    return ", ".join((*(("labels",) if with_labels else ()), *entry.teachers))
