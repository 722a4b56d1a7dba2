"""Measurements at the end of a run: quality, size and latency of all its models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lmcompress.checkpoint.card import model_card
from lmcompress.checkpoint.encoding import weight_count
from lmcompress.checkpoint.structure import recorded_structure
from lmcompress.data import Task, TaskKind
from lmcompress.evaluation import (
    ENTITY_F1,
    LatencyRow,
    Perplexity,
    answer_candidates,
    compare_latency,
    compute_metrics,
    entity_f1,
    machine,
    perplexity,
    perplexity_of_labels,
    predict,
    predict_logits,
    predictions_from_logits,
    size_on_disk,
    span_scores,
    verdict,
    written_scores,
    written_texts,
)
from lmcompress.families import anatomy_of
from lmcompress.model import REPORT_FILE
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.evidence import chance_level, evidence_of, module_bytes, training_log
from lmcompress.recipes.files import write_json, write_text
from lmcompress.recipes.materials import Materials, text_of
from lmcompress.recipes.metrics import BESIDE_ACCURACY, LOWER_IS_BETTER, measured_metrics
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.parts.base import StagePart
from lmcompress.reporting import card_rows
from lmcompress.reporting.evidence import encode
from lmcompress.reporting.models import collect, pick

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Entry:
    """A row of the table, before it is measured.

    Attributes:
        name: name of the model in the table.
        role: teacher, student, control, pruned, quantized, shared, compact or model.
        path: path to load it from.
        materials: rows with the model's own tokenizer.
        made_here: whether the folder was written by this run, with a report of its own.
        training: summary of its training, as JSON types; empty if it was not trained here.
        done: report of each part, by its key, as JSON types; None if there is none.
    """

    name: str
    role: str
    path: str
    materials: Materials
    made_here: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)


def measure(entries: Sequence[Entry], reference: str, notes: Sequence[str]) -> dict[str, Any]:
    """Load all models, measure them, and put the numbers together.

    Args:
        entries: at least one.
        reference: name of the model the others are compared with; it comes first.
        notes: facts needed to interpret the numbers.

    Returns:
        Contents of ``results.json``: JSON types. Besides the scores: ``chance`` (by split and metric, the score of a
        constant prediction), ``beside`` (metrics that the table shows beside the main one), ``evidence``
        (labels of each split, packed by :func:`~lmcompress.reporting.evidence.encode`), ``latency`` (repeats, load of
        the machine, the second timing of the first model), ``picked`` (the model that the page is about), and in each
        row ``evidence`` (predictions, scores of answers, or negative log-likelihoods of windows), ``modules`` (bytes on
        disk) and ``log`` (losses by term).
    """
    entries = sorted(entries, key=lambda entry: entry.name != reference)
    materials = entries[0].materials
    recipe, task = materials.recipe, materials.task
    cls = auto_class(task)
    loaded = {entry.name: cls.from_pretrained(entry.path).eval() for entry in entries}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared: dict[str, _Shared] = {split: _Shared() for split in recipe.evaluation.splits}
    rows = [_row(entry, loaded[entry.name].to(device), shared) for entry in entries]
    load = [_load()]
    latency = _latency(materials, loaded)
    for row in rows:
        row["latency"] = [entry for entry in latency if entry["model"] == row["name"]]
    metric = measured_metrics(task)[0]
    report = {
        "recipe": recipe.name,
        "description": recipe.description,
        "paper": recipe.paper,
        "task": task.name,
        "kind": task.kind.value,
        "metric": metric,
        "lower_is_better": metric in LOWER_IS_BETTER,
        "beside": [name for name in task.metrics[1:] if name == BESIDE_ACCURACY],
        "split": recipe.evaluation.splits[0],
        "reference": reference,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("lmcompress", "torch", "transformers", "datasets", "tokenizers")},
        "seed": recipe.seed,
        "chance": {split: found.chance for split, found in shared.items()},
        "evidence": {split: found.evidence for split, found in shared.items()},
        "latency": {
            "repeats": recipe.evaluation.repeats,
            "load_before": load[0],
            "load_after": _load(),
            "again": [entry for entry in latency if entry["kind"] == "again"],
        },
        "rows": rows,
        "notes": list(notes),
    }
    return report | {"picked": pick(report, collect(report)).name}


def quality(materials: Materials, model: PreTrainedModel, split: str) -> dict[str, float]:
    """The metrics of a model on a split: those of the task, or perplexities.

    Args:
        materials: rows with the model's own tokenizer; ``evaluation`` of their recipe configures it.
        model: on any device.
        split: name of the split.
    """
    return _examined(materials, model, split)[0]


@dataclass
class _Shared:
    """The data that all models share on a split.

    Attributes:
        chance: score of a constant prediction, by metric.
        evidence: labels, packed.
    """

    chance: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


def _examined(
    materials: Materials, model: PreTrainedModel, split: str
) -> tuple[dict[str, float], dict[str, Any], _Shared]:
    """Metrics of a model on a split, the data they were computed from, and the part shared with other models."""
    evaluation, task = materials.recipe.evaluation, materials.task
    if task.chat:
        rows = materials.rows().splits()[split]
        answers = perplexity_of_labels(
            model, materials.tokenizer, rows, materials.collator(), batch_size=evaluation.batch_size
        )
        return _perplexities(task, answers, model)
    if task.kind is TaskKind.CAUSAL_LM:
        length, limit = materials.recipe.task.max_length, materials.recipe.task.limit
        text: str | list[int] = text_of(materials.data, split)
        if limit is not None:
            text = materials.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: limit * length]
        found = perplexity(
            model,
            materials.tokenizer,
            text,
            stride=evaluation.stride,
            max_length=length,
            batch_size=evaluation.batch_size,
        )
        return _perplexities(task, found, model)
    if task.kind.generates:
        return _written(materials, model, split)
    if task.kind is TaskKind.QUESTION_ANSWERING:
        return _answered(materials, model, split)
    logits, labels = predict(model, materials.rows().splits()[split], materials.collator(), evaluation.batch_size)
    said = predictions_from_logits(logits, task.kind.value)
    own, others = evidence_of(said, labels)
    of_rows = [name for name in task.metrics if name != ENTITY_F1]
    metrics = compute_metrics(of_rows, said, labels)
    if ENTITY_F1 in task.metrics:
        metrics[ENTITY_F1] = entity_f1(said, labels, task.label_names or ())
    return metrics, own, _Shared(chance_level(task, labels), others)


def _perplexities(
    task: Task, found: Perplexity, model: PreTrainedModel
) -> tuple[dict[str, float], dict[str, Any], _Shared]:
    metrics = {name: float(getattr(found, name)) for name in measured_metrics(task)}
    own = {"nll": encode(np.array(found.window_nll)), "tokens": encode(np.array(found.window_tokens))}
    # every token equally likely
    return metrics, own, _Shared({"token_perplexity": float(model.config.vocab_size)})


def _answered(
    materials: Materials, model: PreTrainedModel, split: str
) -> tuple[dict[str, float], dict[str, Any], _Shared]:
    """The same as :func:`_examined` for question answering, whose metrics are of texts."""
    task, windows = materials.task, materials.windows(split)
    logits = predict_logits(model, windows.rows, materials.collator(), materials.recipe.evaluation.batch_size)
    answers = [found["text"] for found in materials.data.splits()[split][task.label_column]]
    candidates = answer_candidates(logits, windows, none_allowed=not all(answers))
    scores = span_scores([best[0].text for best in candidates], answers)
    metrics = {name: float(scores[name].mean()) for name in task.metrics}
    return metrics, {"scores": {name: encode(scores[name]) for name in task.metrics}}, _Shared()


def _written(
    materials: Materials, model: PreTrainedModel, split: str
) -> tuple[dict[str, float], dict[str, Any], _Shared]:
    """The same as :func:`_examined` for texts that the model writes."""
    evaluation, task = materials.recipe.evaluation, materials.task
    texts = written_texts(
        model,
        materials.tokenizer,
        materials.rows().splits()[split],
        materials.collator(),
        batch_size=evaluation.batch_size,
        num_beams=evaluation.num_beams,
        max_new_tokens=evaluation.max_new_tokens,
    )
    references = materials.data.splits()[split][task.label_column]
    return written_scores(task.metrics, texts, list(references)), {}, _Shared()


def notes_of(entry: Entry) -> list[str]:
    """Notes on how a model was made, for readers of the table.

    Args:
        entry: a row.
    """
    notes = (note for part, report in _done(entry) for note in part.notes(report))
    return [f"{entry.name}: {note}" for note in dict.fromkeys(notes)]


def update_cards(report: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Add the table of a run to the cards and reports of its models, which were written earlier.

    Args:
        report: report of the run.
        folders: folders of the models.
    """
    more = {"table": card_rows(report), "machine": report["machine"], "notes": report["notes"]}
    for folder in folders:
        saved = json.loads((folder / REPORT_FILE).read_text("utf-8")) | more
        write_json(folder / REPORT_FILE, saved)
        write_text(folder / "README.md", model_card(saved))


