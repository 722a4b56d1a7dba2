"""``lmcompress prune``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lmcompress import cli
from lmcompress.model import CompressedModel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        (["prune", "m", "--task", "t", "-o", "x", "--sparsity", "0.5", "--rows", "0"], "--rows: input should be"),
        (
            ["prune", "m", "--task", "t", "-o", "x", "--sparsity", "0.5", "--format", "onyx"],
            "--format: input should be",
        ),
        (["prune", "m", "--task", "t", "-o", "x", "--vocabulary", "0"], "--vocabulary: input should be greater"),
        (
            ["prune", "nowhere", "--task", "embedded/clinc150", "-o", "x", "--sparsity", "0.5"],
            "no such folder: nowhere; and no model of that name in the local cache",
        ),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_prune_measures_before_and_after_and_says_how_to_load_it(trained, tmp_path, capsys):
    model, task = trained
    options = ["--sparsity", "0.4", "--iterations", "2", "--batch", "1", "--vocabulary", "1"]
    arguments = ["prune", model, *task, "-o", str(tmp_path / "small"), "--report", str(tmp_path / "report"), *options]
    assert cli.run_app(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of dense" in shown and "pruned" in shown and "heads + neurons of each block" in shown
    assert "requested; needs lmcompress" in shown and "masked, cut, saved" in shown
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


def test_prune_to_a_shape_can_stay_with_a_stock_config(trained, tmp_path, capsys):
    model, task = trained
    options = ["--shape", "layers=2", "--parts", "layers", "--criterion", "block_influence", "--format", "vanilla"]
    assert cli.run_app(["prune", model, *task, "-o", str(tmp_path / "short"), "--batch", "1", *options]) == 0
    shown = capsys.readouterr().out
    assert "loads with stock transformers" in shown and "import lmcompress;" not in shown


def test_a_dry_run_of_prune_says_the_shape_to_expect(trained, tmp_path, capsys):
    model, task = trained
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


def test_the_file_of_ones_own_is_named_by_column_and_split(reviews, tmp_path, capsys):
    model, file = str(reviews / "my-model"), str(reviews / "reviews.csv")
    arguments = ["prune", model, "--task", file, "-o", str(tmp_path / "x"), "--sparsity", "0.3", "--dry-run"]
    assert cli.run_app([*arguments, "--text-column", "review", "--label-column", "sentiment", "--metric", "f1"]) == 0
    assert "prunes heads and neurons to sparsity 0.3" in " ".join(capsys.readouterr().out.split())
    for options, message in (
        (["--text-column", "text"], "no column 'text'. Valid are: id, review, sentiment"),
        (["--split", "test"], "--split: no split 'test' in"),
        (["--metric", "mse"], "--metric: 'mse' does not fit"),
        (["--max-length", "129"], "--max-length must be at most 128"),
    ):
        assert cli.run_app([*arguments, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_refuses_a_folder_that_is_taken(reviews, tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    arguments = ["prune", str(reviews / "my-model"), "--task", str(reviews / "reviews.csv"), "--sparsity", "0.3"]
    assert cli.run_app([*arguments, "-o", str(tmp_path), "--dry-run"]) == 2
    assert "holds something that is no model of lmcompress" in " ".join(capsys.readouterr().err.split())


def test_progress_is_told_in_lines_where_there_is_no_terminal(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmcompress.activations.running.SECONDS_BETWEEN_LINES", 0)
    model, file = str(reviews / "my-model"), str(reviews / "reviews.csv")
    options = ["--sparsity", "0.3", "--rows", "36", "--batch", "1", "-o", str(tmp_path / "x")]
    assert cli.run_app(["prune", model, "--task", file, *options]) == 0
    shown = capsys.readouterr().out
    assert "checking rows, model and options" in shown and "pruning to" in shown
    assert "  score: 1 of 2" in shown and "measuring quality, size and latency" in shown


def test_a_criterion_of_ones_own_is_named_by_its_module(trained, tmp_path, capsys, monkeypatch):
    model, task = trained
    (tmp_path / "own_units.py").write_text(
        "from lmcompress.pruning import Criterion\n"
        'spread = Criterion("spread", "weights", ("heads", "neurons"), lambda group: group.float().std(dim=1))\n'
    )
    monkeypatch.chdir(tmp_path)
    options = ["--criterion", "own_units:spread", "-o", "small"]
    task = ["--task", str(Path(task[1]).resolve()), *task[2:]]
    assert cli.run_app(["prune", str(Path(model).resolve()), *task, "--sparsity", "0.3", "--batch", "1", *options]) == 0
    saved = json.loads((tmp_path / "small" / "lmcompress.json").read_text())
    assert saved["pruning"]["method"]["criterion"] == "own_units:spread"
    assert cli.run_app(["prune", model, *task, "--sparsity", "0.3", "--criterion", "own_units:spraed", "-o", "b"]) == 2
    assert "own_units has no 'spraed'; did you mean 'spread'" in " ".join(capsys.readouterr().err.split())
