"""Sentence encoders on tasks of similarity: two texts and a rating in each row, as in STS-B."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcompress.data import TaskData, TaskKind
from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.evaluation import SIMILARITY_METRICS, similarity_metrics
from lmcompress.sentences import SentenceEncoder


def measured_similarity(
    encoder: SentenceEncoder, data: TaskData, split: str, *, metrics: Sequence[str] | None = None, batch_size: int = 32
) -> dict[str, float]:
    """How well the cosine of two embeddings agrees with the ratings of a split.

    Args:
        encoder: moved to the GPU, if there is one.
        data: a regression on two texts.
        split: name of the split, with ratings.
        metrics: some of ``spearmanr`` and ``pearson``; None: both.
        batch_size: sentences per forward pass.

    Returns:
        name to value.

    Raises:
        LmcompressError: If the task has no two texts with a rating, or a metric does not fit.
    """
    task = data.task
    if task.kind is not TaskKind.REGRESSION or len(task.text_columns) != 2:
        raise LmcompressError(
            f"a sentence encoder is evaluated on two texts and a rating of their similarity in each row, got "
            f"{task.name}, a {task.kind} task of {', '.join(task.text_columns)}"
        )
    for name in metrics or ():
        if name not in SIMILARITY_METRICS:
            known = nearest(name, SIMILARITY_METRICS)
            raise LmcompressError(f"{argument('evaluation.metrics')}: {name!r} does not fit similarities{known}")
    encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = data.splits()[split]
    first, second = (encoder.encode(rows[column][:], batch_size) for column in task.text_columns)
    found = similarity_metrics(first, second, rows[task.label_column][:])
    return {name: found[name] for name in metrics or SIMILARITY_METRICS}
