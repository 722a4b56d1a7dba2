"""The size of a checkpoint: bytes of its files, parameters of its model, tensors by their headers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import encoded_names, weight_count
from lmcompress.checkpoint.files import safetensors_header
from lmcompress.entropy_coding import StreamInfo, describe
from lmcompress.errors import CheckpointError
from lmcompress.nn.packed import Packed, PackedEmbedding

parameter_count = weight_count

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Files that a model and its tokenizer are loaded from, besides the weights."""


@dataclass(frozen=True)
class Size:
    """Bytes of the files needed to load a checkpoint.

    Attributes:
        total_bytes: their sum.
        weights_bytes: safetensors files.
        other_bytes: config, tokenizer, and the index of a sharded checkpoint.
        by_file: file name to bytes, largest first.
    """

    total_bytes: int
    weights_bytes: int
    other_bytes: int
    by_file: dict[str, int]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header.

    Attributes:
        name: name in the file.
        dtype: safetensors' name of the type: ``F32``, ``BF16``, ``I8``…
        shape: as stored; packed weights are stored in another shape than in the model.
        num_bytes: bytes of its data in the file.
        file: the name of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's tensors by kind; tied tensors count once.

    Attributes:
        codes: packed matrices.
        embedding_codes: packed embeddings, including a head that is tied to them.
        scales: scales and zero points, of weights and of activations.
        dense: all others: norms, biases, positions, heads.
        packed_weights: number of weights that the codes stand for.
    """

    codes: int
    embedding_codes: int
    scales: int
    dense: int
    packed_weights: int

    @property
    def total(self) -> int:
        """Their sum: a file of them is larger only by its header."""
        return self.codes + self.embedding_codes + self.scales + self.dense

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales per packed weight, or None if there are none."""
        if not self.packed_weights:
            return None
        return 8 * (self.codes + self.embedding_codes + self.scales) / self.packed_weights


def weight_bytes(model: PreTrainedModel) -> WeightBytes:
    """Bytes of a model's tensors in its files.

    Args:
        model: a model of a known family, packed or not, on any device, ``meta`` too.

    Returns:
        Bytes by kind.
    """
    codes = {
        f"{name}.weight": isinstance(module, PackedEmbedding)
        for name, module in model.named_modules()
        if isinstance(module, Packed)
    }
    encoded, seen = encoded_names(model), set()
    of_matrices = of_embeddings = scales = dense = 0
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = tensor.numel() * tensor.element_size()
        if name in codes:
            of_embeddings += size if codes[name] else 0
            of_matrices += 0 if codes[name] else size
        elif name in encoded:
            scales += size
        else:
            dense += size
    packed = sum(math.prod(module.shape) for module in model.modules() if isinstance(module, Packed))
    return WeightBytes(of_matrices, of_embeddings, scales, dense, packed)


def size_on_disk(folder: str | Path) -> Size:
    """Bytes of the files needed to load a checkpoint: weights, config, tokenizer; without training state and reports.

    Args:
        folder: a checkpoint with safetensors weights.

    Returns:
        the bytes, in total and by file.

    Raises:
        CheckpointError: If there are no safetensors weights, or some named in the index are missing.
    """
    path = Path(folder)
    weights = {file.name: file.stat().st_size for file in _weight_files(path)}
    names = (*OTHER_FILES, *([INDEX_FILE] if (path / INDEX_FILE).is_file() and WEIGHTS_FILE not in weights else []))
    other = {name: (path / name).stat().st_size for name in names if (path / name).is_file()}
    by_file = dict(sorted({**weights, **other}.items(), key=lambda item: -item[1]))
    return Size(sum(by_file.values()), sum(weights.values()), sum(other.values()), by_file)


def tensor_table(folder: str | Path) -> list[TensorInfo]:
    """The tensors of a checkpoint, read only from the headers of its files.

    Args:
        folder: a checkpoint with safetensors weights.

    Returns:
        one entry per tensor, in the order of the files and their data.

    Raises:
        CheckpointError: If there are no safetensors weights, or a file is damaged.
    """
    return [
        TensorInfo(name, one.dtype, one.shape, math.prod(one.shape) * _bits(one.dtype) // 8, file.name)
        for file in _weight_files(Path(folder))
        for name, one in safetensors_header(file).items()
    ]


def stream_table(folder: str | Path) -> dict[str, StreamInfo]:
    """How the entropy-coded tensors of a checkpoint are stored, and their minimum size in theory; decodes all.

    Args:
        folder: a checkpoint with safetensors weights.

    Returns:
        by name, in the order of the files; empty if no tensor is a stream.

    Raises:
        CheckpointError: If there are no safetensors weights, or a stream is damaged.
    """
    path = Path(folder)
    described = json.loads((path / "config.json").read_text("utf-8")).get("quantization_config") or {}
    names = (described.get("storage") or {}).get("streams") or {}
    found: dict[str, StreamInfo] = {}
    for file in _weight_files(path) if names else ():
        with safe_open(str(file), framework="pt") as source:
            found |= {name: describe(source.get_tensor(name), name) for name in source.keys() if name in names}
    return found


def _weight_files(folder: Path) -> list[Path]:
    # as transformers does: one file wins over an index
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"a checkpoint must have {WEIGHTS_FILE} or {INDEX_FILE}, {str(folder)!r} has neither")
    try:
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(folder / INDEX_FILE)!r} must map tensors to files: {error!r}") from error
    if missing:
        raise CheckpointError(f"{INDEX_FILE} names files that {str(folder)!r} does not have: {', '.join(missing)}")
    return [folder / name for name in names]


def _bits(dtype: str) -> int:
    """Bits per number of a type, by safetensors' name: ``F8_E4M3`` has 8."""
    return 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
