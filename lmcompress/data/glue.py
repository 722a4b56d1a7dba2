"""The nine tasks of GLUE and its diagnostic set, with their official columns, classes and metrics."""

from __future__ import annotations

from collections.abc import Mapping

from lmcompress.data.tasks import Task, TaskKind

GLUE_HUB_ID = "nyu-mll/glue"
"""The Hub data set of all tasks, one configuration each."""

_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")


def _classification(
    name: str, text_columns: tuple[str, ...], label_names: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",)
) -> Task:
    return Task(f"glue/{name}", TaskKind.CLASSIFICATION, text_columns, "label", label_names, metrics)


GLUE_TASKS: Mapping[str, Task] = {
    "cola": _classification("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": _classification("sst2", ("sentence",), ("negative", "positive")),
    "mrpc": _classification("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _classification("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Task("glue/stsb", TaskKind.REGRESSION, _PAIR, "label", None, ("pearson", "spearmanr")),
    "mnli": _classification("mnli", ("premise", "hypothesis"), _NLI),
    "qnli": _classification("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "rte": _classification("rte", _PAIR, ("entailment", "not_entailment")),
    "wnli": _classification("wnli", _PAIR, ("not_entailment", "entailment")),
    "ax": _classification("ax", ("premise", "hypothesis"), _NLI, ("matthews_correlation",)),
}
"""Tasks by their GLUE name. Wang et al. 2019, https://arxiv.org/abs/1804.07461, table 1; label numbers as in
:data:`GLUE_HUB_ID`."""

EVALUATION_ONLY = frozenset({GLUE_TASKS["ax"]})
"""Tasks without training data, evaluated with a model trained on MNLI."""
