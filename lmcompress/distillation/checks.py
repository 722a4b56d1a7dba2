"""Checks before training: models, stores, heads and losses that are incompatible are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.losses import LOGIT_LOSSES, LogitLoss, loss_for
from lmcompress.distillation.step import PER_TOKEN, SPANS
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of

FEATURES, HEADLESS = "features", "headless"
"""Students of which only features are compared: with a head of another kind, and without any."""

OVER_VOCABULARY = ("causal_lm", "masked_lm", "seq2seq_lm")
"""Heads whose outputs are the tokens of the vocabulary."""


def problem_type_of(model: PreTrainedModel) -> str:
    """The kind of head of a model, as :func:`~lmcompress.distillation.losses.loss_for` names it, or ``masked_lm``.

    Args:
        model: a model with a head; its class may be derived from one of Transformers.

    Returns:
        A problem type such as ``"regression"``.

    Raises:
        LmcompressError: If logits cannot be distilled for this kind of head.
    """
    found = _kind_of_head(model)
    if found is None:
        raise LmcompressError(
            f"cannot distil the logits of {type(model).__name__}: known are ...ForSequenceClassification, "
            "...ForTokenClassification, ...ForMultipleChoice, ...ForQuestionAnswering, ...ForMaskedLM, "
            "...ForConditionalGeneration, causal language models, and classes derived from these. With weight: 0 only "
            "features are compared, for which any head will do, or none"
        )
    return found


def _kind_of_head(model: PreTrainedModel) -> str | None:
    names = [known.__name__ for known in type(model).__mro__]

    def ends(end: str) -> bool:
        return any(name.endswith(end) for name in names)

    if ends("ForSequenceClassification"):
        stated = getattr(model.config, "problem_type", None)
        return stated or ("regression" if model.config.num_labels == 1 else "single_label_classification")
    if ends("ForTokenClassification"):
        return "token_classification"
    if ends("ForMultipleChoice"):
        # its classes are the choices of a row
        return "single_label_classification"
    if ends("ForQuestionAnswering"):
        return SPANS
    if ends("ForMaskedLM"):
        return "masked_lm"
    if ends("ForConditionalGeneration"):
        return "seq2seq_lm"
    return "causal_lm" if anatomy_of(model).predicts_next else None


def problem_of(model: PreTrainedModel, config: DistillationConfig) -> str:
    """The kind of head of a student; where no logits are compared, any head will do, or none.

    Args:
        model: the student.
        config: the configuration.

    Returns:
        As :func:`problem_type_of`, or :data:`FEATURES` or :data:`HEADLESS`.

    Raises:
        LmcompressError: If logits are to be compared and cannot be.
    """
    if config.weight > 0 or _kind_of_head(model) is not None:
        return problem_type_of(model)
    return HEADLESS if model.base_model is model else FEATURES


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


def check_teacher(
    student: PreTrainedModel,
    teacher: Teacher,
    problem: str,
    loss: LogitLoss | None,
    vocab_size: int | None = None,
    *,
    across: bool = False,
) -> None:
    """Refuse a teacher that the student cannot be fitted to.

    Args:
        student: not wrapped.
        teacher: a model, or a store.
        problem: problem type of the student's head.
        loss: loss on the logits; None if there is none.
        vocab_size: tokens of a common tokenizer, if tables may be padded to different sizes.
        across: whether their vocabularies may differ.

    Raises:
        LmcompressError: If the two share parameters or, with a loss on the logits, if heads, labels or vocabularies
            do not agree, or a store lacks what the loss needs.
    """
    if teacher.model is not None:
        _check_separate(student, teacher.model)
    if loss is None:
        return
    if across and teacher.model is None:
        raise LmcompressError(
            "a teacher with another tokenizer must be a model, got a store of outputs: they are found by the student's "
            "tokens"
        )
    if teacher.model is not None:
        if not across:
            _check_agreement(student, teacher.model, problem, vocab_size)
    elif isinstance(teacher, StoredTeacher):
        _check_store(student, teacher, problem, loss, vocab_size)


def compared_tokens(
    student: PreTrainedModel, teachers: Sequence[Teacher], problem: str, vocab_size: int | None
) -> int | None:
    """The number of logits to compare, from the first: all (None), unless tables are padded to different sizes.

    Args:
        student: not wrapped.
        teachers: models or stores.
        problem: problem type of the student's head.
        vocab_size: tokens of the tokenizer that all share, if given.
    """
    if vocab_size is None or problem not in OVER_VOCABULARY:
        return None
    models = [teacher.model.config.vocab_size for teacher in teachers if teacher.model is not None]
    stores = [teacher.store.meta.vocab_size for teacher in teachers if isinstance(teacher, StoredTeacher)]
    return vocab_size if {*models, *stores} != {student.config.vocab_size} else None


def _share(sizes: Sequence[int], vocab_size: int | None) -> bool:
    """Whether tables of these sizes are of one vocabulary."""
    if len(set(sizes)) == 1:
        return True
    if vocab_size is not None and vocab_size > min(sizes):
        raise LmcompressError(
            f"vocab_size is the number of tokens of the tokenizer that student and teachers share, got {vocab_size}, "
            f"but one of them has only {min(sizes)}"
        )
    return vocab_size is not None


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
    if crosses(config):
        _check_crossing(config, problem)
    if config.on_policy is not None and problem != "causal_lm":
        raise LmcompressError(
            f"on_policy lets a causal language model write texts; the student's head is for {problem}: leave it out"
        )
    if config.emd is not None and problem == "seq2seq_lm":
        raise LmcompressError(
            "emd compares every layer with every other, and those of an encoder and of its decoder see other tokens: "
            "leave it out, and name layers in matches"
        )
    if config.token_scaling is not None and (problem not in PER_TOKEN or problem == SPANS):
        raise LmcompressError(
            f"token_scaling weighs the tokens of a sequence; the student's head is for {problem} and has one "
            "output for all: leave it out"
        )
    if config.temperature_schedule.kind != "constant" and problem == SPANS:
        raise LmcompressError(
            f"the temperature schedule {config.temperature_schedule.kind} compares logits of a fixed number of classes;"
            " the student's head is for question answering, whose classes are the tokens of a window: leave it out"
        )


def crosses(config: DistillationConfig) -> bool:
    """Whether the loss on the logits is one between two vocabularies.

    Args:
        config: the configuration.
    """
    if config.weight == 0:
        return False
    loss = None if config.loss == "auto" else LOGIT_LOSSES.resolve(config.loss)
    return config.shared_tokens is not None or (loss is not None and loss.across)


def _check_crossing(config: DistillationConfig, problem: str) -> None:
    what = "loss uld" if config.shared_tokens is None else f"shared_tokens {config.shared_tokens}"
    if problem != "causal_lm":
        raise LmcompressError(f"{what} is of causal language models; the student's head is for {problem}")
    parts = ("matches", "emd", "contrast", "homogeneity")
    if given := [name for name in parts if getattr(config, name)]:
        raise LmcompressError(
            f"{', '.join(given)}: features are compared at equal positions, which student and teacher do not have "
            f"with {what}, a loss for two tokenizers; leave them out, or take a teacher with the student's tokenizer"
        )
    others = {
        "probability_shift": config.probability_shift,
        "token_scaling": config.token_scaling is not None,
        "temperature_schedule": config.temperature_schedule.kind != "constant",
        "on_policy": config.on_policy is not None,
    }
    if given := [name for name, is_given in others.items() if is_given]:
        raise LmcompressError(f"{', '.join(given)} needs one vocabulary, {what} is for two; leave one of them out")


def check_crossing_models(student: PreTrainedModel, teachers: Sequence[Teacher], *, has_head: bool) -> None:
    """Refuse models whose logits cannot be compared over two vocabularies.

    Args:
        student: not wrapped.
        teachers: models.
        has_head: whether the student's logits are computed from its last hidden states.

    Raises:
        LmcompressError: If the student has no such head, a teacher predicts no next tokens, or the teachers'
            vocabularies differ in size.
    """
    models = [teacher.model for teacher in teachers if teacher.model is not None]
    others = [model for model in models if not anatomy_of(model).predicts_next]
    if not has_head or others:
        wrong = others[0] if others else student
        raise LmcompressError(
            "a distillation between two tokenizers needs causal language models with a head over the vocabulary, got "
            f"{type(wrong).__name__}"
        )
    if len(sizes := {int(model.config.vocab_size) for model in models}) > 1:
        raise LmcompressError(
            f"teachers with another tokenizer than the student must share one, got vocabularies of {sorted(sizes)} "
            "tokens"
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
    if problem in (FEATURES, HEADLESS):
        return LOGIT_LOSSES["kl"]
    # a masked language model is a token classifier over the vocabulary; so is a decoder whose labels are not shifted
    loss = loss_for("token_classification" if problem in ("masked_lm", "seq2seq_lm") else problem, config.loss)
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


def refused_inputs(
    student: PreTrainedModel, teachers: Sequence[Teacher], vocab_size: int | None = None, *, always: bool = False
) -> str | None:
    """The reason why batches need separate inputs for a teacher, if one has a vocabulary of another size.

    Args:
        student: not wrapped.
        teachers: those without a model are ignored.
        vocab_size: tokens of a common tokenizer, if tables may be padded to different sizes.
        always: whether they are needed even where the sizes agree, for their tokens are others.
    """
    if always:
        return (
            "shared_tokens compares a teacher that has another tokenizer, but the batch has no inputs for it: tokenize "
            "for the teacher too and add its columns as teacher_input_ids, teacher_attention_mask and teacher_labels"
        )
    for teacher in teachers:
        model = teacher.model
        if model is None or _share([student.config.vocab_size, model.config.vocab_size], vocab_size):
            continue
        return (
            f"the student has a vocabulary of {student.config.vocab_size} tokens and the teacher one of "
            f"{model.config.vocab_size}, but both would be given the same input_ids: tokenize for the teacher "
            "too and add its columns as teacher_input_ids and teacher_attention_mask"
        )
    return None


def _outputs_of(student: PreTrainedModel, problem: str) -> int:
    size: int = student.config.vocab_size if problem in OVER_VOCABULARY else student.config.num_labels
    return size


def _check_store(
    student: PreTrainedModel, teacher: StoredTeacher, problem: str, loss: LogitLoss, vocab_size: int | None
) -> None:
    meta, folder = teacher.store.meta, teacher.store.folder
    unit = "token" if problem in PER_TOKEN else "row"
    if meta.logits != unit:
        raise LmcompressError(
            f"the student's head is for {problem} and needs logits per {unit}; the teacher store {folder} has them "
            f"per {meta.logits}"
        )
    size, of = _outputs_of(student, problem), "tokens" if problem in OVER_VOCABULARY else "labels"
    padded = vocab_size if problem in OVER_VOCABULARY else None
    if not _share([size, meta.vocab_size], padded):
        raise LmcompressError(
            f"the student has {size} {of}, the teacher store {folder} was made for {meta.vocab_size}: they must agree"
        )
    if meta.top_k is not None and meta.top_k < meta.vocab_size and (not loss.truncated or problem == SPANS):
        sigmoid = problem in ("multi_label_classification", "regression", SPANS)
        raise LmcompressError(
            f"the teacher store {folder} keeps the top {meta.top_k} of {meta.vocab_size} logits, which describe a "
            f"softmax; {'a head for ' + problem if sigmoid else 'the loss ' + loss.name} needs all of them: build it "
            "again without top_k"
        )


def _check_agreement(student: PreTrainedModel, teacher: PreTrainedModel, problem: str, vocab_size: int | None) -> None:
    names = [str(model.config.name_or_path or type(model).__name__) for model in (student, teacher)]
    if problem in OVER_VOCABULARY:
        sizes = student.config.vocab_size, teacher.config.vocab_size
        if not _share(sizes, vocab_size):
            raise LmcompressError(
                f"student and teacher must share a vocabulary: {names[1]} has {sizes[1]} tokens, {names[0]} has "
                f"{sizes[0]}. Choose a student of the teacher's family; if both have one tokenizer and only their "
                "tables are padded to different sizes, set vocab_size to the tokenizer's, len(tokenizer)"
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
    mine, theirs = (_labels_of(model, labels[0]) for model in (student, teacher))
    generic = [f"LABEL_{i}" for i in range(labels[0])]
    if mine != theirs and generic not in (mine, theirs):
        raise LmcompressError(
            f"student and teacher name their labels differently: {mine[:5]} and {theirs[:5]}; "
            "set id2label and label2id of the student's config to the teacher's"
        )


def _labels_of(model: PreTrainedModel, count: int) -> list[str]:
    # a config that was changed after loading may have strings as keys, as JSON does
    names = {str(key): str(name) for key, name in (model.config.id2label or {}).items()}
    return [names.get(str(number), str(number)) for number in range(count)]
