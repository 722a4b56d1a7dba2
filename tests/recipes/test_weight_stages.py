"""Stages that change single weights: zeros and shared values, trained and not, stored as streams, and refused."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_recipe import head
from transformers import AutoModelForSequenceClassification

from lmcompress.checkpoint.encoding import matrices
from lmcompress.data import Task
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import size_on_disk, stream_table
from lmcompress.recipes import parse_recipe, plan, run
from lmcompress.recipes.parts.sparsity import check_classes

TRAINING = "{max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-3}"
RECIPE = f"""\
{head(layers=2)}  - name: dense
    training: {TRAINING}
  - name: small
    start: dense
    sparsity: {{sparsity: 0.5, criterion: wanda}}
    sharing: {{clusters: 4, embedding_clusters: 4}}
    training: {{max_steps: 0}}
    storage: auto
  - name: pruned
    start: dense
    sparsity: {{sparsity: 0.6, schedule: {{kind: gradual, end: 0.5, every: 1}}}}
    pruning: {{target: {{sparsity: 0.4}}}}
    distillation: {{teachers: [dense]}}
    training: {TRAINING}
  - name: shared
    start: pruned
    sharing: {{clusters: 4, embedding_clusters: 4}}
    training: {TRAINING}
    storage: huffman
evaluation: {{repeats: 3, latency_batches: []}}
"""


@pytest.fixture(scope="session")
def changing(task_folder) -> str:
    return RECIPE.replace("DATA", str(task_folder))


@pytest.fixture(scope="session")
def changed(changing, tmp_path_factory):
    return run(parse_recipe(changing), tmp_path_factory.mktemp("run") / "tiny", console=Console(quiet=True))


def projections(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return [module.weight for path, module in matrices(model).items() if path.startswith("encoder.layer")]


def test_roles_say_what_is_done(changing):
    assert [entry.role for entry in plan(parse_recipe(changing)).stages] == ["teacher", "shared", "student", "shared"]


def zeros(found):
    return [int((weight == 0).sum()) for weight in found]


def test_what_is_asked_is_zero_and_few_values_are_left(changed):
    found = projections(changed.models["small"])
    assert sum(zeros(found)) / sum(weight.numel() for weight in found) == pytest.approx(0.5, abs=0.01)
    assert all(len(torch.unique(weight)) <= 5 for weight in found)


def test_zeros_of_an_earlier_stage_stay_where_values_are_shared(changed):
    before, after = (projections(changed.models[name]) for name in ("pruned", "shared"))
    assert [weight.shape for weight in before] == [weight.shape for weight in after]
    # structured pruning took first what had most zeros
    assert sum(zeros(before)) > 0
    assert all(bool((b[a == 0] == 0).all()) for a, b in zip(before, after, strict=True))
    assert all(len(torch.unique(weight)) <= 5 for weight in after)


def test_what_was_done_is_in_marker_card_and_notes(changed):
    marker = json.loads((changed.models["small"] / "stage.json").read_text())
    assert marker["sparsity"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert {row["clusters"] for row in marker["sharing"]["matrices"]} == {4}
    config = json.loads((changed.models["shared"] / "config.json").read_text())
    assert {"sparsity", "structured pruning", "distillation", "weight sharing"} <= set(
        config["quantization_config"]["provenance"]["methods"]
    )
    results = json.loads((changed.folder / "results.json").read_text())
    text = " ".join(results["notes"])
    assert "small: 50.1% of the weights of 13 matrices are zero" in text and "shared: each of" in text


def test_storage_makes_the_files_smaller(changed):
    assert stream_table(changed.models["small"]) and stream_table(changed.models["shared"])
    sizes = {name: size_on_disk(changed.models[name]).weights_bytes for name in ("dense", "small", "pruned", "shared")}
    assert sizes["small"] < 0.7 * sizes["dense"] and sizes["shared"] < sizes["pruned"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("criterion: wanda}", "schedule: {kind: surgery}}", "the schedule surgery needs training, got max_steps: 0"),
        ("criterion: wanda}", "rules: [{modules: ffn_oot, sparsity: 0.5}]}", "matches no matrix"),
        ("{clusters: 4, embedding_clusters: 4}\n    training: {max_steps: 0}",
         "{rules: [{modules: ffn_oot, clusters: 3}]}\n    training: {max_steps: 0}", "matches no matrix"),
        ("sparsity: {sparsity: 0.5, criterion: wanda}", "quantization: {}", "choose one, or share in one stage"),
        ("sparsity: 0.5, criterion: wanda", "sparsity: 1.0", "sparsity must be in"),
        ("kind: gradual, end: 0.5, every: 1", "kind: surgery, begin: 0.5, end: 0.55",
         "surgery must have optimizer steps between begin and end, got 0 of 4"),
        ("schedule: {kind: gradual, end: 0.5, every: 1}", "criterion: movement, schedule: {kind: one_shot}",
         "movement must see some steps before weights are pruned"),
        ("sharing: {clusters: 4, embedding_clusters: 4}\n    training: {max_steps: 4",
         "sharing: {}\n    sparsity: {sparsity: 0.5}\n    training: {max_steps: 4",
         "sharing and sparsity cannot be in one stage that trains.*a stage of its own after it"),
        ("sharing: {clusters: 4, embedding_clusters: 4}\n    training: {max_steps: 4",
         "sharing: {}\n    pruning: {target: {sparsity: 0.5}}\n    training: {max_steps: 4",
         "sharing and pruning cannot be in one stage that trains.*a stage of its own after it"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(changing, old, new, message):
    assert old in changing
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(changing.replace(old, new)))


@pytest.mark.parametrize(
    "task, message",
    [
        (Task("text", "causal_lm", ("text",)), "at most 64 classes per row, got a task of the kind causal_lm"),
        (
            Task("many", "classification", ("text",), "label", tuple(map(str, range(65)))),
            "at most 64 classes per row, got 65 classes",
        ),
    ],
)
def test_exact_second_derivatives_of_what_has_none_are_refused_before_anything_runs(changing, task, message):
    with pytest.raises(LmcompressError, match=f"{message}; use the criterion fisher"):
        check_classes(task)
    # two classes are few enough: the same criterion can be planned
    plan(parse_recipe(changing.replace("criterion: wanda", "criterion: obd")))
