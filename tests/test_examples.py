"""The examples run offline; those with parts of one's own come to the same in both ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.data import load_task, train_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [("custom_criterion", {"roots", "l1", "random"}), ("custom_loss", {"correlation", "kl", "labels alone"})],
)
def test_an_example_runs_offline_and_its_two_ways_agree(name, rows, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "20", "--output", str(tmp_path / "run")]
    # from a folder without the script: a recipe must find its module all the same
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    table = dict(re.findall(r"│ (.+?) +│ ([0-9.]+) +│", done.stdout))
    assert rows <= {title.partition(", ")[0].rpartition(":")[2] for title in table}, done.stdout
    in_recipe, as_object = (
        next(v for k, v in table.items() if k.endswith(way)) for way in ("in a recipe", "an object")
    )
    assert abs(float(in_recipe) - float(as_object)) <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_class_weights_find_the_rare_class_sooner(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "class_weights.py"), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(re.findall(r"│ (class weights|no weights) +│ [0-9.]+ +│ ([0-9.]+) +│", done.stdout))
    assert float(found["class weights"]) > float(found["no weights"]) + 0.1
    config = AutoConfig.from_pretrained(tmp_path / "run" / "class-weights")
    assert recorded_compression(config).encoding.weights


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_a_page(file):
    assert len(file.read_text("utf-8").splitlines()) <= 120


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A BERT and a GPT-2 that know nothing, with tokenizers."""
    folder = tmp_path_factory.mktemp("pretrained")
    texts = load_task("embedded/clinc150").train["text"][:2000]
    words = train_tokenizer(texts, kind="wordpiece", vocab_size=600)
    shape = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(**shape, vocab_size=len(words), max_position_embeddings=64)
    pieces = train_tokenizer(texts, kind="bytelevel_bpe", vocab_size=400)
    ids = dict(bos_token_id=pieces.eos_token_id, eos_token_id=pieces.eos_token_id)
    causal = GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=len(pieces), **ids)
    for name, model, tokenizer in [
        ("bert", BertForMaskedLM(config), words),
        ("gpt2", GPT2LMHeadModel(causal), pieces),
    ]:
        tokenizer.model_max_length = 64
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "run_glue",
            "--model_name_or_path bert --task_name embedded/clinc150 --max_length 32 --limit 200 --sparsity 0.5",
        ),
        ("run_clm", "--model_name_or_path gpt2 --block_size 32 --limit 10"),
    ],
)
def test_an_example_on_hf_argument_parser_compresses_and_reloads(name, options, pretrained, tmp_path):
    options += f" --layers 2 --bits 8 --max_steps 8 --report_to none --output_dir {tmp_path / 'run'}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options.split()]
    done = subprocess.run(command, cwd=pretrained, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("student, reloaded" if name == "run_glue" else "student_perplexity") in done.stdout
    config = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert config.num_hidden_layers == 2 and recorded_compression(config).encoding.weights
