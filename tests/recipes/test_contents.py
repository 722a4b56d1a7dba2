"""A finished stage is kept as long as the contents that it depends on are the same: rows, models, library, stores."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_recipe import RECIPE, write_task
from transformers import AutoModelForSequenceClassification

from lmcompress.data import Task
from lmcompress.errors import LmcompressError
from lmcompress.recipes import parse_recipe, plan, run
from lmcompress.recipes.contents import dependencies
from lmcompress.recipes.fingerprints import fingerprint_of_model, fingerprint_of_rows

TASK = Task("tone", "classification", ("text",), "label", ("bad", "good"))

TWO_STAGES = """\
name: tiny
model: MODEL
task: {name: DATA, max_length: 12}
stages:
  - name: tuned
    training: {max_steps: 2, per_device_train_batch_size: 4}
  - name: student
    student: {layers: 1}
    distillation: {teachers: [TEACHER]}
    training: {max_steps: 2, per_device_train_batch_size: 4}
evaluation: {latency_batches: []}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its own copy of the task."""
    folder = tmp_path_factory.mktemp("contents")
    task = write_task(folder / "task")
    text = RECIPE.replace("DATA", str(task)).replace("latency_batches: [1]", "latency_batches: []")
    run(parse_recipe(text), folder / "run", console=Console(quiet=True))
    return folder, text


@pytest.fixture
def changed(finished, tmp_path):
    """The same, to be changed: its folder, and a function that swaps the labels of its training rows."""
    folder, text = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    train = folder / "task" / "train.csv"
    before = train.read_text()

    def swap():
        train.write_text(before.replace(",good", ",x").replace(",bad", ",good").replace(",x", ",bad"))

    yield tmp_path / "run", text, swap
    train.write_text(before)


def test_swapped_labels_are_refused_and_named(changed):
    folder, text, swap = changed
    swap()
    with pytest.raises(LmcompressError, match=r"teacher was made from something else \(the training rows changed\)"):
        run(parse_recipe(text), folder, console=Console(quiet=True))


def test_swapped_labels_train_again_with_overwrite_and_the_console_says_why(changed, console):
    folder, text, swap = changed
    before = load_file(folder / "teacher" / "model.safetensors")
    swap()
    run(parse_recipe(text), folder, overwrite=True, console=console)
    said = console.file.getvalue()
    assert said.count("the training rows changed") == 3 and "kept" not in said
    assert any(
        not torch.equal(tensor, before[name])
        for name, tensor in load_file(folder / "teacher" / "model.safetensors").items()
    )


def test_rows_for_validation_only_do_not_train_again(changed, console):
    folder, text, _ = changed
    task = folder.parent / "task"
    shutil.copytree(parse_recipe(text).task.name, task)
    lines = (task / "validation.csv").read_text().splitlines()
    (task / "validation.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    first, second = (
        dependencies(plan(parse_recipe(text.replace(name, str(task)))))["teacher"].contents
        for name in ("nothing", parse_recipe(text).task.name)
    )
    assert first == second


def test_rows_for_validation_count_where_training_reads_them(finished):
    _, text = finished
    read = dependencies(plan(parse_recipe(text, ["stages.student.training.eval_strategy=epoch"])))
    assert "the validation rows" in read["student"].contents
    assert "the validation rows" not in read["teacher"].contents


def test_the_version_of_the_library_counts(changed, monkeypatch):
    folder, text, _ = changed
    monkeypatch.setattr("lmcompress.recipes.contents.library_version", lambda: "99.0")
    with pytest.raises(LmcompressError, match=r"lmcompress: [\w.+]+ then, 99\.0 now"):
        run(parse_recipe(text), folder, console=Console(quiet=True))


def test_a_marker_of_an_earlier_version_is_refused_with_the_reason(changed):
    folder, text, _ = changed
    marker = folder / "teacher" / "stage.json"
    old = json.loads(marker.read_text())
    marker.write_text(json.dumps({"hash": "0" * 64, "stage": old["stage"], "training": old["training"]}))
    with pytest.raises(LmcompressError, match="an earlier version of lmcompress did not record"):
        run(parse_recipe(text), folder, console=Console(quiet=True))


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_models_from_outside_are_compared_by_their_contents(finished, tmp_path, which):
    folder, _ = finished
    for name in ("model", "teacher"):
        shutil.copytree(folder / "run" / "teacher", tmp_path / name)
    text = TWO_STAGES.replace("DATA", str(folder / "task")).replace("MODEL", str(tmp_path / "model"))
    recipe = parse_recipe(text.replace("TEACHER", str(tmp_path / "teacher")))
    run(recipe, tmp_path / "run", console=Console(quiet=True))
    file = tmp_path / which / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file(weights | {name: weights[name] + 1e-3}, file, metadata={"format": "pt"})
    stage = "tuned" if which == "model" else "student"
    message = rf"{stage} was made from something else \(the {which} .*{which} changed\)"
    with pytest.raises(LmcompressError, match=message):
        run(recipe, tmp_path / "run", console=Console(quiet=True))


def test_reports_and_cards_are_no_contents_of_a_model(finished, tmp_path):
    copied = shutil.copytree(finished[0] / "run" / "teacher", tmp_path / "copied")
    before = fingerprint_of_model(copied)
    (copied / "README.md").write_text("another card")
    (copied / "training_args.bin").write_bytes(b"of a run")
    assert fingerprint_of_model(copied) == before
    (copied / "tokenizer_config.json").write_text("{}")
    assert fingerprint_of_model(copied) != before


def test_a_file_changed_in_place_with_the_same_size_is_another(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    first = fingerprint_of_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"b" * 100)
    assert fingerprint_of_model(tmp_path) != first


def test_a_model_that_is_nowhere_has_no_fingerprint():
    assert fingerprint_of_model("nobody/has-this-model") is None


def test_the_fingerprint_of_rows_is_of_values_not_of_their_source(tmp_path):
    rows = {"text": [f"film {i}" for i in range(2500)], "label": [i % 2 for i in range(2500)]}
    memory = Dataset.from_dict(rows)
    memory.to_csv(tmp_path / "rows.csv")
    file = load_dataset("csv", data_files=str(tmp_path / "rows.csv"), split="train", cache_dir=str(tmp_path / "cache"))
    shuffled = memory.select(list(reversed(range(2500)))).select(list(reversed(range(2500))))
    found = {fingerprint_of_rows(each, TASK) for each in (memory, file, shuffled)}
    assert len(found) == 1
    others = [
        Dataset.from_dict(rows | {"label": [*rows["label"][:-1], 0]}),
        memory.select(range(2499)),
        memory.select([1, 0, *range(2, 2500)]),
    ]
    assert len({fingerprint_of_rows(each, TASK) for each in others} | found) == 4
    named = Task("tone", "classification", ("text",), "label", ("good", "bad"))
    assert fingerprint_of_rows(memory, named) not in found


def test_a_store_of_the_run_is_built_again_when_its_teacher_changed(changed, console):
    folder, text, _ = changed
    stored = ["stages.student.distillation.store={}", "stages.student.control=false"]
    run(parse_recipe(text, stored), folder, overwrite=True, console=Console(quiet=True))
    longer = [*stored, "stages.teacher.training.max_steps=6"]
    again = run(parse_recipe(text, longer), folder, overwrite=True, console=console)
    assert "building the store" in console.file.getvalue() and "made by another teacher" in console.file.getvalue()
    fresh = run(parse_recipe(text, longer), folder.parent / "fresh", console=Console(quiet=True))
    trained = [load_file(result.models["student"] / "model.safetensors") for result in (again, fresh)]
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_a_store_of_the_run_is_built_again_when_its_rows_changed(changed, console):
    folder, text, _ = changed
    stored = ["stages.student.distillation.store={}", "stages.student.control=false"]
    run(parse_recipe(text, [*stored, "task.limit=8"]), folder, overwrite=True, console=Console(quiet=True))
    # the teacher is kept by hand: only the rows are others
    shutil.rmtree(folder / "student")
    run(parse_recipe(text, stored), folder, overwrite=True, console=console)
    assert "building the store" in console.file.getvalue()


def test_a_store_that_the_user_named_is_refused_before_training(changed, tmp_path):
    folder, text, _ = changed
    named = [f"stages.student.distillation.store={{folder: {tmp_path / 'mine'}}}", "stages.student.control=false"]
    run(parse_recipe(text, [*named, "task.limit=8"]), folder, overwrite=True, console=Console(quiet=True))
    kept = (tmp_path / "mine" / "0" / "meta.json").read_bytes()
    with pytest.raises(LmcompressError, match=r"made by another teacher|training rows are not in the store"):
        run(parse_recipe(text, named), folder, overwrite=True, console=Console(quiet=True))
    assert (tmp_path / "mine" / "0" / "meta.json").read_bytes() == kept


def test_methods_of_earlier_stages_are_recorded_whatever_their_format(finished, tmp_path):
    folder, _ = finished
    text = f"""\
