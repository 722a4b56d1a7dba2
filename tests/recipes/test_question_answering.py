"""Question answering in recipes and on the command line: distilled, pruned, quantized, evaluated."""

from __future__ import annotations

import json
import random

import pytest
import torch
import yaml
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from typer.testing import CliRunner

from lmcompress.cli.application import app
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import span_scores
from lmcompress.recipes import Recipe
from lmcompress.recipes.planning import plan
from lmcompress.recipes.runner import run

RECIPE = """\
name: tiny-qa
model:
  family: bert
  hidden_size: 16
  layers: 2
  num_heads: 2
  positions: 64
  tokenizer: {kind: wordpiece, vocab_size: 80}
task: {name: DATA, max_length: 20}
stages:
  - name: teacher
    training: {max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-3}
  - name: student
    start: teacher
    student: {layers: 1}
    distillation: {teachers: [teacher], temperature: 2.0}
    control: true
    training: {max_steps: 3, per_device_train_batch_size: 8, learning_rate: 1e-3, logging_steps: 1}
  - name: small
    start: teacher
    pruning: {target: {sparsity: 0.3}, labels: self}
    quantization: {}
    training: {max_steps: 0}
evaluation: {repeats: 3, latency_batches: [1]}
"""


def squad(rows, seed):
    drawn = random.Random(seed)
    paragraphs = []
    for number in range(rows):
        name, place = drawn.choice(["ann", "bob", "eve"]), drawn.choice(["rome", "oslo", "lima"])
        context = f"{name} went by train to {place} in the summer and came back with {drawn.choice('abcd')} new friends"
        answer = {"text": place, "answer_start": context.index(place)}
        asked = {"id": str(number), "question": "where to ?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [asked]})
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("squad")
    for split, rows in (("train", 16), ("validation", 6)):
        (made / f"{split}.json").write_text(json.dumps(squad(rows, len(split))))
    return made


def recipe_of(folder, **changes):
    values = yaml.safe_load(RECIPE.replace("DATA", str(folder)))
    return Recipe.model_validate(values | changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("run")
    run(recipe_of(folder), target)
    return target


def test_a_recipe_trains_distils_prunes_and_quantizes(finished):
    report = json.loads((finished / "results.json").read_text())
    assert (report["kind"], report["metric"]) == ("question_answering", "f1")
    assert [row["name"] for row in report["rows"]] == ["teacher", "student", "student-control", "small"]
    for row in report["rows"]:
        f1, exact = (row["metrics"]["validation"][name] for name in ("f1", "exact_match"))
        assert 0 <= exact <= f1 <= 1
    assert all(entry["loss_kd"] > 0 for entry in report["rows"][1]["log"]) and len(report["rows"][1]["log"]) == 3
    assert (finished / "report.html").is_file() or (finished / "report.md").is_file()


def test_evaluate_finds_what_a_search_over_all_spans_finds(finished, folder):
    args = ["evaluate", str(finished / "teacher"), "--task", str(folder), "--max-length", "40", "--json"]
    answer = CliRunner().invoke(app, args, catch_exceptions=False)
    found = json.loads(answer.stdout)["metrics"]
    model = AutoModelForQuestionAnswering.from_pretrained(finished / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "teacher")
    rows = json.loads((folder / "validation.json").read_text())["data"][0]["paragraphs"]
    said, right = [], []
    for row in rows:
        # a context of fewer than 40 tokens is one window
        asked = tokenizer(row["qas"][0]["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = asked.pop("offset_mapping")[0].tolist()
        inside = [i for i, source in enumerate(asked.sequence_ids(0)) if source == 1]
        with torch.no_grad():
            out = model(**asked)
        score, first, last = max(
            (float(out.start_logits[0, i] + out.end_logits[0, j]), i, j)
            for i in inside for j in inside if 0 <= j - i < 30
        )  # fmt: skip
        said.append(row["context"][offsets[first][0] : offsets[last][1]])
        right.append([one["text"] for one in row["qas"][0]["answers"]])
    expected = {name: values.mean() for name, values in span_scores(said, right).items()}
    assert found == pytest.approx(expected)


def test_the_command_quantizes_a_model_that_answers(finished, folder, tmp_path):
    args = ["quantize", str(finished / "teacher"), "--task", str(folder), "--out", str(tmp_path / "q"), "--batch", "1"]
    answer = CliRunner().invoke(app, args, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert "AutoModelForQuestionAnswering" in answer.stdout
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "q").config.num_labels == 2


def test_one_file_and_an_exported_model_are_evaluated_the_same(finished, folder, tmp_path):
    export = ["export", str(finished / "teacher"), "--to", "onnx", "--out", str(tmp_path / "onnx")]
    assert CliRunner().invoke(app, export, catch_exceptions=False).exit_code == 0
    found = []
    for model in (finished / "teacher", tmp_path / "onnx"):
        args = ["evaluate", str(model), "--task", str(folder / "validation.json"), "--max-length", "20", "--json"]
        found.append(json.loads(CliRunner().invoke(app, args, catch_exceptions=False).stdout)["metrics"])
    assert found[0] == pytest.approx(found[1])


def test_windows_have_384_tokens_where_the_model_has_as_many(folder):
    task = {"name": str(folder)}
    assert plan(recipe_of(folder, task=task)).recipe.task.max_length == 64
    values = yaml.safe_load(RECIPE)["model"] | {"positions": 512}
    assert plan(recipe_of(folder, task=task, model=values)).recipe.task.max_length == 384


def test_augmented_contexts_are_refused(folder):
    stage = {"name": "one", "training": {"max_steps": 1}, "augmentation": {"operations": ["mask"]}}
    with pytest.raises(
        LmcompressError, match="augmentation changes the words of a context, in which answers have place"
    ):
        plan(recipe_of(folder, stages=[stage]))
