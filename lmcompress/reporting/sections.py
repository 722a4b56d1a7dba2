"""The parts that the page of a run and the comparison of runs share: table, plots, checks, environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from lmcompress.reporting.evidence import Interval
from lmcompress.reporting.figures import Point, losses, tradeoff
from lmcompress.reporting.headline import speed_text
from lmcompress.reporting.models import Model, chance, description
from lmcompress.reporting.wording import Metric, Report, change_text, count, megabytes, milliseconds, rows_text, times

ROLES = {
    "teacher": ("teacher", "the reference of the others, which learn from it"),
    "student": ("student", "a smaller model that learns from labels and the teacher"),
    "pruned": ("pruned", "heads, neurons, tokens or single weights were removed"),
    "quantized": ("quantized", "weights in few bits, or clustered, packed in the file"),
    "control": ("control", "same shape, data and steps without the teacher: what distillation is worth"),
}
"""Kind of a model to its name and explanation."""

_NARROW, _WIDE = 356, 546
_FOREST = 132


def batches_of(models: Sequence[Model]) -> list[int]:
    """The batch sizes that latency was measured at.

    Args:
        models: models of a report.
    """
    return sorted({batch for model in models for batch in model.latency})


def table(report: Report, models: Sequence[Model], picked: Model) -> list[dict[str, Any]]:
    """A row for each model, as text, with the numbers that columns are sorted by.

    Args:
        report: report of a run.
        models: its models, the reference first.
        picked: the highlighted model.
    """
    metric, reference, batches = Metric.of(report), models[0], batches_of(models)
    span = _span([model.change for model in models if model.change])
    rows = []
    for model in models:
        latency = []
        for batch in batches:
            timed = batch in model.latency
            text = milliseconds(model.quartiles(batch)[0]) if timed else "–"
            words = "the reference" if model.is_reference else speed_text(model, reference, batch)
            value = model.quartiles(batch)[0] if timed else 0.0
            latency.append({"text": text, "note": words if timed else "not measured", "value": value})
        smaller = model.size and reference.size and not model.is_reference
        found = model.row.get("equivalence") or {}
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "picked": model is picked and not model.is_reference,
                "what": description(model),
                "quality": metric.text(model.score),
                "interval": metric.interval(model.interval),
                "score": model.score,
                "forest": model.change and _forest(model.change, span),
                "change": model.change and change_text(model.change),
                "change_value": model.change.value if model.change else 0.0,
                "parameters": count(model.parameters),
                "share": "" if model.is_reference else f"{100 * model.parameters / reference.parameters:.0f} %",
                "parameters_value": model.parameters,
                "size": megabytes(model.size) if model.size else "–",
                "smaller": _smaller(reference.size / model.size) if smaller and reference.size and model.size else "",
                "size_value": model.size or 0,
                "latency": latency,
                "reload": _reload(found),
                "reload_note": f"{found['batches']} batches" if "batches" in found else "",
            }
        )
    return rows


def roles(models: Sequence[Model]) -> list[tuple[str, str, str]]:
    """Kind, name and explanation of each kind that occurs.

    Args:
        models: models of a report.
    """
    present = {model.kind for model in models}
    reference = "the reference of the others" if models[0].row["role"] != "teacher" else ROLES["teacher"][1]
    named = ROLES | {"teacher": ("teacher" if models[0].row["role"] == "teacher" else "reference", reference)}
    return [(kind, *named[kind]) for kind in named if kind in present]


def tradeoffs(report: Report, models: Sequence[Model], picked: Model, *, log: bool = False) -> list[dict[str, Any]]:
    """Plots of quality against size and against the latency at each batch size.

    Args:
        report: report of a run.
        models: its models, the reference first.
        picked: the model whose name is bold.
        log: whether costs are on a log scale, and each plot is drawn in a wide and a narrow version.

    Returns:
        ``title``, ``note``, ``svgs`` each; no plots for fewer than two models.
    """
    lengths = {e.get("sequence_length") for m in models for e in m.latency.values()} - {None}
    tokens = f" of {lengths.pop()} tokens" if len(lengths) == 1 else ""
    bars = "bars: 95 % of rows" if any(model.interval for model in models) else ""
    axes: list[tuple[int | None, str, str, str]] = [(None, "Quality and size", "MB on disk", bars)]
    for measured in batches_of(models):
        title, label = f"Quality and latency, {rows_text(measured)}", f"ms for {rows_text(measured)}{tokens}"
        axes.append((measured, title, label, f"{bars or 'bars: no interval of quality'}, quartiles of time"))
    metric, plots = Metric.of(report), []
    for batch, title, label, note in axes:
        points = [point for model in models if (point := _point(metric, model, batch, model is picked)) is not None]
        if len(points) < 2:
            continue
        ys = [end for point in points for end in point.y]
        options: dict[str, Any] = {
            "label": label,
            "quality": metric.axis,
            "log": log,
            "lower_is_better": metric.lower_is_better,
            "band": models[0].name,
            # correlations can be below 0, perplexities above 100
            "limits": (0.0, float("inf")) if metric.lower_is_better else (-100.0 if min(ys) < 0 else 0.0, 100.0),
            "least_span": 0.2 * points[0].y[0] if metric.lower_is_better else 6.0,
        }
        sizes = [(_WIDE, 380), (_NARROW, 400)] if log else [(_NARROW, 320)]
        svgs = []
        for index, size in enumerate(sizes):
            svgs.append(Markup(tradeoff(points, size=size, title=f"{title} {index or ''}".rstrip(), **options)))
        plots.append({"title": title, "note": note, "svgs": svgs})
    return plots


def tradeoff_note(report: Report, *, log: bool = False) -> str:
    """A note on reading these plots.

    Args:
        report: report of a run.
        log: whether costs are on a log scale.
    """
    metric, level = Metric.of(report), chance(report)
    axis = "" if log else " Size and time start at 0; quality does not, but never spans less than 6 points."
    if metric.lower_is_better:
        axis = "" if log else " Size and time start at 0."
    told = "" if level is None else f" Chance level is {metric.text(level)}."
    return (
        f"{'Down' if metric.lower_is_better else 'Up'} and left is better. The dashed line joins the models that no "
        f"other one beats in both, controls left out.{axis}{told}"
    )


def loss_panels(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Loss curves of each trained model, by term, on one scale.

    Args:
        models: models of a report.
    """
    logs = {model.name: _log(model) for model in models}
    values = [e["loss"] for log in logs.values() for e in log] + [
        v for log in logs.values() for e in log for k, v in e.items() if k.startswith("loss_")
    ]
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    limits = max(1e-3, min(positive) / 1.5), max(positive) * 1.3
    panels = []
    for model in models:
        if not (log := logs[model.name]):
            continue
        training = model.row["training"]
        marks = []
        schedule = ((model.row.get("pruning") or {}).get("method") or {}).get("schedule") or {}
        if isinstance(schedule.get("end"), float) and 0 < schedule["end"] < 1:
            marks = [(schedule["end"] * training["steps"], "pruned to target")]
        svg = losses(
            log,
            size=(_NARROW, 240),
            title=f"Loss of {model.name}",
            steps=training["steps"],
            limits=limits,
            marks=marks,
        )
        precision = " in bfloat16" if training.get("bf16") else ""
        note = f"{training['steps']:,} steps in {training['seconds']:.0f} s{precision}, {description(model)}"
        panels.append({"title": model.name, "note": note, "svgs": [Markup(svg)]})
    return panels


