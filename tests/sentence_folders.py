"""Tiny folders of sentence-transformers, written as that library writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import BY_NAME
from safetensors.torch import save_file
from transformers import BertModel

from lmcompress.data import train_tokenizer

SENTENCES = ["a cat sat on the mat", "the dog ran", "two birds flew over the old mill by the river", "a cat", "rain"]


def write_encoder(folder: Path, *, pooling: str = "mean", dense: str | None = None, normalize: bool = True) -> Path:
    """A random BERT of three blocks with a pooling; ``dense`` is the activation of a layer from 16 to 6."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(SENTENCES, kind="wordpiece", vocab_size=64)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BY_NAME["bert"].make_config(initializer_range=0.3, vocab_size=len(tokenizer))
    BertModel(config).save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    modules = []
    for number, kind in enumerate(kinds):
        path = "" if number == 0 else f"{number}_{kind}"
        modules.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "cosine"}))
    token = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}.get(pooling, pooling)
    said = {"word_embedding_dimension": 16, **{f"pooling_mode_{t}": t == token for t in ("cls_token", "mean_tokens")}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said | {f"pooling_mode_{token}": True}))
    if dense:
        about = {"in_features": 16, "out_features": 6, "bias": True}
        about["activation_function"] = f"torch.nn.modules.{dense}"
        (folder / "2_Dense" / "config.json").write_text(json.dumps(about))
        save_file(
            {"linear.weight": torch.randn(6, 16), "linear.bias": torch.randn(6)},
            folder / "2_Dense" / "model.safetensors",
        )
    return folder
