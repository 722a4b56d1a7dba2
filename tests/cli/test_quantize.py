"""``lmcompress quantize``."""

from __future__ import annotations

import pytest

from lmcompress import cli


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits: input should be 1, 2, 3, 4, 8"),
        (["--embedding-bits", "7"], "--embedding-bits: input should be 1, 2, 3, 4, 8"),
        (["--activations", "3"], "--activations: input should be 8 or 4"),
        (["--granularity", "colum"], "--granularity: input should be 'tensor' or 'row'"),
        (["--method", "gtpq"], "--method: input should be 'rtn', 'gptq' or 'awq', got 'gtpq'"),
        (["--storage", "zip"], "--storage: input should be 'plain', 'auto', 'zstd' or 'huffman'"),
        (["--split", "test"], "--split: no split 'test' in"),
        (["--metric", "spearmanr"], "--metric: 'spearmanr' does not fit"),
        (["--text-column", "text"], "no column 'text'. Valid are: id, review, sentiment"),
    ],
)
def test_messages_name_the_option(options, message, reviews, tmp_path, capsys):
    arguments = [
        "quantize",
        str(reviews / "my-model"),
        "--task",
        str(reviews / "reviews.csv"),
        "-o",
        str(tmp_path / "x"),
    ]
    assert cli.run_app([*arguments, *options, "--dry-run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_progress_is_told_in_lines_where_there_is_no_terminal(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmcompress.activations.running.SECONDS_BETWEEN_LINES", 0)
    model, file = str(reviews / "my-model"), str(reviews / "reviews.csv")
    options = ["--bits", "4", "--method", "gptq", "--activations", "none", "--batch", "1", "-o", str(tmp_path / "x")]
    assert cli.run_app(["quantize", model, "--task", file, *options]) == 0
    shown = capsys.readouterr().out
    assert "quantizing to about" in shown and "  quantize: 2 of 2" in shown and "of dense" in shown


def test_what_is_stopped_while_it_measures_leaves_nothing_in_its_own_way(reviews, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(reviews)
    made = tmp_path / "made"
    command = ["quantize", "my-model", "--task", "reviews.csv", "-o", str(made), "--batch", "1"]
    with monkeypatch.context() as interrupted:
        interrupted.setattr("lmcompress.recipes.single.measure", stop)
        assert cli.run_app(command) == 130
    assert not made.exists() and "stopped; the same command starts over" in capsys.readouterr().err
    assert cli.run_app(command) == 0 and made.is_dir()