def _row(entry: Entry, model: PreTrainedModel, shared: dict[str, _Shared]) -> dict[str, Any]:
    # the size of a model on the Hub is unknown
    size = size_on_disk(entry.path) if Path(entry.path).is_dir() else None
    saved = json.loads((Path(entry.path) / REPORT_FILE).read_text("utf-8")) if entry.made_here else {}
    structure = recorded_structure(model)
    examined = {split: _examined(entry.materials, model, split) for split in shared}
    # the first model is the reference
    for split, found in shared.items():
        if not found.chance and not found.evidence:
            shared[split] = examined[split][2]
    return {
        "name": entry.name,
        "role": entry.role,
        "folder": entry.path,
        "metrics": {split: metrics for split, (metrics, _, _) in examined.items()},
        "evidence": {split: own for split, (_, own, _) in examined.items()},
        "parameters": weight_count(model),
        "size_bytes": None if size is None else size.total_bytes,
        "weights_bytes": None if size is None else size.weights_bytes,
        "modules": None if size is None else module_bytes(Path(entry.path), model),
        "hidden_size": anatomy_of(model).hidden_size,
        "head_size": structure.head_size,
        "blocks": [block.model_dump(exclude_none=True) for block in structure.blocks],
        "equivalence": saved.get("equivalence"),
        "format": saved.get("format"),
        "training": entry.training,
        "log": training_log(Path(entry.path), STAGE_FILE) if entry.made_here else [],
        **{part.key: entry.done.get(part.key) for part in PARTS if part.reports},
        "columns": {title: cell for part, report in _done(entry) for title, cell in part.columns(report).items()},
        "latency": [],
    }


def _done(entry: Entry) -> list[tuple[StagePart[Any], Any]]:
    return [(part, report) for part in PARTS if (report := entry.done.get(part.key))]


def _latency(materials: Materials, models: Mapping[str, PreTrainedModel]) -> list[dict[str, Any]]:
    evaluation = materials.recipe.evaluation
    if not evaluation.latency_batches:
        return []
    length = evaluation.sequence_length or min(128, materials.recipe.task.max_length)
    measured: list[LatencyRow] = compare_latency(
        models, batch_sizes=evaluation.latency_batches, sequence_length=length, repeats=evaluation.repeats
    )
    return [{**vars(row), "verdict": words} for row, words in zip(measured, verdict(measured), strict=True)]


def _load() -> float | None:
    """Load average of the last minute; None if the system does not provide it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
