"""Checks before training: models, stores, heads and losses that are incompatible are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.losses import LOGIT_LOSSES, LogitLoss, loss_for
from lmcompress.distillation.step import PER_TOKEN
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of

OVER_VOCABULARY = ("causal_lm", "masked_lm")
"""Heads whose outputs are the tokens of the vocabulary."""


def problem_type_of(model: PreTrainedModel) -> str:
    """The kind of head of a model, as :func:`~lmcompress.distillation.losses.loss_for` names it, or ``masked_lm``.

    Args:
        model: a model with a head.

    Returns:
        A problem type such as ``"regression"``.

    Raises:
        LmcompressError: If logits cannot be distilled for this kind of head.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        stated = getattr(model.config, "problem_type", None)
        return stated or ("regression" if model.config.num_labels == 1 else "single_label_classification")
    if name.endswith("ForTokenClassification"):
        return "token_classification"
    if name.endswith("ForMaskedLM"):
        return "masked_lm"
    if anatomy_of(model).head is not None:
        return "causal_lm"
    raise LmcompressError(
        f"cannot distil the logits of {name}: known are ...ForSequenceClassification, ...ForTokenClassification, "
        "...ForMaskedLM and causal language models"
    )


def columns_of(dataset: Any) -> Sequence[str]:
    """Names of the columns of a data set, or none if they cannot be known without consuming it.

    Args:
        dataset: any data set, or None.
    """
    if (names := getattr(dataset, "column_names", None)) is not None:
        return list(names)
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    return []


