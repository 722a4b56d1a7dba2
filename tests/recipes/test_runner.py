"""A run from a recipe to models that load; killed, resumed, changed and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.errors import LmcompressError
from lmcompress.recipes import load_recipe, parse_recipe, run
from lmcompress.recipes.contents import Dependencies, read_marker
from lmcompress.recipes.folder import checkpoint_to_resume, locked
from lmcompress.recipes.measuring import STAGE_FILE
from lmcompress.trainers import CompressionTrainer
from lmcompress.trainers.state import STATE_FILE

FILES = {
    "recipe.yaml",
    "results.json",
    "metrics.json",
    "report.md",
    "report.html",
    "plots",
    "teacher",
    "student",
    "student-control",
}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run that nobody changes."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return run(parse_recipe(tiny), folder, console=Console(quiet=True))


@pytest.fixture
def copied(finished, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(finished.folder, tmp_path / "tiny")


def test_a_run_leaves_models_reports_and_plots(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert {path.name for path in (finished.folder / "plots").iterdir()} == {
        "quality_and_size.svg",
        "quality_and_latency_1_row.svg",
    }
    report = json.loads((finished.folder / "results.json").read_text())
    assert [row["role"] for row in report["rows"]] == ["teacher", "student", "control"]
    assert report["machine"]["torch"] and report["versions"]["transformers"]
    for row in report["rows"]:
        assert 0 <= row["metrics"]["validation"]["accuracy"] <= 1
        assert row["size_bytes"] > row["weights_bytes"] >= 4 * row["parameters"]
        assert row["equivalence"]["inputs"] == "given" and row["equivalence"]["max_error"] == 0
        assert row["training"]["steps"] == 4
    assert json.loads((finished.folder / "metrics.json").read_text())["student"]["validation"]


def test_the_student_loads_with_automodel_and_knows_its_labels(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished.models["student"])
    tokenizer = AutoTokenizer.from_pretrained(finished.models["student"])
    logits = model(**tokenizer("a great film", return_tensors="pt")).logits
    assert logits.shape == (1, 2) and torch.isfinite(logits).all()
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.num_hidden_layers == 2


def test_the_card_of_a_model_has_the_table_of_the_run(finished):
    card = (finished.models["student"] / "README.md").read_text()
    assert "student-control" in card and "of teacher" in card


def test_the_resolved_recipe_of_a_run_is_the_recipe(finished, tiny):
    assert load_recipe(finished.folder / "recipe.yaml") == parse_recipe(tiny)


def test_the_control_starts_where_the_student_does(finished):
    student, control = (
        load_file(finished.models[name] / "model.safetensors") for name in ("student", "student-control")
    )
    assert student.keys() == control.keys()
    assert any(not torch.equal(student[name], control[name]) for name in student)


def test_a_finished_run_is_not_trained_again(copied, tiny, monkeypatch, console):
    monkeypatch.setattr(CompressionTrainer, "train", lambda *_, **__: pytest.fail("everything is there"))
    run(parse_recipe(tiny), copied, console=console)
    assert console.file.getvalue().count("already finished, kept") == 3


def test_a_changed_recipe_is_refused_and_the_change_named(copied, tiny):
    before = (copied / "student" / "model.safetensors").read_bytes()
    changed = parse_recipe(tiny, ["stages.student.training.max_steps=2"])
    with pytest.raises(
        LmcompressError,
        match=r"student was made from something else \(training.max_steps: 4 then, 2 now\).*--overwrite",
    ):
        run(changed, copied, console=Console(quiet=True))
    assert (copied / "student" / "model.safetensors").read_bytes() == before


def test_overwrite_trains_what_changed_and_keeps_the_rest(copied, tiny, console):
    changed = parse_recipe(tiny, ["stages.student.training.max_steps=2"])
    result = run(changed, copied, overwrite=True, console=console)
    assert [row["training"]["steps"] for row in result.report["rows"]] == [4, 2, 2]
    assert console.file.getvalue().count("already finished, kept") == 1


def test_a_change_before_a_stage_is_a_change_of_the_stage(copied, tiny):
    with pytest.raises(LmcompressError, match=r"teacher was made from something else \(seed: 0 then, 1 now\)"):
        run(parse_recipe(tiny, ["seed=1"]), copied, console=Console(quiet=True))


def test_a_folder_with_something_else_in_it_is_refused(tiny, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "thesis.txt").write_text("years of work")
    with pytest.raises(LmcompressError, match="holds something other than a stage"):
        run(parse_recipe(tiny), tmp_path, overwrite=True, console=Console(quiet=True))
    assert (tmp_path / "teacher" / "thesis.txt").read_text() == "years of work"


class _Killed(BaseException):
    """What no handler catches."""


def test_a_run_that_was_killed_goes_on_to_the_same_result(finished, tiny, tmp_path, monkeypatch, console):
    plain = CompressionTrainer._save_checkpoint
    saved = []

    def die_after_the_third(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        saved.append(self.state.global_step)
        if len(saved) == 3:
            raise _Killed

    monkeypatch.setattr(CompressionTrainer, "_save_checkpoint", die_after_the_third)
    with pytest.raises(_Killed):
        run(parse_recipe(tiny), tmp_path / "tiny", console=console)
    assert (tmp_path / "tiny" / "checkpoints" / "student" / "checkpoint-2").is_dir()
    monkeypatch.setattr(CompressionTrainer, "_save_checkpoint", plain)
    # and a checkpoint that was being written is not taken for one
    (tmp_path / "tiny" / "checkpoints" / "student" / "checkpoint-3").mkdir()
    result = run(parse_recipe(tiny), tmp_path / "tiny", console=console)
    assert "resuming from checkpoint-2" in console.file.getvalue()
    assert not (tmp_path / "tiny" / "checkpoints").exists()
    for name in ("teacher", "student", "student-control"):
        resumed, straight = (
            load_file(models[name] / "model.safetensors") for models in (result.models, finished.models)
        )
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_a_run_that_was_killed_after_the_last_step_takes_no_further_one(finished, tiny, tmp_path, monkeypatch, console):
    plain = CompressionTrainer.finish

    def die(self):
        raise _Killed

    # the checkpoint of the last step is there, the model is not; and 4 steps are less than an epoch of 6
    monkeypatch.setattr(CompressionTrainer, "finish", die)
    with pytest.raises(_Killed):
        run(parse_recipe(tiny), tmp_path / "tiny", console=Console(quiet=True))
    assert (tmp_path / "tiny" / "checkpoints" / "teacher" / "checkpoint-4").is_dir()
    monkeypatch.setattr(CompressionTrainer, "finish", plain)
    result = run(parse_recipe(tiny), tmp_path / "tiny", console=console)
    assert "resuming from checkpoint-4" in console.file.getvalue()
    assert [row["training"]["steps"] for row in result.report["rows"]] == [4, 4, 4]
    for name in ("teacher", "student"):
        resumed, straight = (
            load_file(models[name] / "model.safetensors") for models in (result.models, finished.models)
        )
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def _cut_off(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """A run of one stage that was killed after its third checkpoint, and what comes of it undisturbed."""
    folder = tmp_path_factory.mktemp("interrupted")
    text = tiny.partition("  - name: student")[0].replace("save_steps: 2", "save_steps: 1, save_total_limit: 2")
    recipe = parse_recipe(text + "evaluation: {latency_batches: []}\n")
    plain, saved = CompressionTrainer._save_checkpoint, []

    def die_after_the_third(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        saved.append(self)
        if len(saved) == 3:
            raise _Killed

    CompressionTrainer._save_checkpoint = die_after_the_third
    try:
        with pytest.raises(_Killed):
            run(recipe, folder / "run", console=Console(quiet=True))
    finally:
        CompressionTrainer._save_checkpoint = plain
    undisturbed = run(recipe, folder / "undisturbed", console=Console(quiet=True))
    return recipe, folder / "run", load_file(undisturbed.models["teacher"] / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("model.safetensors", _cut_off("model.safetensors")),
        ("optimizer.pt", _cut_off("optimizer.pt")),
        ("rng_state.pth", _cut_off("rng_state.pth")),
        ("trainer_state.json", lambda folder: (folder / "trainer_state.json").write_text("")),
        *((name, lambda folder, name=name: (folder / name).unlink())
          for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_left_out_and_an_earlier_one_resumed(file, harm, interrupted, tmp_path, console):
    recipe, folder, undisturbed = interrupted
    copied = shutil.copytree(folder, tmp_path / "run")
    harm(copied / "checkpoints" / "teacher" / "checkpoint-3")
    result = run(recipe, copied, console=console)
    said = console.file.getvalue()
    assert f"checkpoint-3 is damaged ({file}) and left out" in said and "resuming from checkpoint-2" in said
    torch.testing.assert_close(load_file(result.models["teacher"] / "model.safetensors"), undisturbed, rtol=0, atol=0)


def test_a_checkpoint_that_lost_the_state_of_the_methods_is_left_out(interrupted, tmp_path):
    _, folder, _ = interrupted
    copied = shutil.copytree(folder, tmp_path / "run") / "checkpoints" / "teacher"
    save_file({"pruning.0.gates.x": torch.zeros(1)}, copied / "checkpoint-2" / STATE_FILE)
    said: list[str] = []
    marker = read_marker(copied, STAGE_FILE)
    needs = Dependencies(**{name: marker[name] for name in ("stage", "recipe", "contents")})
    checkpoint = checkpoint_to_resume(copied, needs, resume=True, say=said.append)
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    assert said == [f"checkpoint-3 is damaged ({STATE_FILE}) and left out"]


def test_two_runs_in_one_folder_are_refused(tiny, tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(LmcompressError, match="another process is running in .*run: wait until it is done"):
            run(parse_recipe(tiny), tmp_path / "run", console=Console(quiet=True))
    assert list((tmp_path / "run").iterdir()) == []
    with locked(tmp_path / "run"):
        pass


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr("lmcompress.recipes.folder.fcntl.flock", no_locks)
    with locked(tmp_path), caplog.at_level("WARNING"):
        pass
    assert "cannot be locked" in caplog.text


def test_an_interrupted_stage_of_another_recipe_is_refused(tiny, tmp_path, monkeypatch):
    def die(self, *args, **kwargs):
        raise _Killed

    monkeypatch.setattr(CompressionTrainer, "_save_checkpoint", die)
    with pytest.raises(_Killed):
        run(parse_recipe(tiny), tmp_path / "tiny", console=Console(quiet=True))
    with pytest.raises(LmcompressError, match="was made from something else"):
        run(parse_recipe(tiny, ["training.max_steps=5"]), tmp_path / "tiny", console=Console(quiet=True))


def test_a_stored_teacher_teaches_as_a_live_one(finished, copied, tiny):
    wanted = ["stages.student.distillation.losses=[hidden_mse]", "stages.student.distillation.contrast={}"]
    stored = parse_recipe(tiny, ["stages.student.distillation.store={}", *wanted])
    live = parse_recipe(tiny, wanted)
    trained = []
    for recipe in (live, stored):
        result = run(recipe, copied, overwrite=True, console=Console(quiet=True))
        trained.append(load_file(result.models["student"] / "model.safetensors"))
    assert (copied / "stores" / "student" / "0" / "meta.json").is_file()
    torch.testing.assert_close(*trained, rtol=1e-2, atol=1e-3)


def test_a_language_model_is_measured_by_perplexity(tmp_path):
    text = " ".join(f"word{i % 7} and word{i % 3} ." for i in range(400))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "validation.txt").write_text(text[:2000])
    recipe = parse_recipe(
        f"""