name: chain
model: {folder / "run" / "teacher"}
task: {{name: {folder / "task"}, max_length: 12}}
stages:
  - name: short
    save: vanilla
    pruning: {{parts: [layers], target: {{shape: {{layers: 2}}}}, schedule: {{kind: one_shot}}, criterion: random}}
    training: {{max_steps: 0}}
  - name: small
    start: short
    quantization: {{method: rtn}}
    training: {{max_steps: 0}}
  - name: clustered
    start: short
    sharing: {{}}
    training: {{max_steps: 0}}
evaluation: {{latency_batches: []}}
"""
    result = run(parse_recipe(text), tmp_path / "run", console=Console(quiet=True))
    recorded = {
        name: json.loads((result.models[name] / "lmcompress.json").read_text())["model"]["provenance"]
        for name in ("short", "small", "clustered")
    }
    assert recorded["short"]["methods"] == ["structured pruning"]
    assert recorded["small"]["methods"] == ["structured pruning", "quantization"]
    assert recorded["clustered"]["methods"] == ["structured pruning", "weight sharing"]
    # an absolute path would be published with the model
    assert all(entry["base_model"] == "teacher" for entry in recorded.values())
    config = json.loads((result.models["small"] / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["methods"] == ["structured pruning", "quantization"]
    assert "structured pruning, quantization" in (result.models["small"] / "README.md").read_text()
    # and a recipe that starts from such a model goes on from there
    onward = text.replace(str(folder / "run" / "teacher"), str(result.models["clustered"]))
    head, _, _ = onward.partition("  - name: short")
    head += (
        "  - {name: next, quantization: {method: rtn}, training: {max_steps: 0}}\nevaluation: {latency_batches: []}\n"
    )
    second = run(parse_recipe(head), tmp_path / "second", console=Console(quiet=True))
    found = AutoModelForSequenceClassification.from_pretrained(second.models["next"]).config.quantization_config
    assert found.provenance.methods[-1] == "quantization"
