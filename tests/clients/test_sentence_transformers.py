"""sentence-transformers: a compressed encoder with modules.json, and the same saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from client_drivers import SENTENCES
from client_forms import tokenizers
from client_table import Refusal, client

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def _with_pooling(folder, target):
    """A copy of a checkpoint, with the files that make it a model of sentence-transformers."""
    shutil.copytree(folder, target)
    hidden = json.loads((target / "config.json").read_text())["hidden_size"]
    (target / "modules.json").write_text(json.dumps(MODULES))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True})
    )
    return str(target)


def _means(form):
    """Means over the tokens of the encoder in memory."""
    words, _ = tokenizers()
    batch = words(SENTENCES, return_tensors="pt", padding=True)
    with torch.no_grad():
        # as sentence-transformers does: hooks, by which padding is left out of the ranges of 8-bit inputs, do not run
        states = form.classifier.base_model.forward(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


@pytest.mark.filterwarnings("ignore")
@client("sentence-transformers")
def test_embeddings_are_means_of_the_encoder_in_memory(form, run, tmp_path):
    found = run("sentences", _with_pooling(Path(form.folders[0]), tmp_path / "model"), None)
    torch.testing.assert_close(torch.tensor(found), _means(form), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@client(
    "sentence-transformers, saved again",
    self_loading_int8=Refusal("not serializable", "weights were unpacked as they were loaded: copy the folder instead"),
)
def test_what_it_saves_again_gives_the_same(form, run, tmp_path):
    folder = _with_pooling(Path(form.folders[0]), tmp_path / "model")
    found = run("sentences", folder, str(tmp_path / "again"))
    torch.testing.assert_close(torch.tensor(found), _means(form), rtol=1e-4, atol=1e-5)
