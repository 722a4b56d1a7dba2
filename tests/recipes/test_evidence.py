"""What results hold beside the scores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from lmcompress.data import Task
from lmcompress.evaluation import size_on_disk
from lmcompress.recipes import parse_recipe, run
from lmcompress.recipes.evidence import chance_level, evidence_of
from lmcompress.reporting import compare_runs
from lmcompress.reporting.evidence import decode, score_interval, units_of


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    recipe = parse_recipe(tiny.replace("max_steps: 4,", "max_steps: 4, logging_steps: 2,"))
    return run(recipe, tmp_path_factory.mktemp("run") / "tiny", console=Console(quiet=True)).folder


@pytest.fixture
def report(folder):
    return json.loads((folder / "results.json").read_text())


def test_predictions_give_the_score(report):
    assert report["chance"] == {"validation": {"accuracy": 0.5}}
    assert report["latency"]["repeats"] == 3
    for row in report["rows"]:
        found = score_interval(units_of(report, row, "validation"))
        assert found.value == pytest.approx(row["metrics"]["validation"]["accuracy"])


def test_bytes_of_modules_add_up_to_the_files(report):
    for row in report["rows"]:
        size = size_on_disk(row["folder"])
        assert sum(module["bytes"] for module in row["modules"]) == size.total_bytes
        of = {module["path"]: (module["part"], module["block"]) for module in row["modules"]}
        assert of["embeddings.word_embeddings"] == ("embeddings", None)
        assert of["encoder.layer.1.attention.self.key"] == ("attention", 1)
        assert of["encoder.layer.0.intermediate.dense"] == of["encoder.layer.0.output.dense"] == ("feed-forward", 0)
        assert of["encoder.layer.0.output.LayerNorm"] == ("other", 0) and of["classifier"] == ("head", None)


def test_the_log_has_every_term_of_the_loss(report):
    teacher, student, control = report["rows"]
    assert {"loss_label", "loss_kd"} <= set(student["log"][0]) and student["log"][-1]["step"] == 4
    assert not any(key.startswith("loss_kd") for entry in control["log"] for key in entry)
    assert teacher["log"]


def test_tokens_that_do_not_count_are_left_out():
    own, shared = evidence_of([np.array([1, 2, 3]), np.array([4]), np.array([5])], [[1, -100, 0], [-100], [5]])
    assert decode(own["predictions"]).tolist() == [1, 3, 5] and decode(shared["labels"]).tolist() == [1, 0, 5]
    assert decode(shared["lengths"]).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("kind", "metric", "labels", "level"),
    [
        ("classification", "accuracy", np.array([0, 1, 1, 1]), 0.75),
        ("classification", "f1", np.array([0, 1, 1, 1]), 6 / 7),
        ("classification", "matthews_correlation", np.array([0, 1, 1, 1]), 0.0),
        ("classification", "accuracy", np.arange(20), 0.05),
        ("regression", "pearson", np.array([0.0, 1.0, 2.0]), 0.0),
        ("regression", "mse", np.array([0.0, 2.0]), 1.0),
        ("multi_label", "f1_micro", np.array([[1, 0], [1, 1]]), 6 / 7),
        ("token_classification", "accuracy", [np.array([0, 0, -100]), np.array([1])], 2 / 3),
    ],
)
def test_chance_is_the_best_that_one_answer_to_all_rows_scores(kind, metric, labels, level):
    names = None if kind == "regression" else tuple(map(str, range(20)))
    task = Task("t", kind, ("text",), "label", names, (metric,))
    assert chance_level(task, labels) == {metric: pytest.approx(level)}


def test_rows_without_labels_have_no_chance_level():
    task = Task("t", "classification", ("text",), "label", ("a", "b"))
    assert chance_level(task, np.array([-1, -1])) == {}


def test_models_that_are_still_there_are_timed_again_for_a_comparison(folder, tmp_path):
    second = shutil.copytree(folder, tmp_path / "two")
    report = json.loads((second / "results.json").read_text())
    # a student of its own, and times that nobody could have measured
    report["rows"][1] |= {"folder": str(second / "student"), "parameters": 1}
    for row in report["rows"]:
        row["latency"][0] |= {"median_ms": 123456.0, "lower_ms": 123456.0, "upper_ms": 123456.0}
    (second / "results.json").write_text(json.dumps(report))
    text = compare_runs([folder, second], tmp_path / "c.html").read_text()
    assert "✓ timed together" in text and "123,456" not in text and "two/student" in text
