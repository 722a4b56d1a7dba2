"""The page of a comparison: all values of its template, computed from the reports of the runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lmcompress.evaluation import machine
from lmcompress.reporting.cautions import LEVELS, Caution, cautions
from lmcompress.reporting.figures import Point, pareto
from lmcompress.reporting.headline import speed_text, whose
from lmcompress.reporting.models import Model, at_chance, collect, description, pick, within_margin
from lmcompress.reporting.page import load_snippet
from lmcompress.reporting.sections import batches_of, roles, table, tradeoff_note, tradeoffs
from lmcompress.reporting.wording import Metric, Report, change_text, megabytes, milliseconds, rows_text, signed, times


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: shown on the page.
        folder: as it was given.
        report: its ``results.json``.
    """

    name: str
    folder: Path
    report: Report


def comparison_view(
    runs: Sequence[Run], rows: Sequence[dict[str, Any]], sources: Mapping[str, str], output: Path, untimed: str | None
) -> dict[str, Any]:
    """The values shown on the page of a comparison.

    Args:
        runs: runs in the given order.
        rows: rows of all of them, under distinct names.
        sources: name of a row to those of its runs.
        output: path of the page.
        untimed: why latency was not measured again; None if it was.

    Returns:
        Values of ``compare.html.j2``.
    """
    first = runs[0].report
    report = {**first, "rows": list(rows), "picked": None, "notes": _notes(runs)}
    if untimed is None:
        report["machine"] = machine()
    models = collect(report)
    reference, metric = models[0], Metric.of(report)
    picked, drawn = pick(report, models), [model for model in models if model.kind != "control"]
    frontier = _frontier(metric, drawn)
    batches = batches_of(models)
    units = f", {len(reference.units):,} rows" if reference.units and report["kind"] != "causal_lm" else ""
    folders = " ".join(shlex.quote(str(run.folder)) for run in runs)
    return {
        "headline": _headline(report, models, picked),
        "date": str(report["created"])[:10],
        "count": len(models),
        "lead": f"{len(models)} models of {len(runs)} runs on {Path(str(report['task'])).name}: "
        f"{', '.join(run.name for run in runs)}. {len(frontier)} of them are on a frontier: no other one is better and "
        "as small or as fast.",
        "chips": [
            {"ok": True, "text": "✓ same rows" if units else "✓ same task"},
            *([{"ok": True, "text": "✓ timed together"}] if untimed is None else []),
            {"ok": False, "text": f"{report['split']}{units}"},
        ],
        "picks": [] if at_chance(report, reference) else _picks(report, models),
        "cautions": _cautions(report, models, picked, untimed),
        "rows": table(report, models, picked),
        "frontier": frontier,
        "sources": sources,
        "batches": [rows_text(batch) for batch in batches],
        "roles": roles(models),
        "metric": metric,
        "split": report["split"],
        "reference": reference.name,
        "tradeoffs": tradeoffs(report, drawn, picked, log=True),
        "tradeoff_note": tradeoff_note(report, log=True),
        "checks": _checks(runs, reference, untimed),
        "load_title": f"Load {picked.name}",
        "load": load_snippet(report, picked),
        "again": f"lmcompress compare {folders} --output {shlex.quote(str(output))}",
        "footer": f"Written by lmcompress {version('lmcompress')}.",
    }


def _notes(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(note for run in runs for note in run.report["notes"]))


def _headline(report: Report, models: Sequence[Model], picked: Model) -> Markup:
    reference, metric = models[0], Metric.of(report)
    if at_chance(report, reference):
        return Markup("No result: {} is at <em class=bad>chance level</em>.").format(reference.name)
    of = whose(reference, metric, possessive=True).replace("its", "the")
    near = within_margin(report, picked)
    margin = "5 %" if metric.lower_is_better else "a point"
    told = Markup("<em>{}</em> is the smallest within {} of {}").format(picked.name, margin, of)
    if not near:
        told = Markup("No model is within {} of {}; the last one is <em>{}</em>").format(margin, of, picked.name)
    if picked.size and reference.size:
        told += Markup(": <em>{} smaller</em>").format(times(reference.size / picked.size))
    if picked.latency and (batch := min(picked.latency)) in reference.latency:
        words = speed_text(picked, reference, batch).replace(":", "")
        told += Markup(", <em>{}</em> on {}").format(words, rows_text(batch))
    if picked.change:
        sure = f" ± {100 * picked.change.half:.1f}" if picked.change.half else ""
        told += Markup(", {} {}{} {}").format(metric.title, signed(picked.change.value), sure, metric.unit)
    return told + "."


