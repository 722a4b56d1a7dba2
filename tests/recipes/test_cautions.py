"""What is said before training: students that are not smaller, rows a vocabulary was not chosen from; and dtype."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipe import RECIPE, write_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.data import train_tokenizer
from lmcompress.pruning.vocabulary.embeddings import prune_vocabulary
from lmcompress.pruning.vocabulary.unseen import UnseenRows, unseen_rows
from lmcompress.recipes import parse_recipe, plan, run

QUICK = ["stages.student.control=false", "evaluation.latency_batches=[]", "training.max_steps=1"]


def test_a_student_as_large_as_its_teacher_is_named_before_training(tiny, tmp_path, console):
    result = run(parse_recipe(tiny, [*QUICK, "stages.student.student.layers=4"]), tmp_path / "run", console=console)
    said = console.file.getvalue()
    note = "student is not smaller than its teacher teacher: "
    assert note in said and said.index(note) < said.index("1/2")
    assert "4 blocks of width 16" in said and "stages.student.student.layers=2" in said
    assert any(note in each for each in result.report["notes"])


@pytest.mark.parametrize(
    "override",
    [
        "stages.student.student.layers=2",
        "stages.student.quantization={}",
        "stages.student.pruning={target: {sparsity: 0.5}, schedule: {kind: one_shot}, criterion: l1}",
    ],
)
def test_a_smaller_student_is_not_named(tiny, override):
    overrides = ["stages.student.student.layers=4", "stages.student.distillation.losses=[hidden_mse]", override]
    assert not any("is not smaller" in note for note in plan(parse_recipe(tiny, overrides)).notes)


def _model_of(texts, folder):
    """A BERT that knows nothing, with a WordPiece tokenizer of these texts."""
    recipe = RECIPE.partition("  - name: student")[0].replace("{max_steps: 4", "{max_steps: 1")
    task = write_task(folder / "task")
    for split in ("train", "validation"):
        rows = [f"{text},{('bad', 'good')[i % 2]}" for i, text in enumerate(texts)]
        (task / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    text = recipe.replace("DATA", str(task)).replace("vocab_size: 80", "vocab_size: 400")
    text += "evaluation: {latency_batches: []}\n"
    return run(parse_recipe(text), folder / "run", console=Console(quiet=True)).models["teacher"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose vocabulary has words that no training row of its second task has."""
    folder = tmp_path_factory.mktemp("wide")
    words = ["awful", "dull", "poor", "fine", "great", "bright", "gloomy", "splendid", "film", "novel"]
    model = _model_of([f"a {one} and {other} film" for one in words for other in words], folder)
    task = folder / "narrow"
    task.mkdir()
    train = [f"a {word} film,{label}" for word, label in (("dull", "bad"), ("fine", "good")) for _ in range(20)]
    validation = ["a dull film,bad", "a gloomy film,bad", "a splendid novel,good", "a fine film,good"]
    for split, rows in (("train", train), ("validation", validation)):
        (task / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return model, task


def _vocabulary_recipe(wide, *, limit=None, keep_characters=True):
    model, task = wide
    limited = "" if limit is None else f", limit: {limit}"
    return parse_recipe(f"""\
name: words
model: {model}
task: {{name: {task}, max_length: 12{limited}}}
stages:
  - name: small
    vocabulary: {{keep_characters: {str(keep_characters).lower()}}}
    training: {{max_steps: 0}}
evaluation: {{latency_batches: []}}
""")


def test_rows_of_validation_that_become_other_tokens_are_counted_and_said(wide, tmp_path, console):
    result = run(_vocabulary_recipe(wide), tmp_path / "run", console=console)
    said = (
        "2 of 4 validation rows (50.0%) are split into other tokens by the smaller vocabulary, 0 of them with unknown"
    )
    assert said in console.file.getvalue()
    assert any(said in note for note in result.report["notes"])
    assert said in (result.folder / "report.md").read_text()
    row = json.loads((result.folder / "results.json").read_text())["rows"][0]
    assert row["vocabulary"]["unseen"] == {"validation": {"rows": 4, "changed": 2, "unknown": 0}}


def test_rows_of_validation_that_become_unknown_are_counted(wide):
    planned = plan(_vocabulary_recipe(wide, keep_characters=False)).stages[0]
    assert planned.plans["vocabulary"].unseen["validation"] == UnseenRows(rows=4, changed=2, unknown=2)


def test_a_limit_does_not_shrink_the_corpus_of_a_vocabulary(wide):
    kept = [
        plan(_vocabulary_recipe(wide, limit=limit)).stages[0].plans["vocabulary"].kept["corpus"] for limit in (None, 1)
    ]
    assert kept[0] == kept[1] and "dull" in kept[0] and "fine" in kept[0]


def test_a_limit_does_not_shrink_the_corpus_of_a_tokenizer(tiny):
    tokenizers = [plan(parse_recipe(tiny, [f"task.limit={limit}"])).materials.tokenizer for limit in (2, 24)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_unseen_rows_by_hand():
    texts = ["red green blue", "red red", "green"]
    before = train_tokenizer(texts, kind="wordpiece", vocab_size=200)
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(before), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertModel(config)
    after, report = prune_vocabulary(model, before, ["red"], keep_characters=False)
    columns = [["red", "blue", "red"], ["red", "red", "green"]]
    found = unseen_rows(before, after, report.old_ids, columns)
    by_hand = [[before.tokenize(text) != after.tokenize(text) for text in row] for row in zip(*columns, strict=True)]
    assert found == UnseenRows(rows=3, changed=sum(any(row) for row in by_hand), unknown=2) and found.changed == 2


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A bfloat16 and a float16 checkpoint, and the task they are for."""
    folder = tmp_path_factory.mktemp("halves")
    task = write_task(folder / "task")
    text = RECIPE.partition("  - name: student")[0].replace("DATA", str(task)) + "evaluation: {latency_batches: []}\n"
    trained = run(parse_recipe(text), folder / "run", console=Console(quiet=True)).models["teacher"]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        AutoModelForSequenceClassification.from_pretrained(trained, dtype=dtype).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(trained).save_pretrained(folder / name)
    return folder


def _tuned(halves, dtype, *lines):
    head = f"name: tuned\nmodel: {halves / dtype}\ntask: {{name: {halves / 'task'}, max_length: 12}}\n"
    stages = (
        "stages:\n  - {name: tuned, training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-5}}\n"
    )
    after = "  - {name: after, start: tuned, training: {max_steps: 1, per_device_train_batch_size: 4}}\n"
    return parse_recipe("".join([head, *lines, stages, after, "evaluation: {latency_batches: []}\n"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_16_bits_is_trained_and_saved_in_float32(halves, tmp_path, dtype):
    result = run(_tuned(halves, dtype), tmp_path / "run", console=Console(quiet=True))
    before = load_file(halves / dtype / "model.safetensors")
    for name in ("tuned", "after"):
        after = load_file(result.models[name] / "model.safetensors")
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert AutoModelForSequenceClassification.from_pretrained(result.models[name]).dtype == torch.float32
    tuned = load_file(result.models["tuned"] / "model.safetensors")
    matrices = [name for name in tuned if "layer" in name and name.endswith("dense.weight")]
    # of steps of 1e-5 nearly all are lost in 16 bits
    shares = [(tuned[name] != before[name].float()).float().mean().item() for name in matrices]
    assert min(shares) > 0.99


def test_a_recipe_may_ask_for_16_bits(halves, tmp_path):
    for number, line in enumerate(("dtype: bfloat16\n", "dtype: auto\n")):
        result = run(_tuned(halves, "bfloat16", line), tmp_path / str(number), console=Console(quiet=True))
        found = load_file(result.models["after"] / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
