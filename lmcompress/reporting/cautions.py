"""Cautions for readers of a page's numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lmcompress.evaluation import BUSY
from lmcompress.reporting.evidence import difference
from lmcompress.reporting.models import Model, at_chance, chance, control_of, is_distilled, what_is_pruned
from lmcompress.reporting.wording import Metric, Report, change_text, rows_text

LEVELS = ("stop", "warn", "note")
"""Levels of a caution, the most severe first."""

_SPREAD = 0.25
"""Relative interquartile range above which a machine counts as busy; also for medians of two equal models."""
_FEW = 50
"""Minimum number of rows for a reliable score."""
_RELOAD = 1e-4
"""Max difference, relative to the max abs output, of a reloaded model before it counts as a failure."""


@dataclass(frozen=True)
class Caution:
    """A sentence shown with the numbers.

    Attributes:
        level: ``stop``: the numbers are meaningless; ``warn``: they are less reliable than they seem; ``note``: a fact.
        title: short statement, with its full stop.
        text: explanation and advice.
    """

    level: Literal["stop", "warn", "note"]
    title: str
    text: str


def cautions(report: Report, models: Sequence[Model]) -> list[Caution]:
    """All cautions of a run, the most severe first.

    Args:
        report: report of the run.
        models: its models, the reference first.
    """
    found = [
        *_chance(report, models),
        *_reload(models),
        *_few(report, models),
        *_seed(models),
        *busy_machine(models),
        *_slower(models),
        *_controls(report, models),
        *_share_of_what(models),
        *_subsets(report),
        *_old(report, models),
    ]
    return sorted(found, key=lambda caution: LEVELS.index(caution.level))


def other_notes(report: Report) -> list[str]:
    """Notes of a report that are no caution.

    Args:
        report: report of a run.
    """
    return [note for note in report["notes"] if not _is_subset(note) and not _is_truncated(note)]


def busy_machine(models: Sequence[Model]) -> Iterator[Caution]:
    """A warning if latencies are spread, or two equal models took different times.

    The system's load does not show other guests of a virtual machine, so the times themselves are checked: their
    spread, the reference against itself, and models of one shape against each other.

    Args:
        models: models of a report.

    Yields:
        At most one warning.
    """
    spreads = []
    for model in models:
        for batch in model.latency:
            median, lower, upper = model.quartiles(batch)
            spreads.append(((upper - lower) / median, model.name, batch))
    worst = max(spreads, default=(0.0, "", 0))
    told = []
    if worst[0] > _SPREAD:
        where = f"{worst[1]}, {rows_text(worst[2])}"
        told.append(f"Interquartile ranges reach {100 * worst[0]:.0f} % of the median ({where}).")
    busy = {batch for model in models for batch, entry in model.latency.items() if entry.get("verdict") == BUSY}
    if busy:
        where = " and ".join(rows_text(batch) for batch in sorted(busy))
        told.append(
            f"Timed twice in the same rounds, {models[0].name} differs from itself, or models waited for a core "
            f"({where})."
        )
    unlike = max(_equal_models_unlike_times(models), default=None)
    if unlike is not None:
        ratio, one, other, batch = unlike
        told.append(
            f"{one} and {other} have the same shape, and their times differ by {ratio:.1f}× ({rows_text(batch)})."
        )
    if told:
        advice = (
            "Models took turns in one process, so ratios hold better than milliseconds; measure again when it is idle."
        )
        yield Caution("warn", "The machine was busy.", " ".join([*told, advice]))


def _equal_models_unlike_times(models: Sequence[Model]) -> Iterator[tuple[float, str, str, int]]:
    keys = ("hidden_size", "head_size", "blocks", "quantization", "sharing", "compact", "vocabulary", "parameters")
    shapes: dict[str, list[Model]] = {}
    for model in models:
        if model.row.get("blocks"):
            same = json.dumps({key: model.row.get(key) for key in keys}, sort_keys=True, default=str)
            shapes.setdefault(same, []).append(model)
    for equal in shapes.values():
        for batch in equal[0].latency:
            timed = sorted((m.quartiles(batch)[0], m.name) for m in equal if batch in m.latency)
            if len(timed) > 1 and timed[-1][0] > (1 + _SPREAD) * timed[0][0]:
                yield timed[-1][0] / timed[0][0], timed[0][1], timed[-1][1], batch


def _chance(report: Report, models: Sequence[Model]) -> Iterator[Caution]:
    level = chance(report)
    if level is None:
        return
    metric = Metric.of(report)
    same = f"a constant prediction scores {metric.text(level)}"
    if metric.lower_is_better:
        same = f"a model to which all tokens are equally likely has {metric.text(level)}"
    low = [model for model in models if at_chance(report, model)]
    if low and low[0].is_reference:
        text = f"{low[0].name} scores {metric.text(low[0].score)}; {same}. Train it longer before you compress it."
        yield Caution("stop", "Chance level.", text)
    elif low:
        names = ", ".join(f"{m.name} ({metric.text(m.score)})" for m in low)
        yield Caution("stop", f"At chance level: {names}.", f"Such a model has learned or kept nothing: {same}.")


def _reload(models: Sequence[Model]) -> Iterator[Caution]:
    for model in models:
        found = model.row.get("equivalence") or {}
        if found.get("relative_error", 0.0) > _RELOAD:
            text = f"{model.name}: max abs difference of outputs {found['max_error']:.1e}."
            yield Caution("stop", "The saved model differs from the trained one.", text)


def _few(report: Report, models: Sequence[Model]) -> Iterator[Caution]:
    units = models[0].units
    if units is not None and len(units) < _FEW:
        what = "windows" if report["kind"] == "causal_lm" else "rows"
        yield Caution("warn", f"Only {len(units)} {what}.", "Intervals are wide, and those of a bootstrap too narrow.")


def _seed(models: Sequence[Model]) -> Iterator[Caution]:
    if len(models) > 1 and any((m.row.get("training") or {}).get("steps") for m in models):
        text = (
            "Intervals show the effect of other rows, not of another seed. Run two more seeds before you "
            "rely on a difference of a point or two."
        )
        yield Caution("warn", "One seed.", text)


def _slower(models: Sequence[Model]) -> Iterator[Caution]:
    for model in models:
        slow = {b: e["verdict"] for b, e in model.latency.items() if "slower" in str(e.get("verdict"))}
        if slow and not model.is_reference:
            times = "; ".join(
                f"{e['verdict'].replace('x', '×')} on {rows_text(b)}" for b, e in sorted(model.latency.items())
            )
            title = f"{model.name} is {'slower' if len(slow) == len(model.latency) else 'not faster everywhere'}."
            yield Caution("warn", title, f"Compared with {models[0].name}: {times}.")


def _controls(report: Report, models: Sequence[Model]) -> Iterator[Caution]:
    metric = Metric.of(report)
    for model in models:
        control = control_of(model, models)
        if control is None or not is_distilled(model.row):
            continue
        worth = difference(model.units, control.units, relative=metric.lower_is_better)
        if worth is None or min(metric.gain(worth.low), metric.gain(worth.high)) > 0:
            continue
        title = f"{model.name} gains nothing from its teacher that these rows can show."
        better = max(metric.gain(worth.low), metric.gain(worth.high)) < 0
        text = f"Its control is {'better' if better else 'as good'}: {change_text(worth)} {metric.unit}."
        yield Caution("warn", title, text)


def _share_of_what(models: Sequence[Model]) -> Iterator[Caution]:
    for model in models:
        pruning = model.row.get("pruning")
        whole = ((pruning or {}).get("coverage") or {}).get("parameters")
        if not pruning or not whole or model.kind == "control" or abs(whole["cut"] - pruning["removed"]) < 0.01:
            continue
        title = f"“{100 * pruning['removed']:.0f} % pruned” is of {what_is_pruned(pruning)}."
        yield Caution("note", title, f"Of all parameters of {model.name}, {100 * whole['cut']:.0f} % are pruned.")


def _subsets(report: Report) -> Iterator[Caution]:
    subsets = [note for note in report["notes"] if _is_subset(note)]
    if subsets:
        yield Caution("warn", "A subset of the data.", "; ".join(subsets) + ": not comparable with published numbers.")
    truncated = [note for note in report["notes"] if _is_truncated(note)]
    if truncated:
        yield Caution("note", "Truncated rows.", "; ".join(truncated) + ".")


def _old(report: Report, models: Sequence[Model]) -> Iterator[Caution]:
    if all(model.interval is None for model in models):
        text = "These results do not hold predictions of each row"
        if any(row.get("evidence") for row in report["rows"]):
            text = f"{Metric.of(report).title} has no interval here"
        yield Caution("note", "No intervals.", f"{text}: differences of a point or two may be noise.")


def _is_subset(note: str) -> bool:
    return " is a subset" in note


def _is_truncated(note: str) -> bool:
    return bool(re.search(r"\b(cut at|truncated)\b", note))
