"""Weights of classes in the loss on the labels, and metrics of classes that are not equally frequent."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipe import RECIPE, write_task

from lmcompress.data import load_task
from lmcompress.errors import LmcompressError
from lmcompress.recipes import parse_recipe, plan, run
from lmcompress.recipes.class_weights import WeightedLoss, class_weights, is_unbalanced, label_counts
from lmcompress.recipes.contents import dependencies
from lmcompress.reporting import card_rows

QUICK = ["stages.student.control=false", "evaluation.latency_batches=[]"]


def _data(**counts):
    rows = [{"text": f"{name} {i}", "label": name} for name, count in counts.items() for i in range(count)]
    return load_task("mine", data={"train": rows, "validation": rows})


def _words(*labels):
    rows = [{"words": ["a"] * len(row), "label": list(row)} for row in labels]
    return load_task("tags", data={"train": rows, "validation": rows}, text_columns=["words"])


def test_balanced_weights_are_inverse_to_the_counts_with_a_mean_of_one():
    data = _data(a=60, b=30, c=10)
    assert label_counts(data).tolist() == [60, 30, 10]
    # as sklearn has them: rows / (classes * count)
    assert class_weights(data, "balanced") == pytest.approx([100 / 180, 100 / 90, 100 / 30])
    assert class_weights(data, (1, 1, 1)) == pytest.approx([1, 1, 1])
    assert class_weights(data, (2, 0, 2)) == pytest.approx([100 / 70, 0, 100 / 70])
    assert class_weights(data, None) is None


def test_balanced_weights_of_words_count_words():
    data = _words("xxxo", "ooox", "yooo")
    names = dict(zip(data.task.label_names, label_counts(data).tolist(), strict=True))
    assert names == {"x": 4, "o": 7, "y": 1}
    weights = class_weights(data, "balanced")
    assert sum(w * n for w, n in zip(weights, names.values(), strict=True)) == pytest.approx(12)


@pytest.mark.parametrize(
    ("data", "asked", "message"),
    [
        ({"a": 3, "b": 3}, (1, 2, 3), r"must be one for each of the 2 classes \(a, b\), got 3"),
        ({"a": 3, "b": 3}, (0, 0), "must be above 0 for a class that occurs"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data, asked, message):
    with pytest.raises(LmcompressError, match=message):
        class_weights(_data(**data), asked)


def test_weights_of_a_regression_are_refused():
    rows = [{"text": f"t {i}", "label": i / 7} for i in range(10)]
    with pytest.raises(LmcompressError, match="are for classes; scores is a regression task"):
        class_weights(load_task("scores", data={"train": rows, "validation": rows}), "balanced")


def test_the_loss_on_all_rows_is_that_of_torch():
    data, generator = _data(a=60, b=30, c=10), torch.Generator().manual_seed(0)
    labels = torch.tensor(data.train["label"])
    logits = torch.randn(100, 3, generator=generator)
    weights = class_weights(data, "balanced")
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits, labels)
    torch.testing.assert_close(WeightedLoss(weights)({"logits": logits}, labels), expected)


def test_the_loss_of_a_step_is_the_same_for_every_division_into_micro_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 5, 3, generator=generator), torch.randint(3, (12, 5), generator=generator)
    labels[:, 3:] = -100
    loss = WeightedLoss([0.5, 1.0, 4.0])
    whole = loss({"logits": logits}, labels)
    items = int((labels != -100).sum())
    for size in (1, 3, 12):
        parts = [
            loss({"logits": logits[i : i + size]}, labels[i : i + size], num_items_in_batch=items)
            for i in range(0, 12, size)
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_accumulated_steps_of_a_recipe_are_those_of_whole_batches(tmp_path):
    task = write_task(tmp_path / "task")
    head = RECIPE.partition("  - name: student")[0].replace("DATA", str(task)) + "evaluation: {latency_batches: []}\n"
    head = head.replace(
        "num_heads: 2", "num_heads: 2\n  config: {hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    )
    trained = []
    for number, more in enumerate(
        ([], ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"])
    ):
        recipe = parse_recipe(head, ["task.class_weights=[1, 9]", *more])
        result = run(recipe, tmp_path / str(number), console=Console(quiet=True))
        trained.append(load_file(result.models["teacher"] / "model.safetensors"))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)
    plain = run(parse_recipe(head), tmp_path / "plain", console=Console(quiet=True))
    other = load_file(plain.models["teacher"] / "model.safetensors")
    assert any(not torch.allclose(other[name], trained[0][name], atol=1e-4) for name in other)


def test_a_weight_of_all_on_one_class_makes_a_model_say_it(tmp_path):
    task = write_task(tmp_path / "task")
    head = RECIPE.partition("  - name: student")[0].replace("DATA", str(task)) + "evaluation: {latency_batches: []}\n"
    overrides = ["task.class_weights=[0, 1]", "training.max_steps=30", "training.learning_rate=0.01"]
    result = run(parse_recipe(head, overrides), tmp_path / "run", console=Console(quiet=True))
    # the loss knows the second class only
    assert result.report["rows"][0]["metrics"]["validation"]["accuracy"] == 0.5


def test_class_weights_are_checked_before_training(tiny):
    with pytest.raises(LmcompressError, match="task.class_weights must be one for each of the 2 classes"):
        plan(parse_recipe(tiny, ["task.class_weights=[1, 2, 3]"]))


def test_other_weights_train_again_and_other_metrics_do_not(tiny):
    def needs(*overrides):
        return dependencies(plan(parse_recipe(tiny, list(overrides))))["teacher"].hash

    assert needs("task.class_weights=balanced") != needs()
    assert needs("task.metrics=[f1_macro]") == needs() == needs("evaluation.metrics=[f1]")


def test_metrics_of_a_task_are_measured(tiny, tmp_path):
    recipe = parse_recipe(tiny, [*QUICK, "task.metrics=[f1_macro, accuracy]", "training.max_steps=1"])
    report = run(recipe, tmp_path / "run", console=Console(quiet=True)).report
    assert report["metric"] == "f1_macro"
    assert set(report["rows"][0]["metrics"]["validation"]) == {"f1_macro", "accuracy"}


def test_metrics_are_said_in_one_place():
    with pytest.raises(LmcompressError, match="task.metrics and evaluation.metrics say different things"):
        parse_recipe(RECIPE, ["task.metrics=[f1]", "evaluation.metrics=[accuracy]"])


@pytest.mark.parametrize(
    ("counts", "unbalanced"),
    [
        ({"a": 10, "b": 10}, False),
        ({"a": 29, "b": 10}, False),
        ({"a": 30, "b": 10}, True),
        ({"a": 9, "b": 9, "c": 3}, True),
    ],
)
def test_classes_are_unbalanced_from_three_to_one(counts, unbalanced):
    assert is_unbalanced(_data(**counts)) is unbalanced


def test_macro_f1_stands_beside_the_accuracy_of_unbalanced_classes(tmp_path):
    task = write_task(tmp_path / "task")
    lines = (task / "train.csv").read_text().splitlines()
    bad = [line for line in lines[1:] if line.endswith(",bad")]
    (task / "train.csv").write_text("\n".join([*lines, *bad, *bad, *bad]) + "\n")
    recipe = parse_recipe(RECIPE.replace("DATA", str(task)), [*QUICK, "training.max_steps=1"])
    result = run(recipe, tmp_path / "run", console=Console(quiet=True))
    table = card_rows(result.report)
    assert result.report["metric"] == "accuracy" and list(table[0])[2:5] == ["accuracy", "of teacher", "macro F1"]
    for row, cells in zip(result.report["rows"], table, strict=True):
        # one class is always said after a step: half of the F1 of that class
        assert cells["macro F1"] == f"{row['metrics']['validation']['f1_macro']:.4f}"
    assert "macro F1" in (result.models["student"] / "README.md").read_text()


def test_balanced_classes_have_no_macro_f1(tiny):
    assert plan(parse_recipe(tiny)).materials.task.metrics == ("accuracy",)