name: lm
model: {{family: gpt2, hidden_size: 16, layers: 2, num_heads: 2, positions: 16, tokenizer: {{kind: bytelevel_bpe,
    vocab_size: 300}}}}
task: {{name: {tmp_path}, max_length: 16}}
stages:
  - {{name: teacher, training: {{max_steps: 2, per_device_train_batch_size: 2}}}}
  - name: student
    start: teacher
    student: {{layers: 1}}
    save: vanilla
    distillation: {{teachers: [teacher]}}
    training: {{max_steps: 2, per_device_train_batch_size: 2}}
evaluation: {{latency_batches: []}}
"""
    )
    result = run(recipe, tmp_path / "run", console=Console(quiet=True))
    assert result.report["lower_is_better"]
    assert all(row["metrics"]["validation"]["token_perplexity"] > 1 for row in result.report["rows"])
    assert AutoModelForCausalLM.from_pretrained(result.models["student"]).config.n_layer == 1


def test_augmented_rows_are_trained_on(copied, tiny):
    recipe = parse_recipe(
        tiny,
        [
            "stages.student.augmentation={operations: [mask, n_gram, replace], copies: 2}",
            "stages.student.control=false",
        ],
    )
    result = run(recipe, copied, overwrite=True, console=Console(quiet=True))
    assert {row["name"] for row in result.report["rows"]} == {"teacher", "student"}
