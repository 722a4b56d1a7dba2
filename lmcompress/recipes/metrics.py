"""The metrics that fit a task, and those that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmcompress.data import Task, TaskData, TaskKind
from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.evaluation import ENTITY_F1, SPAN_METRICS, WRITTEN_METRICS, is_iob
from lmcompress.recipes.class_weights import is_unbalanced

PERPLEXITIES = ("token_perplexity", "word_perplexity", "bits_per_byte")
"""Metrics of language models, the main one first."""

LOWER_IS_BETTER = frozenset({*PERPLEXITIES, "mse"})

BESIDE_ACCURACY = "f1_macro"
"""The metric in which rare classes count as much as frequent ones."""

_OF_CLASSES = ("accuracy", "f1_macro", "f1_micro", "matthews_correlation")
_FITTING = {
    TaskKind.CLASSIFICATION: _OF_CLASSES,
    TaskKind.REGRESSION: ("pearson", "spearmanr", "mse"),
    TaskKind.MULTI_LABEL: ("f1_micro", "f1_macro", "accuracy"),
    TaskKind.TOKEN_CLASSIFICATION: _OF_CLASSES,
    TaskKind.QUESTION_ANSWERING: SPAN_METRICS,
    TaskKind.CAUSAL_LM: PERPLEXITIES,
    TaskKind.SUMMARIZATION: WRITTEN_METRICS,
    TaskKind.TRANSLATION: WRITTEN_METRICS,
}


def fitting_metrics(task: Task) -> tuple[str, ...]:
    """The metrics that fit a task.

    Args:
        task: any task.

    Example:
        >>> fitting_metrics(Task("scores", "regression", ("text",), "label"))
        ('pearson', 'spearmanr', 'mse')
    """
    binary = task.num_labels == 2 and task.kind in (TaskKind.CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION)
    entities = task.kind is TaskKind.TOKEN_CLASSIFICATION and is_iob(task.label_names or ())
    return _FITTING[task.kind] + (("f1",) if binary else ()) + ((ENTITY_F1,) if entities else ())


def measured_metrics(task: Task) -> tuple[str, ...]:
    """The metrics of a task, the main one first.

    Args:
        task: a task, from :func:`with_metrics`.
    """
    # "perplexity" stands for all of them
    return PERPLEXITIES if task.metrics == ("perplexity",) else task.metrics


def with_metrics(data: TaskData, metrics: Sequence[str] | None) -> TaskData:
    """The same rows, with other metrics.

    Args:
        data: data of any task.
        metrics: the main one first; None: those of the task, and macro-F1 beside a lone accuracy of classes that
            differ much in frequency.

    Raises:
        LmcompressError: If a metric does not fit the task, or is repeated.
    """
    if metrics is None:
        if data.task.metrics != ("accuracy",) or not is_unbalanced(data):
            return data
        metrics = ("accuracy", BESIDE_ACCURACY)
    fitting = fitting_metrics(data.task)
    for name in metrics:
        if name not in fitting:
            raise LmcompressError(
                f"{argument('evaluation.metrics')}: {name!r} does not fit {data.task.name}, a "
                f"{data.task.kind} task{nearest(name, fitting)}"
            )
    return replace(data, task=replace(data.task, metrics=tuple(dict.fromkeys(metrics))))
