"""Measurements of one trained model: its quality on a task, and the sensitivity of its blocks to pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import ClassLabel, Dataset, Value
from rich.console import Console
from transformers import AutoConfig, PreTrainedModel

from lmcompress.data import TaskData, TaskKind
from lmcompress.data.answers import holds_answers
from lmcompress.data.columns import find_label_column, find_text_columns, is_list
from lmcompress.data.sources import read_files
from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation import showing_progress
from lmcompress.export import is_exported, load_exported
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.sensitivity import sensitivity
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.checks import check_trained_for, check_vocabulary
from lmcompress.recipes.lengths import fitted_lengths
from lmcompress.recipes.lookup import found
from lmcompress.recipes.materials import Materials, check_split, limited, load_tokenizer, read_task
from lmcompress.recipes.measuring import quality
from lmcompress.recipes.metrics import LOWER_IS_BETTER, measured_metrics, with_metrics
from lmcompress.recipes.parts.pruning import calibration_batches
from lmcompress.recipes.progress import quiet_libraries
from lmcompress.recipes.schema import Recipe, Stage
from lmcompress.recipes.sentences import measured_similarity
from lmcompress.recipes.specs import EvaluationSpec, TaskSpec
from lmcompress.sentences import SentenceEncoder, is_sentence_encoder


def measure_sensitivity(
    model: str,
    task: TaskSpec,
    config: PruningConfig,
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    evaluation: EvaluationSpec | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Scores of a model's units, and its quality with a share of one block's heads or neurons masked, block by block.

    Args:
        model: folder, or name on the Hub.
        task: task that it was trained for; its ``limit`` reduces the time.
        config: criterion, parts (heads and neurons), labels and calibration rows; its target is ignored.
        shares: shares of a block's units.
        evaluation: its first split and main metric measure quality.
        console: console for progress; None: none is shown.

    Returns:
        JSON types: ``model``, ``task``, ``split``, ``metric``, ``lower_is_better``, ``criterion``, ``scores`` (by part,
        by block) and ``rows`` (see :class:`~lmcompress.pruning.structured.sensitivity.SensitivityRow`).

    Raises:
        LmcompressError: If the split does not exist, the model is of another task, or the criterion refuses it.
    """
    evaluation = evaluation or EvaluationSpec()
    split = evaluation.splits[0]
    with quiet_libraries(), showing_progress(console):
        materials, loaded = _ready(model, read_task(task), task, evaluation)
        criterion, seed = config.criterion_name, config.seed
        batches = calibration_batches(materials, config)
        scores = score(loaded, config.chosen_criterion, config.parts, batches, labels=config.labels, seed=seed)
        metric = measured_metrics(materials.task)[0]
        rows = sensitivity(loaded, scores, lambda gated: quality(materials, gated, split)[metric], shares=shares)
    return {
        "model": model,
        "task": materials.task.name,
        "split": split,
        "metric": metric,
        "lower_is_better": metric in LOWER_IS_BETTER,
        "criterion": criterion,
        "notes": list(materials.data.notes),
        "scores": {part: [tensor.tolist() for tensor in scores.tensors(part)] for part in scores.parts()},
        "rows": [row.as_dict() for row in rows],
    }


def evaluate_once(
    model: str, task: TaskSpec, evaluation: EvaluationSpec, *, split: str | None = None
) -> dict[str, Any]:
    """The quality of a model on one split, or on a task that is one file, whole.

    Args:
        model: folder of a checkpoint or of an exported model, or name on the Hub. A folder of sentence-transformers is
            measured on pairs of texts with ratings, by the cosine of their embeddings.
        task: task that it was trained for.
        evaluation: metrics, batch size, stride of perplexity.
        split: split of the task; None: ``validation``, or all of a task that is one file.

    Returns:
        JSON types: ``task``, ``split``, ``rows``, ``metrics`` and ``notes``.

    Raises:
        LmcompressError: If the split does not exist, a split is given for one file, or the model is of another task.
    """
    with quiet_libraries():
        named = task.name.partition("/")[0] in ("glue", "embedded")
        file = Path(task.data or task.name)
        whole = file.is_file() and not named
        if whole and split is not None:
            raise LmcompressError(
                f"{file} is one file, which is evaluated whole: leave out {argument('evaluation.splits')}"
            )
        data = read_task(task, _whole(file, task, model) if whole else None)
        if evaluation.stride is not None and data.task.kind is not TaskKind.CAUSAL_LM:
            raise LmcompressError(f"{argument('stride')} is of perplexity; {data.task.name} is a {data.task.kind} task")
        chosen = "validation" if whole or split is None else split
        evaluation = evaluation.model_copy(update={"splits": (chosen,)})
        if is_sentence_encoder(model) and not is_exported(model):
            used, metrics = _similarity(model, data, task, evaluation)
        else:
            materials, loaded = _ready(model, data, task, evaluation, exported=is_exported(model))
            used, metrics = materials.data, quality(materials, loaded, chosen)
    return {
        "task": used.task.name,
        "split": "all rows" if whole else chosen,
        "rows": used.splits()[chosen].num_rows,
        "metrics": metrics,
        "notes": _notes_of_whole(used.notes) if whole else list(used.notes),
    }