def _check_separate(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    if student is teacher or any(id(parameter) in own for parameter in teacher.parameters()):
        raise LmcompressError(
            "student and teacher share parameters, so there would be nothing to learn and the student would be frozen: "
            "load the teacher a second time, or use copy.deepcopy(model)"
        )


def check_teacher(student: PreTrainedModel, teacher: Teacher, problem: str, loss: LogitLoss | None) -> None:
    """Refuse a teacher that the student cannot be fitted to.

    Args:
        student: not wrapped.
        teacher: a model, or a store.
        problem: problem type of the student's head.
        loss: loss on the logits; None if there is none.

    Raises:
        LmcompressError: If the two share parameters or, with a loss on the logits, if heads, labels or vocabularies
            do not agree, or a store lacks what the loss needs.
    """
    if teacher.model is not None:
        _check_separate(student, teacher.model)
    if loss is None:
        return
    if teacher.model is not None:
        _check_agreement(student, teacher.model, problem)
    elif isinstance(teacher, StoredTeacher):
        _check_store(student, teacher, problem, loss)


def check_config(config: DistillationConfig, problem: str) -> None:
    """Refuse options that do not fit the student's head.

    Args:
        config: the configuration.
        problem: problem type of the student's head.

    Raises:
        LmcompressError: If a part of the configuration needs another kind of head.
    """
    if config.probability_shift and problem in ("regression", "multi_label_classification"):
        raise LmcompressError(f"probability_shift needs one correct class; a head for {problem} has none")
    if config.token_scaling is not None and problem not in PER_TOKEN:
        raise LmcompressError(
            f"token_scaling weighs the tokens of a sequence; the student's head is for {problem} and has one "
            "output for all: leave it out"
        )


def checked_loss(config: DistillationConfig, student: PreTrainedModel, problem: str) -> LogitLoss:
    """The loss on the logits, tried on two rows with the shape of the student's logits.

    Args:
        config: the configuration.
        student: determines the size of the head.
        problem: problem type of its head.

    Raises:
        LmcompressError: If the loss is unknown, does not fit the head, or does not give one finite value per row with a
            gradient to the student.
    """
    # a masked language model is a token classifier over the vocabulary
    loss = loss_for("token_classification" if problem == "masked_lm" else problem, config.loss)
    if config.weight == 0 or loss in LOGIT_LOSSES.values():
        return loss
    mine, theirs = torch.linspace(-1, 1, 2 * 2 * _outputs_of(student, problem)).view(2, 2, -1).unbind()
    each = torch.full((2,), config.temperature) if config.temperature_schedule.kind != "constant" else None
    options = {
        "temperature": config.temperature if each is None else each,
        "scale_by_temperature": config.scale_by_temperature,
    } | loss_options(config, loss)
    try:
        rows = loss.function(mine.clone().requires_grad_(), theirs, **options)
    except Exception as error:
        raise LmcompressError(
            f"the logit loss {loss.name!r} fails on two rows of logits: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(rows, Tensor) or rows.shape != (2,) or rows.dtype != torch.float32 or not rows.requires_grad:
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise LmcompressError(
            f"the logit loss {loss.name!r} must return one float32 value per row, (2,) of logits {tuple(mine.shape)}, "
            f"with a gradient to the student, got {got}: do not reduce over rows, do not detach the student"
        )
    if not rows.isfinite().all():
        raise LmcompressError(
            f"the logit loss {loss.name!r} must be finite, got {rows.tolist()} for logits from -1 to 1"
        )
    return loss


def loss_options(config: DistillationConfig, loss: LogitLoss) -> dict[str, float]:
    """Arguments that only some losses on the logits take.

    Args:
        config: configuration that has their values.
        loss: the loss to call.
    """
    return {"beta": config.beta} if loss.takes_beta else {}


def refused_inputs(student: PreTrainedModel, teachers: Sequence[Teacher]) -> str | None:
    """The reason why batches need separate inputs for a teacher, if one has a vocabulary of another size.

    Args:
        student: not wrapped.
        teachers: those without a model are ignored.
    """
    for teacher in teachers:
        if teacher.model is None or teacher.model.config.vocab_size == student.config.vocab_size:
            continue
        return (
            f"the student has a vocabulary of {student.config.vocab_size} tokens and the teacher one of "
            f"{teacher.model.config.vocab_size}, but both would be given the same input_ids: tokenize for the teacher "
            "too and add its columns as teacher_input_ids and teacher_attention_mask"
        )
    return None


def _outputs_of(student: PreTrainedModel, problem: str) -> int:
    size: int = student.config.vocab_size if problem in OVER_VOCABULARY else student.config.num_labels
    return size


def _check_store(student: PreTrainedModel, teacher: StoredTeacher, problem: str, loss: LogitLoss) -> None:
    meta, folder = teacher.store.meta, teacher.store.folder
    unit = "token" if problem in PER_TOKEN else "row"
    if meta.logits != unit:
        raise LmcompressError(
            f"the student's head is for {problem} and needs logits per {unit}; the teacher store {folder} has them "
            f"per {meta.logits}"
        )
    size, of = _outputs_of(student, problem), "tokens" if problem in OVER_VOCABULARY else "labels"
    if meta.vocab_size != size:
        raise LmcompressError(
            f"the student has {size} {of}, the teacher store {folder} was made for {meta.vocab_size}: they must agree"
        )
    if meta.top_k is not None and meta.top_k < meta.vocab_size and not loss.truncated:
        sigmoid = problem in ("multi_label_classification", "regression")
        raise LmcompressError(
            f"the teacher store {folder} keeps the top {meta.top_k} of {meta.vocab_size} logits, which describe a "
            f"softmax; {'a head for ' + problem if sigmoid else 'the loss ' + loss.name} needs all of them: build it "
            "again without top_k"
        )


def _check_agreement(student: PreTrainedModel, teacher: PreTrainedModel, problem: str) -> None:
    names = [str(model.config.name_or_path or type(model).__name__) for model in (student, teacher)]
    if problem in OVER_VOCABULARY:
        sizes = student.config.vocab_size, teacher.config.vocab_size
        if sizes[0] != sizes[1]:
            raise LmcompressError(
                f"student and teacher must share a vocabulary: {names[1]} has {sizes[1]} tokens, {names[0]} has "
                f"{sizes[0]}. Choose a student of the teacher's family, or resize its embeddings with "
                "resize_token_embeddings"
            )
        return
    if problem_type_of(teacher) != problem:
        raise LmcompressError(
            f"the student's head is for {problem}, the teacher's ({names[1]}) for {problem_type_of(teacher)}"
        )
    labels = student.config.num_labels, teacher.config.num_labels
    if labels[0] != labels[1]:
        raise LmcompressError(
            f"the student has {labels[0]} labels, the teacher ({names[1]}) has {labels[1]}: they must agree"
        )
    mine, theirs = ([str(model.config.id2label.get(i, i)) for i in range(labels[0])] for model in (student, teacher))
    generic = [f"LABEL_{i}" for i in range(labels[0])]
    if mine != theirs and generic not in (mine, theirs):
        raise LmcompressError(
            f"student and teacher name their labels differently: {mine[:5]} and {theirs[:5]}; "
            "set id2label and label2id of the student's config to the teacher's"
        )
