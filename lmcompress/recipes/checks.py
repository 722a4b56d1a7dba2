"""Checks that fail before a run begins rather than later: folders, lengths, and Transformers' training arguments."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lmcompress.data import Task, TaskKind
from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.recipes.lookup import first_line, found
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.specs import FromScratch
from lmcompress.recipes.training import Training

_ROBERTA_LIKE = ("roberta",)


def check_run(recipe: Recipe, folder: Path, task: Task) -> None:
    """Refuse anything that would stop a run after it has begun.

    Args:
        recipe: validated recipe.
        folder: folder of the run.
        task: as its rows describe it.

    Raises:
        LmcompressError: If the folder cannot be written, a length exceeds a model's positions, or a stage's training
            requires a library that is not installed or a feature that this machine lacks.
    """
    check_writable(folder)
    check_lengths(recipe)
    for stage in recipe.stages:
        if stage.trains:
            try:
                check_training(stage.training, task)
            except LmcompressError as error:
                raise LmcompressError(f"stage {stage.name!r}, training: {error}") from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written to.

    Args:
        folder: need not exist.

    Raises:
        LmcompressError: If it, or a parent, is a file or not writable.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise LmcompressError(f"cannot write to {folder}: {there} is a file, and the output is a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LmcompressError(f"cannot write to {folder}: no permission to write to {there}")


def check_lengths(recipe: Recipe) -> None:
    """Refuse lengths that exceed the positions of a model of the recipe.

    Args:
        recipe: validated recipe.

    Raises:
        LmcompressError: If ``task.max_length`` or ``evaluation.sequence_length`` is greater than the positions of the
            recipe's model or of an external teacher.
    """
    stages = {stage.name for stage in recipe.stages}
    named = [recipe.model] if isinstance(recipe.model, str) else []
    named += [name for s in recipe.stages if s.distillation for name in s.distillation.teachers if name not in stages]
    positions = {"the model": recipe.model.positions} if isinstance(recipe.model, FromScratch) else {}
    for name in dict.fromkeys(named):
        with found(name, "model"):
            positions[name] = positions_of(AutoConfig.from_pretrained(name))
    lengths = {"max_length": recipe.task.max_length, "evaluation.sequence_length": recipe.evaluation.sequence_length}
    for name, most in positions.items():
        for what, length in lengths.items():
            if length is not None and length > most:
                raise LmcompressError(
                    f"{argument(what)} must be at most {most}, the number of positions of {name}, got {length}"
                )


def positions_of(config: PretrainedConfig) -> int:
    """The maximum number of tokens of a model.

    Args:
        config: config of the model.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return 1 << 30
    # RoBERTa counts positions from the padding's id
    return int(most) - (int(config.pad_token_id or 0) + 1 if config.model_type in _ROBERTA_LIKE else 0)


def check_training(training: Training, task: Task) -> None:
    """Refuse a stage's training arguments that Transformers would refuse while it runs.

    Args:
        training: training arguments of the stage.
        task: determines the names of its metrics.

    Raises:
        LmcompressError: If a field has no such value, or names a library that is not installed, a precision that this
            machine lacks, or a metric that is not measured.
    """
    for field, names in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        given = getattr(training, field, None)
        if given is not None and given not in list(names):
            raise LmcompressError(
                f"{field} has no value {given!r}{nearest(str(given), [name.value for name in names])}"
            )
    with warnings.catch_warnings():
        # warnings are shown when the stage is trained
        warnings.simplefilter("ignore")
        try:
            arguments = TrainingArguments("unused", **{"report_to": "none"} | training.arguments())
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise LmcompressError(first_line(error)) from error
        _check_reports(arguments)
        _check_precision(arguments)
        _check_optimizer(arguments)
    _check_best_metric(arguments, task)


def _check_reports(arguments: TrainingArguments) -> None:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in arguments.report_to:
        if name not in known:
            raise LmcompressError(f"report_to has no value {name!r}{nearest(name, [*known, 'none', 'all'])}")
        if name in integration_utils.get_available_reporting_integrations():
            continue
        try:
            known[name]()
        except Exception as error:
            raise LmcompressError(f"report_to: {name} is not installed ({first_line(error)})") from error


def _check_precision(arguments: TrainingArguments) -> None:
    kind = arguments.device.type
    if kind == "cpu" and (arguments.fp16 or arguments.fp16_full_eval):
        raise LmcompressError("fp16 needs a GPU, which this machine lacks; leave it out, or choose bf16")
    if kind == "cuda" and (arguments.bf16 or arguments.bf16_full_eval) and not torch.cuda.is_bf16_supported():
        raise LmcompressError("bf16 is not possible on this GPU; leave it out, or choose fp16")


def _check_optimizer(arguments: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, RuntimeError) as error:
        raise LmcompressError(
            f"optim: {OptimizerNames(arguments.optim).value} is not installed ({first_line(error)})"
        ) from error
    except ValueError as error:
        # some need the model, which exists only when the stage is trained
        if "model" not in str(error):
            raise LmcompressError(f"optim: {first_line(error)}") from error


def _check_best_metric(arguments: TrainingArguments, task: Task) -> None:
    chosen = arguments.metric_for_best_model
    used = arguments.load_best_model_at_end or arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if not used or chosen is None:
        return
    measured = ["loss"]
    if task.kind not in (TaskKind.CAUSAL_LM, TaskKind.TOKEN_CLASSIFICATION):
        measured += task.metrics
    if chosen.removeprefix("eval_") not in measured:
        raise LmcompressError(f"metric_for_best_model {chosen!r} is not measured{nearest(chosen, measured)}")


__all__ = [
    "check_lengths",
    "check_run",
    "check_training",
    "check_writable",
    "positions_of",
]
