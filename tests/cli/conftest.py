"""A run of seconds, and a folder in which the examples of the help can be run."""

from __future__ import annotations

import pytest
from tiny_recipe import RECIPE, write_task
from transformers import BertConfig, BertForSequenceClassification

from lmcompress import cli
from lmcompress.data import load_task, train_tokenizer


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run made by the command line, its task beside it."""
    folder = tmp_path_factory.mktemp("cli")
    task = write_task(folder / "task")
    (folder / "tiny.yaml").write_text(RECIPE.replace("DATA", str(task)))
    assert cli.run_app(["run", str(folder / "tiny.yaml"), "training.max_steps=2", "-o", str(folder / "out")]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(finished):
    """A model, and the options that say what it is trained for."""
    return str(finished / "out" / "teacher"), ["--task", str(finished / "task"), "--max-length", "12"]


def _save(folder, texts, *, labels, positions=64, layers=2):
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=300)
    tokenizer.model_max_length = positions
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A folder with ``reviews.csv``, of one label only in its last rows, and ``my-model``, which is for it."""
    folder = tmp_path_factory.mktemp("reviews")
    texts = [f"a {('dull', 'bright')[i % 2]} film number {i}" for i in range(40)]
    rows = [f"{i},{text},{('negative', 'positive')[i % 2]}" for i, text in enumerate(texts)]
    (folder / "reviews.csv").write_text("\n".join(["id,review,sentiment", *rows]) + "\n")
    _save(folder / "my-model", texts, labels=("negative", "positive"), positions=128)
    return folder


@pytest.fixture(scope="session")
def workplace(reviews):
    """What the examples of the help take for there: models of a quickstart that know nothing, and one's own."""
    data = load_task("embedded/clinc150")
    for name in ("teacher", "student"):
        folder = reviews / "runs" / "quickstart" / name
        _save(folder, data.train["text"][:500], labels=data.task.label_names, positions=128)
    return reviews
