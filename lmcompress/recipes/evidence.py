"""Data in ``results.json`` from which a report derives the uncertainty of the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from lmcompress.data import Task, TaskKind
from lmcompress.evaluation import ENTITY_F1, compute_metrics, size_on_disk, tensor_table
from lmcompress.evaluation.metrics import IGNORED_LABEL, Ragged
from lmcompress.families import anatomy_of
from lmcompress.reporting.evidence import encode

PARTS = ("embeddings", "attention", "feed-forward", "head", "other")
"""Parts of a model that bytes are counted by; ``other`` is norms, and the files besides the weights."""


def evidence_of(predictions: Ragged, labels: Ragged) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predictions and labels of a split in few bytes.

    Args:
        predictions: from :func:`~lmcompress.evaluation.predictions_from_logits`.
        labels: same shape.

    Returns:
        The entry in the model's row (``predictions``), and the entries shared by all rows (``labels``; ``lengths``, in
        tokens that count, where the rows are of tokens).
    """
    if isinstance(predictions, np.ndarray):
        return {"predictions": encode(predictions)}, {"labels": encode(np.asarray(labels))}
    kept = [np.asarray(row) != IGNORED_LABEL for row in labels]
    said = [np.asarray(row)[keep] for row, keep in zip(predictions, kept, strict=True) if keep.any()]
    right = [np.asarray(row)[keep] for row, keep in zip(labels, kept, strict=True) if keep.any()]
    lengths = np.array([len(row) for row in right])
    shared = {"labels": encode(np.concatenate(right)), "lengths": encode(lengths)}
    return {"predictions": encode(np.concatenate(said))}, shared


def chance_level(task: Task, labels: Ragged) -> dict[str, float]:
    """The chance level: the best score of a constant prediction.

    Args:
        task: determines the metrics.
        labels: labels of a split.

    Returns:
        Score by metric; metrics without such a level are left out.
    """
    flat: NDArray[Any] = labels if isinstance(labels, np.ndarray) else np.concatenate([np.asarray(r) for r in labels])
    if task.kind is TaskKind.MULTI_LABEL:
        answers = [np.zeros_like(flat), np.ones_like(flat)]
    elif task.kind is TaskKind.REGRESSION:
        answers = [np.full(len(flat), flat.mean())]
    else:
        flat = flat[flat >= 0]
        answers = [np.full(len(flat), answer) for answer in np.unique(flat)]
        if len(answers) > 10:
            answers = [np.full(len(flat), np.bincount(flat).argmax())]
    if not flat.size:
        return {}
    found: dict[str, float] = {}
    for name in task.metrics:
        if name == ENTITY_F1:
            # the best constant marks every word, which says nothing
            continue
        scores = [compute_metrics([name], answer, flat)[name] for answer in answers]
        # the correlation of a constant is undefined: nothing was learned, so 0
        score = float(min(scores) if name == "mse" else max(np.nan_to_num(scores)))
        found[name] = score
    return found


def module_bytes(folder: Path, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Bytes on disk by module, from the headers of the files.

    Args:
        folder: a checkpoint.
        model: model loaded from it, of a known family.

    Returns:
        For each module with tensors ``path`` (relative to the base model), ``part`` (of :data:`PARTS`), ``block`` (a
        number or None) and ``bytes``, in the order of the file; at the end the files beside the tensors.
    """
    places = _places(model)
    names = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    found: dict[str, dict[str, Any]] = {}
    for tensor in tensor_table(folder):
        name = tensor.name
        while name and name not in names:
            name = name.rpartition(".")[0]
        part, block = places.get(name, ("other", None))
        path = name.removeprefix(prefix)
        entry = found.setdefault(path, {"path": path, "part": part, "block": block, "bytes": 0})
        entry["bytes"] += tensor.num_bytes
    rest = size_on_disk(folder).total_bytes - sum(entry["bytes"] for entry in found.values())
    return [*found.values(), {"path": "tokenizer, config, headers", "part": "other", "block": None, "bytes": rest}]


def training_log(folder: Path, file: str) -> list[dict[str, float]]:
    """Losses by step and by term, as logged by the trainer.

    Args:
        folder: folder of a stage's model.
        file: file that describes the stage.

    Returns:
        ``step``, ``loss`` and every ``loss_…`` of each entry; empty if nothing was trained.
    """
    if not (folder / file).is_file():
        return []
    log: list[Mapping[str, Any]] = json.loads((folder / file).read_text("utf-8")).get("log") or []
    return [
        {key: value for key, value in entry.items() if key in ("step", "loss") or key.startswith("loss_")}
        for entry in log
        if "loss" in entry and "step" in entry
    ]


def _places(model: PreTrainedModel) -> dict[str, tuple[str, int | None]]:
    """Part and block by the name of a module."""
    anatomy = anatomy_of(model)
    blocks = {id(block.module): index for index, block in enumerate(anatomy.blocks)}
    ffn = {
        id(inner)
        for block in anatomy.blocks
        for coupled in block.coupled("neurons")
        for inner in block.get(coupled.part).modules()
    }
    places: dict[str, tuple[str, int | None]] = {}
    inside: dict[str, int] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        block = blocks.get(id(module), inside.get(parent))
        if block is not None:
            inside[name] = block
        places[name] = (_part(name, module, block, id(module) in ffn), block)
    return places


def _part(name: str, module: nn.Module, block: int | None, is_ffn: bool) -> str:
    if type(module).__name__.endswith("Norm"):
        return "other"
    if block is not None:
        return "feed-forward" if is_ffn else "attention"
    # by the name of the class, which packed and factorized embeddings have too
    return "embeddings" if "embedding" in f"{name} {type(module).__name__}".lower() else "head"
