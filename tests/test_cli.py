"""The command line: help that teaches, one message for what is wrong, and commands that look at models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcompress import cli
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
