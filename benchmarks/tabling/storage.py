"""Tables of entropy-coded files, Deep Compression, and what a step with zeros or clusters costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabling import form


def coding(results: Path) -> str | None:
    """Entropy-coded checkpoints beside other coders; None where there are no results."""
    result = form.read(results / "coding.json")
    if result is None:
        return None
    table, files = [], []
    for row in result["rows"]:
        if "not_run" in row:
            table.append([row["scheme"], row["coder"], f"not run: {row['not_run']}", "", ""])
            continue
        over = f"{row['over_shannon']:+.2f} %" if "over_shannon" in row else ""
        speed = f"{row['gb_per_second']:.1f}"
        table.append([row["scheme"], row["coder"], f"{row['bits_per_weight']:.3f}", over, speed])
        if "file_bytes" in row:
            sizes = {name: f"{size / 1e6:.1f} MB" for name, size in row["file_bytes"].items()}
            files.append([row["scheme"], *(sizes[name] for name in ("plain", "auto", "zstd", "huffman"))])
    columns = [
        "BERT-base shape, codes",
        "coder",
        "bits per weight",
        "over entropy",
        "decoded, GB of float32/s and core",
    ]
    whole = form.markdown(["whole file", "plain", "auto", "zstd", "huffman"], files)
    again = [
        f"{row['scheme']} {row['itself'][1]:.2f} ({row['itself'][0]:.2f} – {row['itself'][2]:.2f})"
        + (", **the machine was busy**" if row["busy"] else "")
        for row in result["rows"]
        if "itself" in row
    ]
    how = f" of rounds in random order, CPU time; ours over itself: {'; '.join(again)}" if again else ""
    return f"{form.markdown(columns, table)}\n\n{whole}\n\nMedians{how}. {form.origin(result)}"


def deep_compression(results: Path) -> str | None:
    """Errors and bytes of the LeNets after each stage of Deep Compression; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["network"],
            row["stage"],
            form.errors(row),
            f"{row['bytes'] / 1000:.1f} kB",
            f"{row['ratio']:.1f} ×",
        ]

    columns = ["MNIST", "stage", "errors of 10,000", "file", "smaller"]
    return form.row_by_row(results, "deep_compression", columns, cells)


def deep_compression_bert(results: Path) -> str | None:
    """Scores and bytes of BERTs after each stage of Deep Compression; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [form.TASKS[row["task"]], row["stage"], form.score(row), form.megabytes(row), f"{row['ratio']:.1f} ×"]

    columns = ["GLUE, validation", "stage", "score", "file", "smaller"]
    return form.row_by_row(results, "deep_compression_bert", columns, cells)


def sparsity_overhead(results: Path) -> str | None:
    """Time of a step with sparsity or sharing over a plain one; None where there are no results."""
    result = form.read(results / "sparsity_overhead.json")
    if result is None:
        return None

    def cells(row: Mapping[str, Any]) -> list[str]:
        name = f"{row['method']}, {row['batch']} × {row['length']}{form.on(row)}"
        return [name, form.times(row), form.quartiles(row, "ratio", 3)]

    columns = [f"{result['rows'][0]['model']}, one training step", "time", "over a plain one (quartiles)"]
    how = form.how_timed(result["rows"], lambda row: f"{row['model']}{form.on(row)}")
    return f"{form.markdown(columns, map(cells, result['rows']))}\n\n{how} {form.origin(result)}"
