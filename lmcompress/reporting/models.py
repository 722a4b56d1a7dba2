"""The models of a report as a page shows them: kind, score with its interval, difference from the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmcompress.reporting.evidence import Interval, Units, difference, score_interval, units_of
from lmcompress.reporting.tables import quality_of
from lmcompress.reporting.wording import Metric, Report

MARGIN = 0.01
"""Loss of score allowed for a pick: a point."""
MARGIN_RELATIVE = 0.05
"""The same if lower is better: 5 % of the reference."""


@dataclass(frozen=True)
class Model:
    """A row of a report.

    Attributes:
        row: the row in the report.
        name: displayed name.
        kind: teacher, student, control, pruned or quantized: its colour and marker.
        score: score in the main metric.
        interval: interval of the score; None if the results lack the data for it.
        change: difference from the reference: as a fraction of 1, or of the reference if lower is better; None for the
            reference itself and if the rows are unknown.
        units: components of the score.
        latency: entries by batch size.
        is_reference: whether the others are compared with it.
    """

    row: Mapping[str, Any]
    name: str
    kind: str
    score: float
    interval: Interval | None
    change: Interval | None
    units: Units | None
    latency: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    is_reference: bool = False

    @property
    def size(self) -> int | None:
        """Bytes on disk, None for a model that is only on the Hub."""
        return self.row["size_bytes"]

    @property
    def parameters(self) -> int:
        """Number of its parameters."""
        return int(self.row["parameters"])

    def quartiles(self, batch: int) -> tuple[float, float, float]:
        """Median, first and third quartile of the latency, in ms.

        Args:
            batch: measured batch size.
        """
        entry = self.latency[batch]
        median = float(entry["median_ms"])
        return median, float(entry.get("lower_ms", median)), float(entry.get("upper_ms", median))


def collect(report: Report, rows: Sequence[Mapping[str, Any]] | None = None) -> list[Model]:
    """The models of a report, the reference first.

    Args:
        report: report of a run.
        rows: rows to use instead of the report's.
    """
    rows = report["rows"] if rows is None else rows
    reference = next((row for row in rows if row["name"] == report["reference"]), rows[0])
    split, metric = report["split"], Metric.of(report)
    base = units_of(report, reference, split)
    models = []
    for row in sorted(rows, key=lambda row: row is not reference):
        units = units_of(report, row, split)
        change = None
        if row is not reference:
            change = difference(units, base, relative=metric.lower_is_better)
        models.append(
            Model(
                row=row,
                name=row["name"],
                kind=kind_of(row, is_reference=row is reference),
                score=quality_of(report, row),
                interval=score_interval(units),
                change=change or _plain_change(report, row, reference, metric),
                units=units,
                latency={entry["batch_size"]: entry for entry in row["latency"]},
                is_reference=row is reference,
            )
        )
    return models


def kind_of(row: Mapping[str, Any], *, is_reference: bool = False) -> str:
    """The kind of a row's model, which determines its colour and marker.

    Args:
        row: row of a report.
        is_reference: whether the others are compared with it.

    Returns:
        ``teacher``, ``student``, ``control``, ``pruned`` or ``quantized``.
    """
    if row["role"] == "control":
        return "control"
    if row.get("quantization") or row.get("sharing") or row["role"] in ("quantized", "shared"):
        return "quantized"
    if row.get("pruning") or row.get("sparsity") or row.get("vocabulary") or row["role"] == "pruned":
        return "pruned"
    return "teacher" if is_reference or row["role"] in ("teacher", "model") else "student"


def description(model: Model) -> str:
    """A model's compression in a few words.

    Args:
        model: model of a report.
    """
    row = model.row
    trained = bool((row.get("training") or {}).get("steps"))
    if model.kind == "control":
        return "pruned alike, from labels alone" if row.get("pruning") else "same shape and steps, no teacher"
    told = []
    if vocabulary := row.get("vocabulary"):
        told.append(f"{vocabulary['rows_after']:,} of {vocabulary['rows_before']:,} tokens")
    if row.get("compact"):
        told.append("compact layers")
    if pruning := row.get("pruning"):
        told.append(f"{100 * pruning['removed']:.0f} % of {what_is_pruned(pruning)} pruned")
    if sparsity := row.get("sparsity"):
        told.append(f"{100 * sparsity['sparsity']:.0f} % zeros")
    if row.get("sharing"):
        told.append("weights clustered")
    if quantization := row.get("quantization"):
        told.append(f"{_bits(quantization)} weights" + ("" if quantization["method"] == "trained" else ", no training"))
    if is_distilled(row):
        told.append("distilled")
    if not told:
        told = ["trained from labels" if trained else "as it was given" if model.is_reference else "not trained"]
    return ", ".join(told)


def what_is_pruned(pruning: Mapping[str, Any]) -> str:
    """The reference of pruning's removed share.

    Args:
        pruning: entry of a row.
    """
    blocks = (pruning.get("coverage") or {}).get("block_parameters")
    if pruning["unit"] == "parameters" and blocks and abs(blocks["cut"] - pruning["removed"]) < 1e-3:
        return "the blocks’ parameters"
    return str(pruning["unit"])


def is_distilled(row: Mapping[str, Any]) -> bool:
    """Whether a teacher was used in the training of a row.

    Args:
        row: row of a report.
    """
    last = (row.get("training") or {}).get("last_log") or {}
    return any(re.match("loss_(?!label$)", key) for key in last)


def control_of(model: Model, models: Sequence[Model]) -> Model | None:
    """The model of the same shape that was trained without a teacher.

    Args:
        model: a model that may have one.
        models: models of the report.
    """
    return next((m for m in models if m.kind == "control" and m.name == f"{model.name}-control"), None)


def at_chance(report: Report, model: Model) -> bool:
    """Whether a model is not significantly better than a constant prediction.

    Args:
        report: a report with ``chance``; without it the result is False.
        model: model of the report.
    """
    level = chance(report)
    if level is None:
        return False
    if report["lower_is_better"]:
        return (model.interval.high if model.interval else model.score) >= level
    return (model.interval.low if model.interval else model.score) <= level


def chance(report: Report) -> float | None:
    """Score of a constant prediction; None if it is unknown.

    Args:
        report: report of a run.
    """
    return ((report.get("chance") or {}).get(report["split"]) or {}).get(report["metric"])


def pick(report: Report, models: Sequence[Model]) -> Model:
    """The model that the page is about: the smallest within the margin of the reference, else the last.

    Args:
        report: a report, which may name it as ``picked``.
        models: its models, the reference first.

    Returns:
        One of them; the reference if there is no other.
    """
    others = [m for m in models if not m.is_reference and m.kind != "control"]
    named = next((m for m in others if m.name == report.get("picked")), None)
    if named or not others:
        return named or models[0]
    near = [m for m in others if within_margin(report, m)]
    return min(near, key=lambda m: m.size or 4 * m.parameters) if near else others[-1]


def within_margin(report: Report, model: Model) -> bool:
    """Whether a model loses at most a point, or 5 % where lower is better.

    Args:
        report: determines which.
        model: model of the report.
    """
    metric = Metric.of(report)
    margin = MARGIN_RELATIVE if metric.lower_is_better else MARGIN
    return model.change is not None and metric.gain(model.change.value) >= -margin - 1e-9


def renamed(model: Model, name: str) -> Model:
    """The same model under another name.

    Args:
        model: any model.
        name: shown in place of its own.
    """
    return replace(model, name=name)


def _plain_change(
    report: Report, row: Mapping[str, Any], reference: Mapping[str, Any], metric: Metric
) -> Interval | None:
    """The difference, if its uncertainty is unknown."""
    if row is reference:
        return None
    mine, theirs = quality_of(report, row), quality_of(report, reference)
    if metric.lower_is_better and not theirs:
        return None
    value = mine / theirs - 1 if metric.lower_is_better else mine - theirs
    return Interval(value, value, value)


def _bits(quantization: Mapping[str, Any]) -> str:
    found = dict.fromkeys(matrix["bits"] for matrix in quantization["matrices"] if matrix.get("part") != "embeddings")
    found = found or dict.fromkeys(matrix["bits"] for matrix in quantization["matrices"])
    return "/".join(map(str, sorted(found, key=str))) + ("" if "ternary" in found else "-bit")
