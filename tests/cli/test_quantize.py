"""``lmcompress quantize``."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress import cli


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits: input should be 1, 2, 3, 4, 8"),
        (["--embedding-bits", "7"], "--embedding-bits: input should be 1, 2, 3, 4, 8"),
        (["--activations", "3"], "--activations: input should be 8 or 4"),
        (["--granularity", "colum"], "--granularity: input should be 'tensor' or 'row'"),
        (["--method", "gtpq"], "--method: input should be 'rtn', 'gptq' or 'awq', got 'gtpq'"),
        (["--format", "vanilla"], "--format vanilla is not possible with quantization"),
        (["--format", "self_loading", "--attention"], "self_loading is not possible with quantized attention"),
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


def test_the_self_loading_format_carries_its_loader(reviews, tmp_path, capsys):
    model, file, made = str(reviews / "my-model"), str(reviews / "reviews.csv"), tmp_path / "x"
    options = ["--format", "self_loading", "--batch", "1", "-o", str(made)]
    assert cli.run_app(["quantize", model, "--task", file, *options]) == 0
    config = json.loads((made / "config.json").read_text("utf-8"))
    assert "AutoConfig" in config["auto_map"] and config["quantization_config"]["encoding"]["weights"]
    assert (made / "modeling_lmcompress.py").is_file()
    assert f"from_pretrained('{made}', trust_remote_code=True)" in capsys.readouterr().out


def test_a_note_is_printed_once(reviews, tmp_path, capsys):
    model = tmp_path / "short"
    shutil.copytree(reviews / "my-model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(model)
    file, made = str(reviews / "reviews.csv"), str(tmp_path / "x")
    assert cli.run_app(["quantize", str(model), "--task", file, "--batch", "1", "-o", made]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("note: max_length is 16, the number of positions of") == 1


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


@pytest.mark.parametrize(
    ("other", "match"), [(["--static"], "--static calibrates"), (["--activations", "none"], "none")]
)
def test_ranges_by_token_are_computed_ones(other, match, reviews, tmp_path, capsys):
    command = ["quantize", str(reviews / "my-model"), "--task", str(reviews / "reviews.csv"), "-o", str(tmp_path / "x")]
    assert cli.run_app([*command, "--by-token", *other]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--by-token is of ranges computed per input" in said and match in said


def test_ranges_by_token_are_an_option(reviews, tmp_path):
    command = ["quantize", str(reviews / "my-model"), "--task", str(reviews / "reviews.csv"), "--batch", "1"]
    assert cli.run_app([*command, "--by-token", "-o", str(tmp_path / "x")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x")
    inputs = [module.inputs for module in model.modules() if getattr(module, "inputs", None)]
    assert inputs and all(one.granularity == "token" for one in inputs)
