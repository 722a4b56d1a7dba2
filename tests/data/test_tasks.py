"""Tasks and what they tell a model's config."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lmcompress.data import GLUE_TASKS, Task, TaskData, TaskKind
from lmcompress.errors import LmcompressError


@pytest.mark.parametrize(
    ("kind", "label_names", "num_labels", "problem_type"),
    [
        ("classification", ("a", "b", "c"), 3, "single_label_classification"),
        ("regression", None, 1, "regression"),
        ("multi_label", ("a", "b"), 2, "multi_label_classification"),
        ("token_classification", ("O", "B"), 2, None),
    ],
)
def test_the_kind_decides_width_and_problem_type(kind, label_names, num_labels, problem_type):
    task = Task("t", kind, ("text",), "label", label_names)
    assert task.kind is TaskKind(kind)
    assert (task.num_labels, task.problem_type) == (num_labels, problem_type)
    assert task.metrics


def test_a_causal_task_has_no_labels():
    task = Task("t", "causal_lm", ("text",))
    assert (task.num_labels, task.problem_type, task.id2label, task.metrics) == (0, None, {}, ("perplexity",))


def test_names_and_numbers_of_classes_are_each_others_inverse():
    task = GLUE_TASKS["mnli"]
    assert {index: name for name, index in task.label2id.items()} == task.id2label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t", "regresion", ("a",), "y"), "unknown kind of task 'regresion'; did you mean 'regression'"),
        (("t", "regression", (), "y"), "must have 1 or 2 text columns, got \\[\\]"),
        (("t", "regression", ("a", "b", "c"), "y"), "must have 1 or 2 text columns, got \\['a', 'b', 'c'\\]"),
        (("t", "causal_lm", ("a", "b")), "a causal_lm task must have 1 text columns"),
        (("t", "causal_lm", ("a",), "y"), "label_column must be None for a causal_lm task, got 'y'"),
        (("t", "regression", ("a",)), "label_column must be named for a regression task, got None"),
        (("t", "classification", ("a",), "y"), "label_names must be given for a classification task"),
        (("t", "regression", ("a",), "y", ("p", "q")), "label_names must be None for a regression task"),
        (("t", "classification", ("a",), "y", ("p", "p")), "label_names must differ from one another"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(LmcompressError, match=message):
        Task(*arguments)


def test_a_task_is_official():
    assert list(GLUE_TASKS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "ax"]
    assert GLUE_TASKS["wnli"].label_names == ("not_entailment", "entailment")
    assert GLUE_TASKS["rte"].label_names == ("entailment", "not_entailment")
    assert GLUE_TASKS["cola"].metrics == GLUE_TASKS["ax"].metrics == ("matthews_correlation",)
    assert GLUE_TASKS["qqp"].metrics == ("accuracy", "f1")
    assert GLUE_TASKS["stsb"].metrics == ("pearson", "spearmanr")


def test_mapping_the_splits_keeps_names_task_and_notes():
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    task = Task("t", "classification", ("text",), "label", ("x", "y"))
    data = TaskData(task, rows, rows, None, {"validation_mismatched": rows}, ("n",))
    seen = []
    halved = data.map_splits(lambda name, split: seen.append(name) or split.select([0]))
    assert seen == ["train", "validation", "validation_mismatched"] == list(halved.splits())
    assert all(split.num_rows == 1 for split in halved.splits().values())
    assert (halved.task, halved.test, halved.notes) == (task, None, ("n",))
