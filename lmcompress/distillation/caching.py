"""A teacher that runs once before training and is read from a store from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lmcompress.activations.capture import extract
from lmcompress.distillation.borrowing import borrow, give_back, movable
from lmcompress.distillation.store import TeacherStore
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError


def stored_once(teacher: Teacher, number: int, trainer: Any, folder: str | Path | None) -> Teacher:
    """A store of a teacher's logits on the training data, written by one process.

    Args:
        teacher: a teacher; one that is no model is returned unchanged.
        number: its number among the teachers.
        trainer: the trainer, with its training set and collator.
        folder: where to write; default: in the trainer's output folder.

    Returns:
        The source to train with.

    Raises:
        LmcompressError: If the training set has no length, so that it cannot be run through once.
    """
    model = teacher.model
    if model is None:
        return teacher
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise LmcompressError(
            f"is_caching_logits needs a training set with a length, got {type(rows).__name__}: leave it out, and the "
            "teacher runs in every step"
        )
    place = Path(trainer.args.output_dir) / "teacher_store" if folder is None else Path(folder)
    place = place / str(number)
    # the columns and the collator of training, by which rows are found again
    if hasattr(rows, "column_names"):
        rows = trainer._remove_unused_columns(rows, description="teacher")
    if trainer.is_world_process_zero():
        # a data loader draws a seed: the run must be the one that it would be without a store
        with torch.random.fork_rng(devices=[]):
            _build(place, model, rows, trainer)
    trainer.accelerator.wait_for_everyone()
    return StoredTeacher(TeacherStore.open(place))


def _build(folder: Path, model: PreTrainedModel, rows: Any, trainer: Any) -> None:
    borrow(model)
    try:
        if movable(model):
            model.to(trainer.args.device)
        folder.parent.mkdir(parents=True, exist_ok=True)
        TeacherStore.build(
            folder,
            model,
            rows,
            trainer.data_collator,
            extract=extract,
            dtype="float32",
            batch_size=trainer.args.per_device_train_batch_size,
            progress=not trainer.args.disable_tqdm,
        )
    finally:
        give_back(model)
