"""The metrics that fit a task, and those that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmcompress.data import Task, TaskData, TaskKind
from lmcompress.errors import LmcompressError, argument, nearest

PERPLEXITIES = ("token_perplexity", "word_perplexity", "bits_per_byte")
"""Metrics of language models, the main one first."""

LOWER_IS_BETTER = frozenset({*PERPLEXITIES, "mse"})

_OF_CLASSES = ("accuracy", "f1_macro", "f1_micro", "matthews_correlation")
_FITTING = {
    TaskKind.CLASSIFICATION: _OF_CLASSES,
    TaskKind.REGRESSION: ("pearson", "spearmanr", "mse"),
    TaskKind.MULTI_LABEL: ("f1_micro", "f1_macro", "accuracy"),
    TaskKind.TOKEN_CLASSIFICATION: _OF_CLASSES,
    TaskKind.CAUSAL_LM: PERPLEXITIES,
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
    return _FITTING[task.kind] + (("f1",) if binary else ())


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
        metrics: the main one first; None: those of the task.

    Raises:
        LmcompressError: If a metric does not fit the task, or is repeated.
    """
    if metrics is None:
        return data
    fitting = fitting_metrics(data.task)
    for name in metrics:
        if name not in fitting:
            raise LmcompressError(
                f"{argument('evaluation.metrics')}: {name!r} does not fit {data.task.name}, a "
                f"{data.task.kind} task{nearest(name, fitting)}"
            )
    return replace(data, task=replace(data.task, metrics=tuple(dict.fromkeys(metrics))))
