"""The command line: help that teaches, one message for what is wrong, and commands that look at models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from packing import packed
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lmcompress import cli
from lmcompress.checkpoint.structure import drop_heads, keep_heads
from lmcompress.families import anatomy_of
from lmcompress.model import CompressedModel
from lmcompress.recipes import builtin_recipes

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
from tiny_recipe import RECIPE, write_task

COMMANDS = [
    ["run"],
    ["quickstart"],
    ["evaluate"],
    ["benchmark"],
    ["inspect"],
    ["prune"],
    ["sensitivity"],
    ["frontier"],
    ["push"],
    ["recipes", "show"],
    ["recipes", "schema"],
]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run made by the command line, its task beside it."""
    folder = tmp_path_factory.mktemp("cli")
    task = write_task(folder / "task")
    (folder / "tiny.yaml").write_text(RECIPE.replace("DATA", str(task)))
    assert cli.run_app(["run", str(folder / "tiny.yaml"), "training.max_steps=2", "-o", str(folder / "out")]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_has_help_with_an_example(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output and f"lmcompress {command[0]}" in result.output


def test_the_first_help_says_where_to_start():
    assert "lmcompress quickstart" in CliRunner().invoke(cli.app, ["--help"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikstart"], "did you mean 'quickstart'"),
        (["run", "quickstart", "tsk.name=x"], "command line: tsk: unknown key; did you mean 'task'"),
        (["run", "nowhere.yaml"], "no such file"),
        (["quickstart", "--task", "clasification"], "did you mean 'classification'"),
        (["recipes", "show", "minilm"], "did you mean 'minilmv2'"),
        (["inspect", "/nowhere"], "holds no model"),
        (["evaluate", "/nowhere", "--task", "embedded/clinc15"], "did you mean 'clinc150'"),
        (["benchmark", "/nowhere"], "holds no model"),
        (["push", "/nowhere", "me/it"], "holds no checkpoint"),
        (["prune", "/nowhere", "--task", "embedded/clinc150", "-o", "x"], "there is nothing to do: give a target"),
        (
            ["prune", "m", "--task", "t", "-o", "x", "--sparsity", "0.5", "--parameters", "9"],
            "exactly one of sparsity, parameters",
        ),
        (["prune", "m", "--task", "t", "-o", "x", "--sparsity", "2"], "--sparsity: input should be less than 1"),
        (["prune", "m", "--task", "t", "-o", "x", "--shape", "heads:3"], "--shape must look like layers=6"),
        (["prune", "m", "--task", "t", "-o", "x", "--shape", "head=3"], "did you mean 'heads'"),
        (["prune", "m", "--task", "t", "-o", "x", "--sparsity", "0.5", "--criterion", "taylor"], "unknown criterion"),
        (["prune", "m", "--task", "t", "-o", "x", "--sparsity", "0.5", "--parts", "head"], "--parts: input should be"),
        (["frontier", "m", "--task", "t", "--sparsity", "0.5", "--sparsity", "0.5"], "none twice"),
        (["frontier", "m", "--task", "t", "--sparsity", "0.5", "--latency-share", "0.5"], "not both"),
        (["push", "/nowhere", "it"], "must be user/name"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no recipe"):
        cli.run_app(["--debug", "run", "nope"])


def test_a_recipe_with_a_mistake_is_named_with_file_and_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("max_length", "max_lenght"))
    assert cli.run_app(["run", str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err
    assert "r.yaml: not valid" in error and "line 11: task.max_lenght: unknown key; did you mean 'max_length'" in error


def test_a_run_prints_the_table_and_how_to_load_the_student(finished, capsys):
    assert cli.run_app(["run", str(finished / "tiny.yaml"), "training.max_steps=2", "-o", str(finished / "out")]) == 0
    shown = capsys.readouterr().out
    assert "of teacher" in shown and "student-control" in shown
    assert "AutoModelForSequenceClassification.from_pretrained" in shown


def test_a_dry_run_writes_nothing(finished, tmp_path, capsys):
    assert cli.run_app(["run", str(finished / "tiny.yaml"), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_another_recipe_in_the_folder_is_refused(finished, capsys):
    assert cli.run_app(["run", str(finished / "tiny.yaml"), "training.max_steps=3", "-o", str(finished / "out")]) == 2
    assert "was made by a different recipe" in capsys.readouterr().err


def test_inspect_itemises_bytes_and_tells_what_was_checked(finished, capsys):
    assert cli.run_app(["inspect", str(finished / "out" / "student"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(part["bytes"] for part in shown["bytes_by_part"].values()) == 4 * shown["parameters"]
    assert set(shown["bytes_by_part"]) == {"embeddings", "block 0", "block 1", "head and rest"}
    assert shown["saved"]["equivalence"]["max_error"] == 0
    assert cli.run_app(["inspect", str(finished / "out" / "student"), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "checked when it was saved" in shown and "save: vanilla" in shown and "classifier.weight" in shown


def test_inspect_of_a_run_names_its_models(finished, capsys):
    assert cli.run_app(["inspect", str(finished / "out")]) == 2
    assert "its models are" in capsys.readouterr().err


def test_evaluate_gives_what_the_run_measured(finished, capsys):
    model = finished / "out" / "student"
    arguments = ["evaluate", str(model), "--task", str(finished / "task"), "--max-length", "12", "--json"]
    assert cli.run_app(arguments) == 0
    measured = json.loads((finished / "out" / "metrics.json").read_text())["student"]["validation"]
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(measured)


def test_evaluate_refuses_a_model_of_another_task(finished, make_model, tmp_path, capsys):
    CompressedModel(make_model("bert")).save_pretrained(tmp_path / "m")
    assert cli.run_app(["evaluate", str(tmp_path / "m"), "--task", "embedded/clinc150", "--limit", "5"]) == 2
    assert "error:" in capsys.readouterr().err


def test_benchmark_does_not_call_a_model_faster_than_itself(finished, capsys):
    student, control = (str(finished / "out" / name) for name in ("student", "student-control"))
    assert cli.run_app(["benchmark", student, "--against", control, "--batch", "1", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [control, student] and rows[0]["verdict"] == "baseline"
    assert cli.run_app(["benchmark", student, "--against", student]) == 2
    assert "cannot be compared with itself" in capsys.readouterr().err


def test_push_uploads_the_folder(finished, monkeypatch, capsys):
    calls = []

    class Api:
        def __init__(self, token=None):
            del token

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_folder(self, **options):
            calls.append(options["folder_path"])
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = str(finished / "out" / "student")
    assert cli.run_app(["push", folder, "me/it", "--private"]) == 0
    assert calls == [("me/it", {"private": True, "exist_ok": True}), folder]
    assert "https://hub/commit" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_recipes_are_listed_and_shown_as_they_are(name, capsys):
    assert cli.run_app(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == builtin_recipes()[name]


def test_the_schema_is_json(capsys):
    assert cli.run_app(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


@pytest.fixture(scope="session")
def prunable(finished):
    return str(finished / "out" / "teacher"), ["--task", str(finished / "task"), "--max-length", "12"]


def test_prune_measures_before_and_after_and_says_how_to_load_it(prunable, tmp_path, capsys):
    model, task = prunable
    options = ["--sparsity", "0.4", "--iterations", "2", "--batch", "1", "--vocabulary", "1"]
    arguments = ["prune", model, *task, "-o", str(tmp_path / "small"), "--report", str(tmp_path / "report"), *options]
    assert cli.run_app(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of dense" in shown and "pruned" in shown and "heads + neurons of each block" in shown
    assert "asked for; needs lmcompress" in shown and "masked, cut, saved" in shown
    assert "AutoModelForSequenceClassification.from_pretrained" in shown
    assert (tmp_path / "report" / "plots" / "quality_and_size.svg").is_file()
    saved = json.loads((tmp_path / "small" / "lmcompress.json").read_text())
    assert saved["pruning"]["removed"] >= 0.4 and len(saved["table"]) == 2
    assert saved["model"]["provenance"]["methods"] == ["vocabulary pruning", "structured pruning"]
    # a model is not replaced unasked, and nothing else at all
    assert cli.run_app(arguments) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    assert cli.run_app(["prune", model, *task, "-o", str(tmp_path / "thesis"), "--overwrite", *options]) == 2
    assert "no model of lmcompress" in capsys.readouterr().err and (tmp_path / "thesis" / "thesis.txt").is_file()


def test_prune_to_a_shape_can_stay_with_a_stock_config(prunable, tmp_path, capsys):
    model, task = prunable
    options = ["--shape", "layers=2", "--parts", "layers", "--criterion", "block_influence", "--format", "vanilla"]
    assert cli.run_app(["prune", model, *task, "-o", str(tmp_path / "short"), "--batch", "1", *options]) == 0
    shown = capsys.readouterr().out
    assert "loads with stock transformers" in shown and "import lmcompress;" not in shown


def test_a_dry_run_of_prune_says_the_shape_to_expect(prunable, tmp_path, capsys):
    model, task = prunable
    assert cli.run_app(["prune", model, *task, "-o", str(tmp_path / "x"), "--sparsity", "0.5", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "prunes heads and neurons to sparsity 0.5, one_shot by fisher" in shown
    assert "pruned attention has no stock config" in shown and not (tmp_path / "x").exists()


def test_prune_refuses_a_model_of_another_task(finished, make_model, tmp_path, capsys):
    model = make_model("bert", num_labels=5)
    CompressedModel(model).save_pretrained(
        tmp_path / "m", tokenizer=AutoTokenizer.from_pretrained(finished / "out" / "teacher")
    )
    task = ["--task", str(finished / "task"), "--max-length", "12"]
    assert cli.run_app(["prune", str(tmp_path / "m"), *task, "-o", str(tmp_path / "x"), "--sparsity", "0.5"]) == 2
    assert "has 5 labels" in capsys.readouterr().err


def test_inspect_shows_heads_widths_and_empty_blocks(make_model, tmp_path, capsys):
    model = make_model("bert")
    keep_heads(anatomy_of(model).blocks[0], [1])
    drop_heads(anatomy_of(model).blocks[1])
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert cli.run_app(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "1 + 24" in shown and "0 + 24" in shown and "4 + 24" in shown
    assert "no attention left in block 1" in shown and "feed-forward network left" not in shown


def test_inspect_itemises_codes_and_scales_of_packed_weights(make_model, tmp_path, capsys):
    model = packed(make_model("gpt2", "language"), "minmax", 4, inputs="dynamic")
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert cli.run_app(["inspect", str(tmp_path / "m"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == sum(p.numel() for p in make_model("gpt2", "language").parameters())
    assert shown["packed"]["embedding_codes"] == 64 * 8 and shown["packed"]["kernel"]
    assert sum(shown["packed"][name] for name in ("codes", "embedding_codes", "scales", "dense")) == sum(
        part["bytes"] for part in shown["bytes_by_part"].values()
    )
    assert cli.run_app(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "embedding codes" in shown and "bits for each of" in shown and "has no codes in place of weights" in shown


def test_sensitivity_prints_a_table_and_writes_curves(prunable, tmp_path, capsys):
    model, task = prunable
    options = ["--share", "0.5", "--share", "1", "-o", str(tmp_path / "s")]
    assert cli.run_app(["sensitivity", model, *task, *options]) == 0
    assert "100% gone" in capsys.readouterr().out
    found = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert len(found["rows"]) == 1 + 2 * 4 * 2 and len(found["scores"]["heads"]) == 4
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "sensitivity.json",
        "sensitivity.png",
        "importance.png",
    }
    assert cli.run_app(["sensitivity", model, *task, "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err


def test_a_frontier_is_a_run_with_a_recipe_of_its_own(prunable, tmp_path, capsys):
    model, task = prunable
    options = ["--sparsity", "0.3", "--sparsity", "0.6", "--steps", "2", "-o", str(tmp_path / "f")]
    assert cli.run_app(["frontier", model, *task, *options]) == 0
    shown = capsys.readouterr().out
    assert "sparsity-0.3" in shown and "sparsity-0.6" in shown and "of dense" in shown
    assert (tmp_path / "f" / "plots" / "quality_and_size.svg").is_file()
    assert cli.run_app(["run", str(tmp_path / "f" / "recipe.yaml"), "--dry-run"]) == 0