def _similarity(
    model: str, data: TaskData, task: TaskSpec, evaluation: EvaluationSpec
) -> tuple[TaskData, dict[str, float]]:
    """The rows that a sentence encoder was measured on, and its metrics."""
    split, chosen = evaluation.splits[0], limited(data, task)
    check_split(chosen, split)
    encoder = SentenceEncoder.from_pretrained(model)
    names = evaluation.metrics or task.metrics
    return chosen, measured_similarity(encoder, chosen, split, metrics=names, batch_size=evaluation.batch_size)


def load_compressed(name: str, auto_class: Any = None) -> CompressedModel:
    """A model from a folder or the Hub.

    Args:
        name: folder, or name on the Hub.
        auto_class: class such as ``AutoModelForCausalLM``; None: the class that wrote the checkpoint.

    Raises:
        LmcompressError: If there is none, or it was exported.
    """
    if is_exported(name):
        raise LmcompressError(
            f"{name} is an exported model, which is run, evaluated and benchmarked as it is: give the checkpoint that "
            "it was exported from"
        )
    with found(name, "model"):
        return CompressedModel.from_pretrained(name, auto_class)


def load_model(name: str, auto_class: Any = None) -> PreTrainedModel:
    """The model of :func:`load_compressed` itself, in evaluation mode.

    Args:
        name: folder, or name on the Hub.
        auto_class: class such as ``AutoModelForCausalLM``; None: the class that wrote the checkpoint.
    """
    return load_compressed(name, auto_class).model.eval()


def _ready(
    model: str, data: TaskData, task: TaskSpec, evaluation: EvaluationSpec, *, exported: bool = False
) -> tuple[Materials, PreTrainedModel]:
    """Rows and a trained model, each checked against the other, where quality can be measured."""
    data = with_metrics(data, evaluation.metrics or task.metrics)
    check_split(data, evaluation.splits[0])
    # called like a model of Transformers, and no more is asked of it here
    loaded = cast(PreTrainedModel, load_exported(model)) if exported else load_model(model, auto_class(data.task))
    check_trained_for(loaded.config, data.task, model)
    tokenizer = load_tokenizer(model, data.task)
    # as the runner makes batches from rows, for one model
    recipe = Recipe(name="one", model=model, task=task, stages=(Stage(name="none"),), evaluation=evaluation)
    recipe, notes = fitted_lengths(recipe, tokenizer, data.task.kind)
    materials = Materials(recipe, limited(data, task), tokenizer, data).of(recipe, notes)
    check_vocabulary(materials, loaded.config, model)
    if loaded.config.pad_token_id is None:
        # else a GPT-2 reads one row at a time only
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return materials, loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _whole(file: Path, task: TaskSpec, model: str) -> dict[str, Dataset]:
    """A file as a split to evaluate; its labels are the model's, since it may not contain all of them."""
    rows = read_files([file])
    texts = find_text_columns(rows.column_names, task.text_columns)
    label = find_label_column(rows.column_names, texts, task.label_column, task.kind)
    feature = None if label is None else rows.features[label]
    if label is None or is_list(feature) or holds_answers(feature) or task.kind is TaskKind.REGRESSION:
        return {"train": rows, "validation": rows}
    with found(model, "model"):
        config = AutoConfig.from_pretrained(model)
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    numbers = [str(i) for i in range(len(names))] if names == [f"LABEL_{i}" for i in range(len(names))] else names
    if len(names) > 1 and {str(value) for value in rows.unique(label)} <= set(numbers):
        rows = rows.cast_column(label, Value("string")).cast_column(label, ClassLabel(names=numbers))
    return {"train": rows, "validation": rows}


def _notes_of_whole(notes: Sequence[str]) -> list[str]:
    """The notes without those on the training rows, which are the same."""
    told = [note for note in notes if not note.startswith("train ")]
    return [note.replace("validation is", "what is evaluated is") for note in told]
