"""The files of a folder of sentence-transformers: its modules, and what each of them computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lmcompress.activations.pooling import POOLINGS
from lmcompress.errors import CheckpointError, LmcompressError

MODULES = "modules.json"
"""The file that makes a folder one of sentence-transformers: the modules that a sentence passes through."""

_SETTINGS = "sentence_bert_config.json"
_OWN = "config_sentence_transformers.json"
_POOLING_KEYS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class Parts:
    """What a folder says.

    Attributes:
        source: the folder.
        transformer: the folder of the Transformer inside of it, which may be the same.
        pooling: name of the pooling.
        dense: linear layers after it, in order.
        normalize: whether embeddings have length 1.
        max_length: longest sentence in tokens; None: what the tokenizer says.
        lower: whether sentences are lower-cased before they are tokenized.
        modules: the entries of ``modules.json``.
    """

    source: Path
    transformer: Path
    pooling: str
    dense: tuple[nn.Linear, ...]
    normalize: bool
    max_length: int | None
    lower: bool
    modules: tuple[Mapping[str, Any], ...]


def is_sentence_encoder(folder: str | Path) -> bool:
    """Whether something is a local folder of sentence-transformers.

    Args:
        folder: folder, or name on the Hub.
    """
    return (Path(folder) / MODULES).is_file()


def read_parts(folder: str | Path) -> Parts:
    """What a folder of sentence-transformers computes.

    Args:
        folder: a local folder with ``modules.json``.

    Returns:
        its parts.

    Raises:
        CheckpointError: If a file is missing or no JSON.
        LmcompressError: If it has a module, a pooling or an activation that is not supported here.
    """
    source = Path(folder)
    modules = tuple(sorted(_json(source / MODULES), key=lambda module: int(module["idx"])))
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if unknown := sorted(set(kinds) - set(_KNOWN)):
        raise LmcompressError(
            f"{source} has the modules {', '.join(unknown)}, known are {', '.join(_KNOWN)}: compress the Transformer "
            "alone, and put the other modules around it with sentence-transformers"
        )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Transformer") + kinds.count("Pooling") != 2:
        raise LmcompressError(f"{source} must begin with a Transformer and a Pooling, got {', '.join(kinds)}")
    if "Normalize" in kinds[:-1]:
        raise LmcompressError(f"{source} must normalize last, got {', '.join(kinds)}")
    paths = [source / module["path"] for module in modules]
    settings = _json(paths[0] / _SETTINGS) if (paths[0] / _SETTINGS).is_file() else {}
    return Parts(
        source=source,
        transformer=paths[0],
        pooling=_pooling(paths[1]),
        dense=tuple(_dense(path) for path, kind in zip(paths, kinds, strict=True) if kind == "Dense"),
        normalize=kinds[-1] == "Normalize",
        max_length=settings.get("max_seq_length"),
        lower=bool(settings.get("do_lower_case")),
        modules=modules,
    )


def write_parts(parts: Parts, target: Path, width: int) -> None:
    """Write everything beside the Transformer, which is in the folder itself, as sentence-transformers reads it.

    Args:
        parts: what the encoder was read from.
        target: folder with the Transformer's checkpoint.
        width: width of its hidden states.
    """
    for module in parts.modules[1:]:
        origin, copy = parts.source / module["path"], target / module["path"]
        if origin.is_dir():
            shutil.copytree(origin, copy)
        else:
            # a module without settings, such as Normalize
            copy.mkdir()
    pooling = target / parts.modules[1]["path"] / "config.json"
    said = _json(pooling)
    for name in ("word_embedding_dimension", "embedding_dimension"):
        if name in said:
            said[name] = width
    pooling.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    modules = [{**parts.modules[0], "path": ""}, *map(dict, parts.modules[1:])]
    (target / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    for place, name in ((parts.transformer, _SETTINGS), (parts.source, _OWN)):
        if (place / name).is_file():
            shutil.copy(place / name, target / name)


def _pooling(folder: Path) -> str:
    said = _json(folder / "config.json")
    chosen = said.get("pooling_mode")
    modes = [chosen] if isinstance(chosen, str) else list(chosen or ())
    if not modes:
        prefix = "pooling_mode_"
        names = {token: name for name, token in _POOLING_KEYS.items()}
        given = [key.removeprefix(prefix) for key, value in said.items() if key.startswith(prefix) and value is True]
        modes = [names.get(token, token) for token in given] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise LmcompressError(f"{folder} pools by {', '.join(modes)}; supported is one of {', '.join(POOLINGS)}")
    return str(modes[0])


def _dense(folder: Path) -> nn.Linear:
    said = _json(folder / "config.json")
    activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation != "Identity":
        raise LmcompressError(
            f"{folder} is a Dense with the activation {activation}; supported are linear ones (Identity): compress the "
            "Transformer alone, and put the Dense after it with sentence-transformers"
        )
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors: save it again with sentence-transformers")
    weights = load_file(file)
    layer = nn.Linear(said["in_features"], said["out_features"], bias=bool(said.get("bias", True)))
    try:
        layer.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold the layer that its config.json describes: {error}") from error
    return layer.to(torch.float32).requires_grad_(False)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} is missing: the folder is no complete model of sentence-transformers") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
