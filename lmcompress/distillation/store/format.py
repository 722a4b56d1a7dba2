"""The format of a store of a teacher's outputs on disk: ``meta.json``, the fields of a row, keys and hashes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.activations.capture import FEATURES, Feature
from lmcompress.errors import LmcompressError

StoredDtype = Literal["float16", "float32"]
FORMAT_VERSION = 1
META_FILE, INDEX_FILE = "meta.json", "index.safetensors"
KEY_BYTES = 16
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# entries of a config without effect on the outputs; the shapes of a compressed teacher are in its tensors
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def teacher_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's config and of the names, shapes, types and bytes of all its tensors.

    Config entries that do not affect outputs are ignored (name, versions, attention implementation, names of labels),
    so that a model that was saved and loaded again has the same hash.

    Args:
        model: not wrapped, with its weights in memory.

    Returns:
        32 hexadecimal digits.

    Raises:
        LmcompressError: If the model is on ``meta``, without weights.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(json.dumps(_lasting(model.config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise LmcompressError(f"the teacher's tensor {name} is on meta; load the weights first")
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def row_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """The key of each row: a hash of its unpadded token ids, and of their token types if the batch has any.

    Args:
        batch: with ``input_ids``, and optionally ``attention_mask`` and ``token_type_ids``; if there is a
            ``teacher_input_ids``, the inputs that begin with ``teacher_`` are used instead.

    Returns:
        16 bytes for each row.

    Raises:
        LmcompressError: If there are no token ids.
    """
    return keys_of(store_inputs(batch))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Size = Annotated[int, Field(ge=1, le=1 << 31)]


class FileInfo(_Strict):
    """A file of the store: its size and hash when written."""

    size_bytes: Annotated[int, Field(ge=0)]
    blake2b: _Hash


class FeatureInfo(_Strict):
    """A feature that is stored.

    Attributes:
        kind: kind of feature, such as ``"hidden"``.
        layer: counted from the start.
        shape: shape for one row, 0 where a size is the row's length.
    """

    kind: Annotated[str, Field(pattern=f"^({'|'.join(FEATURES)})$")]
    layer: Annotated[int, Field(ge=0, le=1024)]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...], Field(min_length=2, max_length=3)]


class StoreMeta(_Strict):
    """The contents of ``meta.json``.

    Attributes:
        format_version: version of the files' layout.
        teacher: :func:`teacher_fingerprint` of the teacher.
        teacher_name: name or path of the teacher, informative only.
        layers: number of the teacher's blocks.
        rows: number of distinct rows stored.
        logits: whether there is one vector of logits per row or per token.
        vocab_size: number of classes or tokens in a vector of logits.
        top_k: number stored, or None for all.
        dtype: dtype of the numbers on disk.
        features: features stored in addition to logits.
        index: the index file.
        shards: the shards in order.
    """

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    teacher: _Hash
    teacher_name: Annotated[str, Field(max_length=1024)] = ""
    layers: Annotated[int, Field(ge=0, le=1024)]
    rows: Annotated[int, Field(ge=1)]
    logits: Literal["row", "token"]
    vocab_size: _Size
    top_k: _Size | None = None
    dtype: StoredDtype
    features: tuple[FeatureInfo, ...] = ()
    index: FileInfo
    shards: tuple[FileInfo, ...] = ()


@dataclass(frozen=True)
class StoredField:
    """The layout of one tensor of a row; 0 in ``shape`` stands for the row's length."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def per_row(self) -> bool:
        """Whether a row has one entry of a fixed size, whatever its length."""
        return 0 not in self.shape

    def sizes(self, lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Number of values per row, from its length."""
        power = self.shape.count(0)
        return lengths.astype(np.int64) ** power * math.prod(size for size in self.shape if size)


def fields_of(meta: StoreMeta) -> dict[str, StoredField]:
    """The layout of the tensors of a row, by name."""
    dtype = DTYPES[meta.dtype]
    start = (0,) if meta.logits == "token" else ()
    if meta.top_k is not None:
        kept = (*start, meta.top_k)
        fields = {
            "values": StoredField(kept, dtype),
            "indices": StoredField(kept, torch.int32),
            "logsumexp": StoredField((*start, 1), torch.float32),
        }
    else:
        fields = {"logits": StoredField((*start, meta.vocab_size), dtype)}
        if dtype == torch.float16:
            fields["offsets"] = StoredField((*start, 1), torch.float32)
    return fields | {field_name((info.kind, info.layer)): StoredField(info.shape, dtype) for info in meta.features}


def _lasting(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}


def store_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The teacher's inputs of a batch, checked."""
    prefix = "teacher_" if "teacher_input_ids" in batch else ""
    inputs = {name: batch[prefix + name] for name in _INPUTS if isinstance(batch.get(prefix + name), Tensor)}
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise LmcompressError(
            f"a batch needs input_ids of shape (batch, length) for the teacher store, got {sorted(batch)}"
        )
    for name, tensor in inputs.items():
        if tensor.shape != ids.shape:
            raise LmcompressError(
                f"{prefix}{name} must have the shape of {prefix}input_ids {tuple(ids.shape)}, got {tuple(tensor.shape)}"
            )
    return inputs


def token_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """``(batch, length)`` booleans on the CPU, True for real tokens."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().cpu()


def keys_of(inputs: Mapping[str, Tensor]) -> list[bytes]:
    """The key of each row of the inputs."""
    mask = token_mask(inputs).numpy()
    columns = [inputs[name].cpu().numpy().astype("<i8") for name in ("input_ids", "token_type_ids") if name in inputs]
    keys = []
    for row, valid in enumerate(mask):
        digest = hashlib.blake2b(int(valid.sum()).to_bytes(8, "little"), digest_size=KEY_BYTES)
        for column in columns:
            digest.update(column[row][valid].tobytes())
        keys.append(digest.digest())
    return keys


def field_name(feature: Feature) -> str:
    """The name of a feature's tensor in the files."""
    return f"{feature[0]}.{feature[1]}"


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def files_of(meta: StoreMeta) -> list[tuple[str, FileInfo]]:
    """All files that a store must have, by name."""
    return [(INDEX_FILE, meta.index), *((shard_name(i), info) for i, info in enumerate(meta.shards))]


def file_info(path: Path) -> FileInfo:
    """Current size and hash of a file."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileInfo(size_bytes=path.stat().st_size, blake2b=digest.hexdigest())


def open_checked(path: Path, info: FileInfo) -> Any:
    """Open a file of tensors if its hash is correct."""
    try:
        if file_info(path) == info:
            return safe_open(path, framework="pt")
        reason = "its hash is not the one in meta.json"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise LmcompressError(f"the teacher store is damaged: {path}: {reason}; build it again")


def read_meta(folder: Path) -> StoreMeta:
    """Read and validate ``meta.json``."""
    path = folder / META_FILE
    if not path.is_file():
        raise LmcompressError(f"{folder} holds no teacher store (no {META_FILE}); make one with TeacherStore.build")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LmcompressError(f"{path} is not JSON: {error}; build the store again") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LmcompressError(
            f"the teacher store {folder} has format version {version}, this lmcompress reads up to {FORMAT_VERSION}: "
            "pip install --upgrade lmcompress, or build the store again"
        )
    try:
        # from the text: JSON's arrays then pass as tuples under strict validation
        return StoreMeta.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise LmcompressError(f"{path} is not valid: {problems}; build the store again") from error
