"""Tables of tasks other than classification: sentence embeddings, and question answering."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabling import form


def sentence_embeddings(results: Path) -> str | None:
    """Spearman × 100, bytes and speed of sentence encoders; None where there are no results."""
    result = form.read(results / "sentence_embeddings.json")
    if result is None:
        return None

    def cells(row: Mapping[str, Any]) -> list[str]:
        spread = f" ({row['least']:.2f} – {row['greatest']:.2f})" if row["seeds"] > 1 else ""
        return [
            f"{row['model']}, {row['layers']} layers",
            f"{row['spearman']:.2f}{spread}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['cpu_speedup']:.2f} ×",
        ]

    seeds = max(row["seeds"] for row in result["rows"])
    published = "; ".join(f"{name} {value}" for name, value in result["published"].items())
    table = form.markdown([result["data"], "Spearman × 100", "weights", "speed"], map(cells, result["rows"]))
    note = (
        f"Mean and range of {seeds} seeds where trained. Another setting, sentence-transformers' figures for a teacher "
        f"of 12 layers: {published}."
    )
    return f"{table}\n\n{note} {form.origin(result)}"


def question_answering(results: Path) -> str | None:
    """F1, exact match, bytes and speed of models that answer questions; None where there are no results."""
    result = form.read(results / "question_answering.json")
    if result is None:
        return None

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["model"],
            f"{row['f1']:.2f}",
            f"{row['exact_match']:.2f}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['cpu_speedup']:.2f} ×",
        ]

    order = ["teacher", "layers", "control", "pruned", "int8", "all three"]
    rows = sorted(result["rows"], key=lambda row: order.index(row["model"]))
    table = form.markdown(["model", "F1", "exact match", "weights", "speed"], map(cells, rows))
    published = ", ".join(f"{loss:+.0f} at {speed}" for speed, loss in result["published_losses_of_nn_pruning"].items())
    note = f"{result['data']}; one seed. Another setting, BERT-base and all of SQuAD: nn_pruning loses {published}."
    return f"{table}\n\n{note} {form.origin(result)}"
