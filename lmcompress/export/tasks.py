"""The tasks that a model can be exported for."""

from __future__ import annotations

from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.export.causal import TextGeneration, TextGenerationWithPast
from lmcompress.export.config import ExportConfig
from lmcompress.export.heads import (
    Embeddings,
    Head,
    MaskedLanguageModel,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from lmcompress.families import anatomy_of

TASKS: dict[str, type[Head]] = {
    head.task: head
    for head in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        MaskedLanguageModel,
        TextGenerationWithPast,
        TextGeneration,
        Embeddings,
    )
}
"""The heads by name of the task."""

_CLASSES = {
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
}


def task_of(model: PreTrainedModel) -> str | None:
    """The task that a model's class is for, or None if it is not among :data:`TASKS`.

    Args:
        model: with or without a task head.
    """
    if model.base_model is model:
        return "embeddings"
    if anatomy_of(model).predicts_next:
        return TextGenerationWithPast.task
    names = [known.__name__ for known in type(model).__mro__]
    return next((task for end, task in _CLASSES.items() if any(name.endswith(end) for name in names)), None)


def head_class(model: PreTrainedModel, config: ExportConfig) -> type[Head]:
    """The head that a model is exported with.

    Args:
        model: with or without a task head.
        config: its ``task`` is taken, or that of the model's class.

    Raises:
        LmcompressError: If there is no such task, the model has another one, or its class has none of them.
    """
    own, asked = task_of(model), config.task
    if asked is not None and asked not in TASKS:
        raise LmcompressError(f"there is no task {asked!r} to export for{nearest(asked, TASKS)}")
    generates = own == TextGenerationWithPast.task and asked == TextGeneration.task
    if asked not in (None, own, "embeddings") and not generates:
        raise LmcompressError(
            f"a {type(model).__name__} cannot be exported for {asked}, it has another head; leave out "
            f"{argument('task')}"
        )
    chosen = asked or own
    if chosen is None:
        raise LmcompressError(
            f"a {type(model).__name__} cannot be exported as it is: the tasks are {', '.join(TASKS)}. Without its head "
            f"it can: {argument('task', repr('embeddings'))}"
        )
    if (config.pooling or config.normalize) and chosen != Embeddings.task:
        raise LmcompressError(f"pooling is of {argument('task', repr('embeddings'))}, got task {chosen}")
    return TASKS[chosen]
