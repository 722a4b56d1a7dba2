"""``lmcompress run`` and ``quickstart``."""

from __future__ import annotations

import pytest
from tiny_recipe import RECIPE, write_task

from lmcompress import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikstart"], "did you mean 'quickstart'"),
        (["run", "quickstart", "tsk.name=x"], "command line: tsk: unknown key; did you mean 'task'"),
        (["run", "nowhere.yaml"], "no such file"),
        (["quickstart", "--task", "clasification"], "did you mean 'classification'"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


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


def test_training_is_told_of_in_lines_where_there_is_no_terminal(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmcompress.recipes.progress.SECONDS_BETWEEN_LINES", 0)
    overrides = ["training.max_steps=2", "training.logging_steps=1"]
    assert cli.run_app(["run", str(finished / "tiny.yaml"), *overrides, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "  student: step 1 of 2, loss " in shown and "  student: step 2 of 2, loss " in shown


def test_a_dry_run_writes_nothing(finished, tmp_path, capsys):
    assert cli.run_app(["run", str(finished / "tiny.yaml"), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_another_recipe_in_the_folder_is_refused(finished, more, capsys):
    arguments = ["run", str(finished / "tiny.yaml"), "training.max_steps=3", "-o", str(finished / "out"), *more]
    assert cli.run_app(arguments) == 2
    assert "was made from something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.report_to=wandb", "stage 'teacher', training: report_to: wandb is not installed"),
        ("training.report_to=wnadb", "report_to has no value 'wnadb'; did you mean 'wandb'?"),
        ("training.lr_scheduler_type=cosin", "lr_scheduler_type has no value 'cosin'; did you mean 'cosine'?"),
        ("task.max_length=40", "max_length must be at most 32, the number of positions of the model, got 40"),
        ("evaluation.sequence_length=40", "evaluation.sequence_length must be at most 32"),
        ("task.text_columns=[txt]", "no column 'txt'; did you mean 'text'? Valid are: label, text"),
        ("task.label_column=kind", "no column 'kind'. Valid are: label, text"),
        ("evaluation.metrics=[pearson]", "evaluation.metrics: 'pearson' does not fit"),
        ("evaluation.splits=[tset]", "evaluation.splits: no split 'tset'"),
    ],
)
def test_a_dry_run_refuses_what_would_stop_the_run_later(override, message, finished, tmp_path, capsys):
    arguments = ["run", str(finished / "tiny.yaml"), override, "-o", str(tmp_path / "out"), "--dry-run"]
    assert cli.run_app(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_refuses_a_folder_that_cannot_be_made(finished, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in ("file", "file/out"):
        assert cli.run_app(["run", str(finished / "tiny.yaml"), "-o", str(tmp_path / place), "--dry-run"]) == 2
        assert "is a file, and the output is a folder" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    (tmp_path / "out" / "teacher" / "thesis.txt").touch()
    assert cli.run_app(["run", str(finished / "tiny.yaml"), "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "holds something other than a stage of a run" in capsys.readouterr().err


def test_messages_about_a_recipe_name_its_keys(tmp_path, capsys):
    task = write_task(tmp_path / "task")
    for file in task.iterdir():
        file.write_text(file.read_text().replace("text,label", "words,verdict"))
    (tmp_path / "r.yaml").write_text(RECIPE.replace("DATA", str(task)))
    assert cli.run_app(["run", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    assert "among: words, verdict; name one or two with task.text_columns" in capsys.readouterr().err
