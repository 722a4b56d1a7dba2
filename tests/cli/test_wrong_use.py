"""What a command is given wrongly is one message that says what to do; nothing is written, and the exit code is 2."""

from __future__ import annotations

import shutil

import pytest
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lmcompress import cli

ROWS = ["--task", "reviews.csv"]
QUANTIZE, PRUNE = ["quantize", "my-model", *ROWS, "-o", "made"], ["prune", "my-model", *ROWS, "-o", "made"]
HALF = ["--sparsity", "0.5"]
FRONTIER = ["frontier", "my-model", *ROWS, "-o", "made", "--sparsity", "0.2"]


def _refused(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("error:") == 1 and "fault of lmcompress" not in shown


@pytest.fixture(scope="module")
def broken(reviews):
    """Folders that are nearly models."""
    good = reviews / "my-model"
    for name in ("list", "cut", "bare", "wordless"):
        shutil.copytree(good, reviews / name)
    (reviews / "list" / "config.json").write_text("[]")
    whole = (good / "model.safetensors").read_bytes()
    (reviews / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (reviews / "bare" / "model.safetensors").unlink()
    for file in (reviews / "wordless").glob("tokenizer*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(good)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    few = BertConfig(**sizes, vocab_size=10, max_position_embeddings=128)
    enough = BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128)
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, vocab_size=len(tokenizer))
    models = {"stranger": BertForSequenceClassification(few), "headless": BertModel(enough)}
    for name, model in (models | {"gpt2": GPT2LMHeadModel(gpt2)}).items():
        model.save_pretrained(reviews / name)
        tokenizer.save_pretrained(reviews / name)
    return reviews


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "", *ROWS], "a model must be named"),
        (["evaluate", "my-model", *ROWS, "--batch-size", "0"], "--batch-size: input should be greater than or equal"),
        (["evaluate", "my-model", *ROWS, "--stride", "0"], "--stride: input should be greater than or equal to 1"),
        (
            ["evaluate", "my-model", *ROWS, "--stride", "5"],
            "--stride is of perplexity; reviews.csv is a classification",
        ),
        (["evaluate", "my-model", *ROWS, *(2 * ["--text-column", "review"])], "--text-column must be two different"),
        (["evaluate", "my-model", *ROWS, "--label-column", "review"], "--label-column must not be a column of texts"),
        (["benchmark", "my-model", "--threads", "100000"], "--threads must be in [1, "),
        (["benchmark", "my-model", "--batch", "0"], "--batch must be >= 1, got 0"),
        (["benchmark", "my-model", "--length", "0"], "--length must be >= 1, got 0"),
        (["benchmark", "my-model", "--length", "999"], "has 128 positions, 999 are needed; shorten --length"),
        (["benchmark", "my-model", "--repeats", "1"], "--repeats must be >= 3, got 1"),
        (["benchmark", "my-model", "--generate"], "which generates no text: leave out --generate"),
        (["benchmark", "my-model", "--against", "./my-model"], "my-model cannot be compared with itself"),
        ([*QUANTIZE, "--bits", "²"], "--bits: input should be 1, 2, 3, 4, 8 or 'ternary', got '²'"),
        (
            [*QUANTIZE, "--granularity", "0"],
            "--granularity: input should be 'tensor' or 'row' or greater than or equal",
        ),
        ([*QUANTIZE, "--activations", "none", "--static"], "--static is of the activations, which --activations none"),
        ([*QUANTIZE, "--seed", "-1"], "--seed: input should be greater than or equal to 0, got -1"),
        ([*QUANTIZE, "--seed", str(1 << 40)], "--seed: input should be less than 4294967296"),
        ([*QUANTIZE, "--batch", "0"], "--batch: input should be greater than or equal to 1, got 0"),
        ([*QUANTIZE, "--report", "reviews.csv"], "cannot write to reviews.csv: reviews.csv is a file"),
        ([*PRUNE, *HALF, "--iterations", "0"], "--iterations: input should be greater than or equal to 1, got 0"),
        ([*PRUNE, "--latency-share", "0.5", "--batch", "0"], "--batch: input should be greater than or equal to 1"),
        ([*PRUNE, "--shape", "layers=0"], "--shape: layers: input should be greater than or equal to 1, got 0"),
        ([*PRUNE, "--shape", "foo=1"], "--shape: foo: unknown. Valid are: ffn, heads, hidden, layers"),
        ([*PRUNE, "--shape", "heads=1,heads=2"], "--shape: heads is given twice"),
        ([*PRUNE, *HALF, "--criterion", "os:"], "criterion 'os:' must be written module:attribute"),
        ([*PRUNE, *HALF, "--format", "vanilla"], "--format vanilla is not possible"),
        ([*FRONTIER, "--steps", "-1"], "--steps must be >= 0, got -1"),
        ([*FRONTIER, "--learning-rate", "-1"], "--learning-rate: input should be greater than 0, got -1"),
        ([*FRONTIER, "--seed", "-1"], "--seed: input should be greater than or equal to 0, got -1"),
        (["sensitivity", "my-model", *ROWS, "--share", "2"], "--share must be in (0, 1]"),
        (["sensitivity", "my-model", *ROWS, "-o", "reviews.csv"], "cannot write to reviews.csv"),
        (["compare", "reviews.csv", "my-model"], "reviews.csv is a file; a run is a folder"),
        (
            ["run", "quickstart", "stages.studnt.save=vanilla"],
            "override 'stages.studnt.save=vanilla': no stage 'studnt'",
        ),
    ],
)
def test_wrong_values_are_refused_before_anything_is_made(arguments, message, reviews, monkeypatch, capsys):
    monkeypatch.chdir(reviews)
    _refused(arguments, message, capsys)
    assert not (reviews / "made").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("list", "of 'list': "),
        ("cut", "header: incomplete metadata"),
        ("bare", "no"),
        ("wordless", "wordless holds no tokenizer"),
        ("stranger", "stranger has embeddings of 10 tokens, its tokenizer has"),
        ("headless", "headless is a BertModel, without a trained head for classification"),
        ("gpt2", "gpt2 is a GPT2LMHeadModel, without a trained head for classification"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "quantize", "frontier"])
def test_what_is_no_whole_model_is_refused_even_by_a_dry_run(verb, model, message, broken, monkeypatch, capsys):
    monkeypatch.chdir(broken)
    others = {"evaluate": [], "quantize": ["-o", "made", "--dry-run"], "frontier": [*FRONTIER[4:], "--dry-run"]}
    _refused([verb, model, *ROWS, *others[verb]], message, capsys)
