"""The page of a run: all values of its template, computed from the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmcompress.data.tasks import auto_class_name
from lmcompress.reporting import anatomy
from lmcompress.reporting.cautions import cautions, other_notes
from lmcompress.reporting.headline import figures, headline, lead
from lmcompress.reporting.models import Model, at_chance, collect, pick
from lmcompress.reporting.sections import (
    batches_of,
    environment,
    linked,
    loss_panels,
    roles,
    table,
    tradeoff_note,
    tradeoffs,
)
from lmcompress.reporting.wording import Metric, Report, rows_text


def run_view(report: Report, folder: Path | None = None) -> dict[str, Any]:
    """The values shown on the page of a run.

    Args:
        report: report of the run; fields that reports of earlier versions lack are omitted.
        folder: folder of the run, with its recipe and the logs of its stages.

    Returns:
        Values of ``run.html.j2``.
    """
    report = with_logs(report, folder)
    models = collect(report)
    picked, metric = pick(report, models), Metric.of(report)
    sentence = headline(report, models, picked)
    recipe = None
    if folder is not None and (folder / "recipe.yaml").is_file():
        recipe = (folder / "recipe.yaml").read_text("utf-8")
    batches = batches_of(models)
    length = next((e.get("sequence_length") for m in models for e in m.latency.values()), None)
    return {
        "name": report["recipe"],
        "date": str(report["created"])[:10],
        "headline": sentence,
        "lead": lead(report, models, picked),
        "chips": _chips(report, models, picked),
        "figures": figures(report, models, picked),
        "cautions": cautions(report, models),
        "metric": metric,
        "split": report["split"],
        "reference": models[0].name,
        "rows": table(report, models, picked),
        "batches": [
            {"title": rows_text(b) + (f" of {length} tokens" if length else ""), "plain": rows_text(b)} for b in batches
        ],
        "has_intervals": any(model.interval for model in models),
        "has_changes": len(models) > 1,
        "roles": roles(models),
        "tradeoffs": [] if at_chance(report, models[0]) else tradeoffs(report, models, picked),
        "tradeoff_note": tradeoff_note(report),
        "losses": loss_panels(models),
        "maps": anatomy.pruning_maps(models),
        "legend": anatomy.part_legend(models),
        "stacks": anatomy.byte_stacks(models),
        "bits": anatomy.bit_tables(models),
        "modules": [(m.name, anatomy.module_table(m)) for m in models if m.row.get("modules") and m.kind != "control"],
        "checks": checks(models),
        "load_title": f"Load {picked.name}",
        "load": load_snippet(report, picked),
        "again": None if recipe is None else f"lmcompress run {folder}/recipe.yaml --output runs/again",
        "timing": None if picked.is_reference else _timing(models[0], picked),
        "description": linked(str(report["description"])),
        "paper": linked(report["paper"]) if report.get("paper") else None,
        "notes": [*other_notes(report), *anatomy.vocabulary_notes(models)],
        "recipe": recipe,
        "recipe_lines": recipe.count("\n") if recipe else 0,
        "environment": environment(report),
        "footer": f"Written by lmcompress {version('lmcompress')}. The same numbers as data: results.json, "
        "metrics.json; as text: report.md.",
    }


def with_logs(report: Report, folder: Path | None) -> Report:
    """A report with the training logs in its rows, which earlier versions left in the folders of the stages.

    Args:
        report: report of a run.
        folder: folder of the run, if known.
    """
    if folder is None:
        return report
    rows = []
    for row in report["rows"]:
        file = folder / str(row["name"]) / "stage.json"
        if "log" not in row and file.is_file():
            log = json.loads(file.read_text("utf-8")).get("log") or []
            row = {**row, "log": [entry for entry in log if "loss" in entry and "step" in entry]}
        rows.append(row)
    return {**report, "rows": rows}


def checks(models: Sequence[Model]) -> list[dict[str, str]]:
    """The verified properties of the checkpoints.

    Args:
        models: models of a report.

    Returns:
        ``state`` (good, half, bad), ``text`` and ``detail`` each.
    """
    found = []
    saved = [model.row["equivalence"] for model in models if model.row.get("equivalence")]
    if saved:
        worst = max(one["max_error"] for one in saved)
        exact = sum(one["max_error"] == 0 for one in saved)
        detail = f"max abs difference of outputs {worst:.1e}; {exact} of {len(saved)} are bit-exact"
        found.append(_check("good", f"Saved = reloaded, {len(saved)} of {len(models)} models", detail))
    errors = [(model.name, model.row["pruning"]["masked_error"]) for model in models if model.row.get("pruning")]
    if errors:
        detail = "; ".join(f"{name}: {error:.1e} of the max abs output" for name, error in errors)
        found.append(_check("good", "Masked = cut", detail))
    for model in models:
        if quantization := model.row.get("quantization"):
            size = f"{(model.size or 0) / 1e6:.2f} MB on disk"
            bits = f"{anatomy.bits_per_weight(quantization):.2f} bits a weight, scales included"
            found.append(_check("good", f"Bits claimed = bits in the file: {model.name}", f"{size}, {bits}"))
    unloadable = {m.name: reason for m in models if (reason := _needs_library(m.row))}
    made = [model for model in models if model.row.get("equivalence")]
    if made:
        stock = [model.name for model in made if model.name not in unloadable]
        text = f"Stock Transformers loads {len(stock)} of {len(made)}" + (f": {', '.join(stock)}" if stock else "")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unloadable.items())
        found.append(_check("half" if unloadable else "good", text, reasons or "no import of lmcompress needed"))
    return found


def load_snippet(report: Report, model: Model) -> str:
    """Python code that loads a model and its tokenizer.

    Args:
        report: determines the task.
        model: model of the report.
    """
    head = auto_class_name(str(report["kind"]))
    needed = "import lmcompress  # registers its layers\n" if _needs_library(model.row) else ""
    path = json.dumps(str(model.row["folder"]))
    return (
        f"{needed}from transformers import {head}, AutoTokenizer\n\n"
        f"model = {head}.from_pretrained({path})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({path})"
    )


def _needs_library(row: Mapping[str, Any]) -> str | None:
    """Why stock Transformers cannot load a model, or None."""
    if row.get("format") == "vanilla":
        return None
    if row.get("quantization"):
        return "packed weights"
    if row.get("compact"):
        return "compact layers"
    pruning = row.get("pruning")
    return pruning["stock"]["reason"] if pruning and not pruning["stock"]["loads"] else None


def _check(state: str, text: str, detail: str) -> dict[str, str]:
    return {
        "state": state,
        "icon": {"good": "ok", "half": "warn", "bad": "stop"}[state],
        "text": text,
        "detail": detail,
    }


def _chips(report: Report, models: Sequence[Model], picked: Model) -> list[dict[str, Any]]:
    machine = report["machine"]
    chips = []
    if any(model.row.get("equivalence") for model in models):
        chips.append({"ok": True, "text": "✓ saved = reloaded"})
    if picked.row.get("equivalence") and not _needs_library(picked.row):
        chips.append({"ok": True, "text": f"✓ {picked.name} loads with stock Transformers"})
    units = models[0].units
    rows = f", {len(units):,} {'windows' if report['kind'] == 'causal_lm' else 'rows'}" if units else ""
    task = Path(str(report["task"])).name
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    for text in (f"{task}, {report['split']}{rows}", f"seed {report['seed']}", where):
        chips.append({"ok": False, "text": text})
    return chips


def _timing(reference: Model, picked: Model) -> str:
    return f"lmcompress benchmark {picked.row['folder']} \\\n  --against {reference.row['folder']}"