def environment(report: Report) -> list[tuple[str, str]]:
    """The machine, and the software versions.

    Args:
        report: report of a run.
    """
    machine, latency = report["machine"], report.get("latency") or {}
    memory = machine.get("memory_gib")
    pairs = [
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("instruction sets", machine.get("instructions") or ""),
        ("memory", f"{memory} GiB" if memory else ""),
        ("GPU", machine.get("gpu") or "none"),
        ("system", machine.get("system") or ""),
        ("Python", machine.get("python") or ""),
        *report["versions"].items(),
        ("seed", str(report["seed"])),
        ("created", str(report["created"])),
    ]
    if latency.get("load_before") is not None:
        load = f"{latency['repeats']} calls of each model; load {latency['load_before']} before, "
        again = [f"{entry['model']}: {entry['verdict']}" for entry in latency.get("again", ())]
        pairs.append(("latency", "; ".join([f"{load}{latency['load_after']} after", *again])))
    return [(name, text) for name, text in pairs if text]


def linked(text: str) -> Markup:
    """Text with clickable addresses.

    Args:
        text: plain text; it is escaped.

    Example:
        >>> str(linked("a < b, https://x.org/1; c"))
        'a &lt; b, <a href="https://x.org/1">https://x.org/1</a>; c'
    """
    pieces = re.split(r"(https?://[^\s,;<>\"']*[^\s,;<>\"'.)])", text)
    link = Markup('<a href="{0}">{0}</a>')
    return Markup("").join(link.format(p) if i % 2 else escape(p) for i, p in enumerate(pieces))


def _point(metric: Metric, model: Model, batch: int | None, strong: bool) -> Point | None:
    if batch is None:
        if not model.size:
            return None
        x = (model.size / 1e6,) * 3
    elif batch not in model.latency:
        return None
    else:
        x = model.quartiles(batch)
    ends = (model.interval.low, model.interval.high) if model.interval else (model.score, model.score)
    y = metric.scale * model.score, metric.scale * ends[0], metric.scale * ends[1]
    return Point(model.name, model.kind, x, y, strong)


def _log(model: Model) -> list[dict[str, float]]:
    # with one term the trainer may name only the sum
    log = [entry for entry in model.row.get("log") or () if "loss" in entry and entry["loss"] == entry["loss"]]
    if any(key.startswith("loss_") for entry in log for key in entry):
        return log
    return [{**entry, "loss_label": entry["loss"]} for entry in log]


def _span(changes: Sequence[Interval]) -> tuple[float, float]:
    """The ends of the scale of differences: the same for all of the column."""
    ends = [end for change in changes for end in (change.low, change.high)]
    return min([0.0, *ends]) - 0.005, max([0.0, *ends]) + 0.005


def _forest(change: Interval, span: tuple[float, float]) -> dict[str, Any]:
    def at(value: float) -> float:
        return round(2 + (_FOREST - 4) * (value - span[0]) / (span[1] - span[0]), 1)

    places = {"low": at(change.low), "mid": at(change.value), "high": at(change.high), "zero": at(0.0)}
    return {**places, "label": change_text(change)}


def _smaller(ratio: float) -> str:
    return f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} greater"


def _reload(found: Mapping[str, Any]) -> str:
    if "max_error" not in found:
        return "–"
    error = found["max_error"]
    return "bit-exact" if error == 0 else f"{error:.0e}".replace("e-0", "e−").replace("e-", "e−")
