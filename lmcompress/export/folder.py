"""The files of an exported folder: config, tokenizer, record and card beside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.checkpoint.guard import FIELD
from lmcompress.export.graph import ONNX_FILE, OPENVINO_FILE, external_data

RECORD = "lmcompress_export.json"
"""What was exported, from what, and what was measured."""

_NOT_FOR_RUNTIMES = ("quantization_config", "auto_map", FIELD, "_name_or_path", "dtype", "torch_dtype")


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write ``config.json`` so that it is read without lmcompress: shapes and codes are in the graph.

    Args:
        model: the packed model.
        folder: the folder.
    """
    config: PretrainedConfig = model.config
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_FOR_RUNTIMES}
    values["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the tokenizer's files, if there is one.

    Args:
        tokenizer: the tokenizer.
        folder: the folder.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_pooling(folder: Path, *, pooling: str | None, normalize: bool, width: int) -> None:
    """Write the files by which sentence-transformers pools as the graph does; without them it takes the mean.

    Its backends ``onnx`` and ``openvino`` read the vectors of tokens, and pool themselves.

    Args:
        folder: the folder.
        pooling: ``mean``, ``cls`` or ``max``; None writes nothing.
        normalize: whether the vectors of sentences have length 1.
        width: width of a vector.
    """
    if pooling is None:
        return
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    for path in paths[1 : len(kinds)]:
        (folder / path).mkdir()
    mode = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}[pooling]
    chosen = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    said = {"word_embedding_dimension": width} | chosen
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write :data:`RECORD`.

    Args:
        record: JSON types.
        folder: the folder.
    """
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def graph_bytes(folder: Path) -> int:
    """Size of the graph and its weights.

    Args:
        folder: the folder.
    """
    weights = (external_data(ONNX_FILE), Path(OPENVINO_FILE).with_suffix(".bin").name)
    files = [folder / name for name in (ONNX_FILE, OPENVINO_FILE, *weights)]
    return sum(file.stat().st_size for file in files if file.is_file())