def _frontier(metric: Metric, models: Sequence[Model]) -> set[str]:
    costs: list[dict[str, float]] = [{m.name: float(m.size) for m in models if m.size}]
    costs += [{m.name: m.quartiles(b)[0] for m in models if b in m.latency} for b in batches_of(models)]
    found = set()
    for cost in costs:
        points = [Point(m.name, m.kind, (cost[m.name],) * 3, (m.score,) * 3) for m in models if m.name in cost]
        found |= {point.name for point in pareto(points, lower_is_better=metric.lower_is_better)}
    return found


def _picks(report: Report, models: Sequence[Model]) -> list[dict[str, str]]:
    metric = Metric.of(report)
    others = [m for m in models if not m.is_reference and m.kind != "control"]
    near = [m for m in others if within_margin(report, m)]
    margin = "5 %" if metric.lower_is_better else "1 point"
    batch = min(batches_of(models), default=None)
    cards = []
    if small := min((m for m in near if m.size), key=lambda m: m.size or 0, default=None):
        cards.append((f"smallest within {margin}", small))
    timed = [m for m in near if batch in m.latency]
    if timed and batch is not None:
        cards.append((f"fastest within {margin}, {rows_text(batch)}", min(timed, key=lambda m: m.quartiles(batch)[0])))
    best = max((m for m in models if m.kind != "control"), key=lambda m: metric.gain(m.score))
    cards.append((f"best {metric.title}", best))
    found = []
    for title, model in cards:
        told = [metric.text(model.score) + (f" ({change_text(model.change)})" if model.change else "")]
        told += [megabytes(model.size)] if model.size else []
        if batch in model.latency and batch is not None:
            told.append(f"{rows_text(batch)} {milliseconds(model.quartiles(batch)[0])}")
        found.append(
            {
                "title": title,
                "name": model.name,
                "kind": model.kind,
                "text": "; ".join(told),
                "what": description(model),
            }
        )
    return found


def _cautions(report: Report, models: Sequence[Model], picked: Model, untimed: str | None) -> list[Caution]:
    found = [caution for caution in cautions(report, models) if "pruned” is of" not in caution.title]
    if untimed is not None and batches_of(models):
        text = (
            f"{untimed[:1].upper()}{untimed[1:]}: the times are those of each run, and ratios between runs may mislead."
        )
        found.append(Caution("warn", "Latency was not measured together.", text))
    if not picked.is_reference:
        text = "The pick was chosen on the rows that measure it; measure it on other rows before you rely on it."
        found.append(Caution("note", "Picked after looking.", text))
    return sorted(found, key=lambda caution: LEVELS.index(caution.level))


def _checks(runs: Sequence[Run], reference: Model, untimed: str | None) -> list[dict[str, str]]:
    first = runs[0].report
    rows = f", {len(reference.units):,} rows: paired row by row" if reference.units else ""
    found = [("good", "Same task, split and metric", f"{first['task']}, {first['split']}, {first['metric']}{rows}")]
    places = {str(run.report["machine"]["processor"]) for run in runs}
    versions = {json.dumps(run.report["versions"], sort_keys=True) for run in runs}
    same = len(places) == 1 and len(versions) == 1
    detail = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    if not same:
        detail = f"trained on {' and '.join(sorted(places))}, with {len(versions)} sets of versions"
    found.append(
        ("good" if same else "half", "Same machine and versions" if same else "Other machine or versions", detail)
    )
    if untimed is None:
        found.append(("good", "Latency measured again, together", "the models took turns in one process"))
    else:
        detail = "the times are those of each run"
        found.append(("half", "Latency was not measured again", detail))
    seeds = sorted({str(run.report["seed"]) for run in runs})
    found.append(("half", "One seed each", f"seed {', '.join(seeds)}: a difference of methods is one draw of training"))
    icons = {"good": "ok", "half": "warn"}
    return [{"state": state, "icon": icons[state], "text": text, "detail": detail} for state, text, detail in found]
