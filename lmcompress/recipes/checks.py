"""Checks that fail before a run begins rather than later: folders, vocabularies, and training arguments."""

from __future__ import annotations

import copy
import os
import random
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PretrainedConfig, Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from lmcompress.data import Task, TaskKind
from lmcompress.data.columns import arrow_column
from lmcompress.errors import LmcompressError, nearest
from lmcompress.recipes.building import has_head_for
from lmcompress.recipes.lookup import first_line
from lmcompress.recipes.materials import Materials
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.training import Training


def check_run(recipe: Recipe, folder: Path, task: Task) -> None:
    """Refuse anything that would stop a run after it has begun.

    Args:
        recipe: validated recipe.
        folder: folder of the run.
        task: as its rows describe it.

    Raises:
        LmcompressError: If the folder cannot be written, or a stage's training requires a library that is not installed
            or a feature that this machine lacks.
    """
    check_writable(folder)
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
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        # a name that is too long
        raise LmcompressError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not there.is_dir():
        raise LmcompressError(f"cannot write to {folder}: {there} is a file, and the output is a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LmcompressError(f"cannot write to {folder}: no permission to write to {there}")


def check_vocabulary(materials: Materials, config: PretrainedConfig, name: str) -> None:
    """Refuse rows with tokens that a model has no embeddings of: its tokenizer is another model's.

    Args:
        materials: rows and tokenizer.
        config: of the model.
        name: of the model, for the message.

    Raises:
        LmcompressError: If a token of a row is beyond ``config.vocab_size``.
    """
    entries = int(config.vocab_size)
    if len(materials.tokenizer) <= entries:
        return
    splits = (split for split in materials.rows().splits().values() if split.num_rows)
    greatest = max(pc.max(pc.list_flatten(arrow_column(split, "input_ids"))).as_py() for split in splits)
    if greatest >= entries:
        raise LmcompressError(
            f"{name} has embeddings of {entries} tokens, its tokenizer has {len(materials.tokenizer)}, and the rows "
            f"hold token {greatest}: the tokenizer is another model's"
        )


def check_trained_for(config: PretrainedConfig, task: Task, name: str) -> None:
    """Refuse a model whose head is for other labels than the task's, or that has none.

    Args:
        config: of the model.
        task: that it is to be measured on.
        name: of the model, for the message.

    Raises:
        LmcompressError: If it was not trained for this task.
    """
    if not has_head_for(config, task):
        guessed = f" (a column of texts alone makes {task.name} that)" if task.kind is TaskKind.CAUSAL_LM else ""
        raise LmcompressError(
            f"{name} is a {', '.join(config.architectures or ())}, without a trained head for {task.kind}{guessed}: "
            "fine-tune it first"
        )
    if task.kind is TaskKind.CAUSAL_LM or task.kind.generates:
        return
    if config.num_labels != task.num_labels:
        raise LmcompressError(
            f"{name} has {config.num_labels} labels, {task.name} has {task.num_labels}: "
            "it was not trained for this task"
        )
    names = [str(config.id2label.get(i, i)) for i in range(task.num_labels)]
    if task.label_names and names != list(task.label_names) and names != [f"LABEL_{i}" for i in range(task.num_labels)]:
        raise LmcompressError(
            f"{name} calls its labels {names[:5]}, {task.name} {list(task.label_names)[:5]}: numbers would not agree"
        )


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
        arguments = training.trainer_arguments("unused")
        _check_reports(arguments)
        _check_precision(arguments)
        _check_kernels(arguments)
        _check_optimizer(arguments)
        _try_trainer(arguments)
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


def _check_kernels(arguments: TrainingArguments) -> None:
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise LmcompressError("use_liger_kernel: liger-kernel is not installed (pip install liger-kernel)")


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


def _try_trainer(arguments: TrainingArguments) -> None:
    """Let Transformers make a trainer of a model of one weight, with optimizer, schedule and loader of rows."""
    arguments = copy.copy(arguments)
    arguments.report_to, arguments.full_determinism = [], False
    state, drawn = random.getstate(), np.random.get_state()
    try:
        with TemporaryDirectory() as folder, torch.random.fork_rng():
            model = torch.nn.Linear(1, 1)
            model.config = PretrainedConfig()
            arguments.output_dir = folder
            rows: Any = [{"input_ids": [0], "labels": 0}]
            trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
            trainer.get_train_dataloader()
            if not arguments.optim_target_modules:
                trainer.create_optimizer_and_scheduler(num_training_steps=10)
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise LmcompressError(first_line(error)) from error
    finally:
        random.setstate(state)
        np.random.set_state(drawn)


def _check_best_metric(arguments: TrainingArguments, task: Task) -> None:
    chosen = arguments.metric_for_best_model
    used = arguments.load_best_model_at_end or arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if not used or chosen is None:
        return
    measured = ["loss"]
    if not task.kind.per_token:
        measured += task.metrics
    if chosen.removeprefix("eval_") not in measured:
        raise LmcompressError(f"metric_for_best_model {chosen!r} is not measured{nearest(chosen, measured)}")
