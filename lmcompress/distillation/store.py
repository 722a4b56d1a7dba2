"""A store on disk of what a teacher answers, so that it runs once over the data instead of once in every epoch.

Rows are found by their content: the key is a hash of the row's unpadded tokens. So the order, the batches, the padding,
the number of processes and the subset of the data do not matter, and a row whose text or tokenisation has changed
is not found instead of being wrong.

A folder holds ``meta.json`` (:class:`StoreMeta`), ``index.safetensors`` (keys, lengths, and logits of one vector per
row) and ``shard-00000.safetensors``, ... (whatever has one entry per token, rows laid end to end without padding).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lmcompress.activations.capture import FEATURES, Feature, Features, resolve
from lmcompress.errors import LmcompressError, nearest
from lmcompress.model import replaced_folder

StoredDtype = Literal["float16", "float32"]
Extract = Callable[[PreTrainedModel, Mapping[str, Tensor], Sequence[Feature]], tuple[Tensor, Features]]
"""``(teacher, inputs, features) -> (logits, {feature: tensor})``, as :func:`capture.extract`."""

FORMAT_VERSION = 1
META_FILE, INDEX_FILE = "meta.json", "index.safetensors"
SHARD_BYTES = 256 << 20
KEY_BYTES = 16
# the least float16; lower logits have no probability left, and minus infinity would make losses NaN
_LOWEST = -65504.0

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# of one row, without the batch axis
_LENGTH_AXES = {
    "hidden": (0,),
    "scores": (1, 2),
    "probabilities": (1, 2),
    "queries": (1,),
    "keys": (1,),
    "values": (1,),
    "output": (0,),
}
# what changes a config's text but not the teacher's answers; the shapes of a compressed teacher are in its tensors
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


@dataclass(frozen=True)
class TopK:
    """The greatest logits of a teacher, as the store gives them back.

    Attributes:
        values: ``(..., k)`` float32, greatest first.
        indices: ``(..., k)`` int64, their places in the vocabulary.
        logsumexp: ``(...)`` float32, over the whole vocabulary.
        vocab_size: its size.
    """

    values: Tensor
    indices: Tensor
    logsumexp: Tensor
    vocab_size: int

    def logits(self) -> Tensor:
        """``(..., vocab_size)`` float32: see :func:`expand_top_k`."""
        return expand_top_k(self.values, self.indices, self.logsumexp, self.vocab_size)


@dataclass(frozen=True)
class Stored:
    """What a store knows of one batch, padded as the batch is.

    Attributes:
        logits: ``(batch, classes)`` or ``(batch, length, classes)`` float32; None where only the greatest are stored.
        top_k: the greatest logits, or None where all are stored. At padding they describe a uniform distribution.
        features: by kind and layer, float32, shaped as :mod:`lmcompress.activations.capture` gives them;
            zero wherever a length axis is at padding.
    """

    logits: Tensor | None
    top_k: TopK | None
    features: Features


def expand_top_k(values: Tensor, indices: Tensor, logsumexp: Tensor, vocab_size: int) -> Tensor:
    r"""Logits of the whole vocabulary from the greatest ones.

    .. math:: z_v = Z + \log\frac{1 - \sum_{i \in K} e^{z_i - Z}}{V - k} \ (v \notin K), \quad Z = \log\sum_v e^{z_v}

    Kept tokens have exactly the probability that they had, at temperature 1; what is left is spread evenly over the
    others.

    Args:
        values: ``(..., k)`` logits that were kept.
        indices: ``(..., k)`` int, their places; no place twice.
        logsumexp: ``(...)`` over all logits, kept or not.
        vocab_size: V, at least k.

    Returns:
        ``(..., vocab_size)`` float32, whose logsumexp is ``logsumexp`` again.

    Raises:
        LmcompressError: the shapes do not belong together.

    Example:
        >>> logits = expand_top_k(torch.tensor([0.5]).log(), torch.tensor([2]), torch.tensor(0.0), 3)
        >>> logits.exp()
        tensor([0.2500, 0.2500, 0.5000])
    """
    k = values.shape[-1]
    if values.shape != indices.shape or values.shape[:-1] != logsumexp.shape or not 1 <= k <= vocab_size:
        raise LmcompressError(
            f"values and indices must be (..., k) with k from 1 to vocab_size {vocab_size}, logsumexp (...); got "
            f"{tuple(values.shape)}, {tuple(indices.shape)} and {tuple(logsumexp.shape)}"
        )
    values, total = values.float(), logsumexp.float().unsqueeze(-1)
    # rounding may leave nothing or less; a floor keeps the rest finite, so that no loss multiplies 0 by infinity
    rest = (1 - (values - total).exp().sum(-1, keepdim=True)).clamp(min=1e-12)
    others = total + rest.log() - math.log(max(vocab_size - k, 1))
    logits = others.expand(*values.shape[:-1], vocab_size).clone()
    return logits.scatter_(-1, indices.long(), values)


def teacher_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's config and of the names, shapes, types and bytes of all its tensors.

    Left out of the config is what does not change answers (name, versions, attention implementation, names of labels),
    so that a model that was saved and loaded again has the same hash.

    Args:
        model: not wrapped, with its weights in memory.

    Returns:
        32 hexadecimal digits.

    Raises:
        LmcompressError: the model is on ``meta`` and has no weights.
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
            ``teacher_input_ids``, the inputs that begin with ``teacher_`` are taken instead.

    Returns:
        16 bytes for each row.

    Raises:
        LmcompressError: there are no token ids.
    """
    return _keys(_teacher_inputs(batch))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Size = Annotated[int, Field(ge=1, le=1 << 31)]


class FileInfo(_Strict):
    """A file of the store: its size and hash as it was written."""

    size_bytes: Annotated[int, Field(ge=0)]
    blake2b: _Hash


class FeatureInfo(_Strict):
    """A feature that is stored.

    Attributes:
        kind: such as ``"hidden"``.
        layer: counted from the beginning.
        shape: the sizes of one row, 0 where a size is the row's length.
    """

    kind: Annotated[str, Field(pattern=f"^({'|'.join(FEATURES)})$")]
    layer: Annotated[int, Field(ge=0, le=1024)]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...], Field(min_length=2, max_length=3)]


class StoreMeta(_Strict):
    """What ``meta.json`` says.

    Attributes:
        format_version: of the files' layout.
        teacher: :func:`teacher_fingerprint` of the teacher.
        teacher_name: name or path of the teacher, for people to read.
        layers: blocks of the teacher.
        rows: different rows stored.
        logits: whether there is one vector of logits per row or per token.
        vocab_size: classes or words that a vector of logits has.
        top_k: how many of them are stored, or None for all.
        dtype: of the numbers on disk.
        features: what is stored besides logits.
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


class TeacherStore:
    """A teacher's answers on disk; made by :meth:`build` or :meth:`open`.

    Shards are mapped into memory and only the rows of a batch are read. Several processes can read one store.

    Args:
        folder: where it is.
        meta: what it says of itself.
    """

    def __init__(self, folder: Path, meta: StoreMeta) -> None:
        self.folder = folder
        self.meta = meta
        self._fields = _fields_of(meta)
        self._handles: dict[int, Any] = {}
        index = self._read_index()
        self._rows: dict[bytes, int] = {key.tobytes(): row for row, key in enumerate(index["keys"].numpy())}
        self._lengths = index["lengths"].numpy()
        self._of_rows = {name: index[name] for name in self._fields if self._fields[name].per_row}
        shards = index["shards"].numpy()
        self._shards = shards
        starts = np.searchsorted(shards, np.arange(len(meta.shards) + 1)) if len(meta.shards) else np.zeros(1, int)
        # where each row begins within its shard, for every field that is laid end to end
        self._begins: dict[str, np.ndarray[Any, Any]] = {}
        self._totals: dict[str, np.ndarray[Any, Any]] = {}
        for name, field in self._fields.items():
            if not field.per_row:
                ends = np.concatenate([[0], np.cumsum(field.sizes(self._lengths))])
                firsts = ends[starts]
                self._begins[name] = ends[:-1] - firsts[shards]
                self._totals[name] = np.diff(firsts)

    def __len__(self) -> int:
        return self.meta.rows

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features that are stored."""
        return tuple((info.kind, info.layer) for info in self.meta.features)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: PreTrainedModel,
        dataset: Any,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        *,
        extract: Extract,
        top_k: int | None = None,
        features: Sequence[Feature] = (),
        dtype: StoredDtype = "float16",
        batch_size: int = 32,
        progress: bool = True,
    ) -> TeacherStore:
        """Run the teacher over the data once and write what it answers.

        With several processes, let one build and the others wait and :meth:`open`.

        ``float16`` logits are written as differences to the row's greatest (``top_k``: to the logsumexp) with that one
        in float32, so that the error is relative to what a softmax sees and not to an arbitrary offset.

        Note:
            Rows are recognised by their tokens without padding. A teacher that does not derive its positions from
            the mask (GPT-2 with padding on the left) answers differently where the padding differs; what is stored
            is its answer to the row as it was padded here.

        Args:
            folder: new, empty, or a store, which is replaced as a whole once everything is written.
            teacher: on the device where it is to run; evaluation mode for the time, without gradient.
            dataset: a map-style dataset of whatever ``collator`` takes; rows with the same tokens are stored once.
            collator: list of rows → batch; must be the one of training in what it does to tokens, and not random.
            extract: runs the teacher: :func:`lmcompress.activations.capture.extract`.
            top_k: how many logits of each vector to keep; default: all (GPT-2: 100 kB a token).
            features: kinds and layers, negative layers counted from the end.
            dtype: of the numbers on disk.
            batch_size: rows that the teacher takes at once.
            progress: whether to show a bar.

        Returns:
            The store, open.

        Raises:
            LmcompressError: no data, an unknown feature, ``top_k`` out of range, an answer that is NaN or does not fit
                ``float16``, a folder with something else in it, or no space; what was at ``folder`` is still there.
        """
        if dtype not in _DTYPES:
            raise LmcompressError(f"unknown dtype {dtype!r}{nearest(str(dtype), _DTYPES)}")
        if batch_size < 1:
            raise LmcompressError(f"batch_size must be at least 1, got {batch_size}")
        wanted = list(dict.fromkeys(resolve(teacher, kind, layer) for kind, layer in features))
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=collator)
        # the bar of transformers, which its verbosity settings switch off
        batches = logging.tqdm(loader, desc="teacher", disable=not progress)
        takes = set(inspect.signature(teacher.forward).parameters)
        training = teacher.training
        teacher.eval()
        try:
            with replaced_folder(Path(folder), marker=META_FILE) as temporary, torch.no_grad():
                writer = _Writer(temporary, dtype, top_k)
                for batch in batches:
                    inputs = _teacher_inputs(batch)
                    mask = _mask(inputs)
                    on_device = {k: v.to(teacher.device) for k, v in inputs.items() if k in takes}
                    logits, captured = extract(teacher, on_device, wanted)
                    writer.add(_keys(inputs), mask, logits, {feature: captured[feature] for feature in wanted})
                writer.finish(teacher)
        finally:
            teacher.train(training)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, *, teacher: PreTrainedModel | None = None) -> TeacherStore:
        """Open a store, and refuse it if it is not what it says or not this teacher's.

        Sizes of all files and the index's hash are checked now, the hash of each shard when it is first read.

        Args:
            folder: as :meth:`build` wrote it.
            teacher: the one that it must come from.

        Returns:
            The store; nothing but its index is in memory.

        Raises:
            LmcompressError: no store, a damaged one, one of a later version, or another teacher's.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        for name, info in _files(meta):
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != info.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {info.size_bytes}"
                raise LmcompressError(f"the teacher store {folder} is damaged: {name} {found}; build it again")
        if teacher is not None and (found := teacher_fingerprint(teacher)) != meta.teacher:
            raise LmcompressError(
                f"the store {folder} was made by another teacher: it has the hash {meta.teacher[:12]} "
                f"({meta.teacher_name or 'no name'}), this one {found[:12]} "
                f"({teacher.config.name_or_path or 'no name'}); weights or config differ. "
                "Build the store again, or load the teacher that made it"
            )
        return cls(folder, meta)

    def lookup(self, batch: Mapping[str, Any], features: Iterable[Feature] = ()) -> Stored:
        """What the teacher answered to the rows of a batch.

        Args:
            batch: as :func:`row_keys` takes it; padded on either side, to any length.
            features: which of those stored; negative layers count from the end.

        Returns:
            Logits and features on the batch's device, padded to the batch's length.

        Raises:
            LmcompressError: a feature or a row is not in the store, or a shard is damaged.
        """
        wanted = [self._resolve(kind, layer) for kind, layer in features]
        inputs = _teacher_inputs(batch)
        device, mask = inputs["input_ids"].device, _mask(inputs)
        rows = self._find(_keys(inputs))
        logits = top_k = None
        if self.meta.top_k is None:
            logits = self._get("logits", rows, mask)
            if "offsets" in self._fields:
                logits = logits + self._get("offsets", rows, mask)
            logits = logits.to(device)
        else:
            top_k = self._top_k(rows, mask, device)
        return Stored(logits, top_k, {feature: self._get(_name(feature), rows, mask).to(device) for feature in wanted})

    def _top_k(self, rows: Sequence[int], mask: Tensor, device: torch.device) -> TopK:
        vocab = self.meta.vocab_size
        total = self._get("logsumexp", rows, mask).squeeze(-1)
        values, indices = self._get("values", rows, mask) + total.unsqueeze(-1), self._get("indices", rows, mask).long()
        if self.meta.logits == "token":
            padding = ~mask
            values[padding], total[padding] = 0.0, math.log(vocab)
            indices[padding] = torch.arange(values.shape[-1])
        return TopK(values.to(device), indices.to(device), total.to(device), vocab)

    def _resolve(self, kind: str, layer: int) -> Feature:
        feature = (kind, layer if layer >= 0 else self.meta.layers + 1 + layer)
        if feature not in self.features:
            there = ", ".join(f"{kind} {layer}" for kind, layer in self.features) or "none"
            raise LmcompressError(
                f"the store {self.folder} has no feature {kind} {layer}. Stored are: {there}. Build it again with "
                "the features that the recipe matches"
            )
        return feature

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        rows = [self._rows.get(key, -1) for key in keys]
        if missing := sum(row < 0 for row in rows):
            raise LmcompressError(
                f"{missing} of {len(rows)} rows of the batch are not in the store {self.folder} ({len(self)} "
                "rows): the data, the tokenizer or the greatest length have changed, or the collator changes tokens "
                "at random. Build the store again"
            )
        return rows

    def _get(self, name: str, rows: Sequence[int], mask: Tensor) -> Tensor:
        field = self._fields[name]
        if field.per_row:
            stored = self._of_rows[name][torch.tensor(rows)]
            return stored if stored.dtype == torch.int32 else stored.float()
        length = mask.shape[1]
        dtype = torch.int32 if field.dtype == torch.int32 else torch.float32
        padded = torch.zeros(len(rows), *(size or length for size in field.shape), dtype=dtype)
        for place, row in enumerate(rows):
            n, begin = int(self._lengths[row]), int(self._begins[name][row])
            if n == 0:
                continue
            shape = tuple(size or n for size in field.shape)
            flat = self._shard(int(self._shards[row])).get_slice(name)[begin : begin + math.prod(shape)]
            kept = mask[place].nonzero().squeeze(-1)
            padded[place][_at(field.shape, kept)] = flat.view(shape).to(dtype)
        return padded

    def _read_index(self) -> dict[str, Tensor]:
        path, meta = self.folder / INDEX_FILE, self.meta
        with _open_checked(path, meta.index) as handle:
            index = {name: handle.get_tensor(name) for name in handle.keys()}
        expected = {"keys": (meta.rows, KEY_BYTES), "lengths": (meta.rows,), "shards": (meta.rows,)}
        expected |= {name: (meta.rows, *field.shape) for name, field in self._fields.items() if field.per_row}
        if {name: tuple(tensor.shape) for name, tensor in index.items()} != expected:
            raise LmcompressError(f"{path} does not hold what meta.json says; build the store again")
        shards, last = index["shards"].numpy(), max(len(meta.shards) - 1, 0)
        ordered = bool((np.diff(shards) >= 0).all()) and shards[0] >= 0 and shards[-1] <= last
        if not ordered or int(index["lengths"].min()) < 0:
            raise LmcompressError(f"{path} numbers rows or shards that cannot be; build the store again")
        return index

    def _shard(self, number: int) -> Any:
        if number not in self._handles:
            path = self.folder / _shard_name(number)
            handle = _open_checked(path, self.meta.shards[number])
            sizes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
            if sizes != {name: (int(total[number]),) for name, total in self._totals.items()}:
                raise LmcompressError(f"{path} does not hold what the index says; build the store again")
            self._handles[number] = handle
        return self._handles[number]

    def __repr__(self) -> str:
        meta = self.meta
        kept = f"top {meta.top_k} of {meta.vocab_size}" if meta.top_k else f"{meta.vocab_size}"
        return f"TeacherStore({str(self.folder)!r}, rows={meta.rows}, logits={kept} per {meta.logits}, {self.features})"


@dataclass(frozen=True)
class _Field:
    """How one tensor of a row is laid out; 0 in ``shape`` stands for the row's length."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def per_row(self) -> bool:
        return 0 not in self.shape

    def sizes(self, lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        power = self.shape.count(0)
        return lengths.astype(np.int64) ** power * math.prod(size for size in self.shape if size)


def _fields_of(meta: StoreMeta) -> dict[str, _Field]:
    dtype = _DTYPES[meta.dtype]
    start = (0,) if meta.logits == "token" else ()
    if meta.top_k is not None:
        kept = (*start, meta.top_k)
        fields = {
            "values": _Field(kept, dtype),
            "indices": _Field(kept, torch.int32),
            "logsumexp": _Field((*start, 1), torch.float32),
        }
    else:
        fields = {"logits": _Field((*start, meta.vocab_size), dtype)}
        if dtype == torch.float16:
            fields["offsets"] = _Field((*start, 1), torch.float32)
    return fields | {_name((info.kind, info.layer)): _Field(info.shape, dtype) for info in meta.features}


class _Writer:
    """Collects rows, writes a shard whenever there is enough, and the index and ``meta.json`` at the end."""

    def __init__(self, folder: Path, dtype: StoredDtype, top_k: int | None) -> None:
        self.folder, self.dtype, self.top_k = folder, dtype, top_k
        self.seen: dict[bytes, None] = {}  # in the order of the rows
        self.lengths: list[int] = []
        self.shard_of: list[int] = []
        self.shards: list[FileInfo] = []
        self.of_rows: dict[str, list[Tensor]] = {}
        self.pending: dict[str, list[Tensor]] = {}
        self.pending_bytes = 0
        self.logits: Literal["row", "token"] = "row"
        self.vocab_size = 0
        self.features: tuple[FeatureInfo, ...] = ()

    def add(self, keys: Sequence[bytes], mask: Tensor, logits: Tensor, features: Features) -> None:
        self._describe(mask, logits, features)
        tensors = self._logit_fields(logits) | {_name(f): self._rounded(t, _name(f)) for f, t in features.items()}
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        axes = {_name(feature): _LENGTH_AXES[feature[0]] for feature in features}
        for row, key in enumerate(keys):
            if key in self.seen:
                continue
            self.seen[key] = None
            kept = mask[row].nonzero().squeeze(-1)
            self.lengths.append(len(kept))
            self.shard_of.append(len(self.shards))
            for name, tensor in tensors.items():
                if name not in axes and self.logits == "row":
                    self.of_rows.setdefault(name, []).append(tensor[row].clone())
                    continue
                value = tensor[row]
                for axis in axes.get(name, (0,)):
                    value = value.index_select(axis, kept)
                self.pending.setdefault(name, []).append(value.reshape(-1))
                self.pending_bytes += value.numel() * value.element_size()
            if self.pending_bytes >= SHARD_BYTES:
                self._flush()

    def finish(self, teacher: PreTrainedModel) -> None:
        if not self.seen:
            raise LmcompressError("the dataset has no rows; a store needs at least one")
        if self.pending:
            self._flush()
        keys = b"".join(self.seen)
        index = {
            "keys": torch.from_numpy(np.frombuffer(keys, dtype=np.uint8).copy()).view(-1, KEY_BYTES),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "shards": torch.tensor(self.shard_of, dtype=torch.int32),
        } | {name: torch.stack(rows) for name, rows in self.of_rows.items()}
        save_file(index, self.folder / INDEX_FILE)
        meta = StoreMeta(
            teacher=teacher_fingerprint(teacher),
            teacher_name=str(teacher.config.name_or_path or "")[:1024],
            layers=int(teacher.config.num_hidden_layers),
            rows=len(self.seen),
            logits=self.logits,
            vocab_size=self.vocab_size,
            top_k=self.top_k,
            dtype=self.dtype,
            features=self.features,
            index=_file_info(self.folder / INDEX_FILE),
            shards=tuple(self.shards),
        )
        (self.folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n")

    def _describe(self, mask: Tensor, logits: Tensor, features: Features) -> None:
        """What the answers look like: set by the first batch, the same in all others."""
        length = mask.shape[1]
        if logits.dim() not in (2, 3) or (logits.dim() == 3 and logits.shape[1] != length):
            raise LmcompressError(
                "a store takes logits of shape (batch, classes) or (batch, length, classes); for inputs of shape "
                f"{tuple(mask.shape)} the teacher gave {tuple(logits.shape)}"
            )
        infos = []
        for (kind, layer), tensor in features.items():
            shape = list(tensor.shape[1:])
            for axis in _LENGTH_AXES[kind]:
                if axis >= len(shape) or shape[axis] != length:
                    raise LmcompressError(
                        f"axis {axis + 1} of the feature {kind} {layer} must be the length {length}, got the shape "
                        f"{tuple(tensor.shape)}"
                    )
                shape[axis] = 0
            infos.append(FeatureInfo(kind=kind, layer=layer, shape=tuple(shape)))
        kind_of_logits: Literal["row", "token"] = "row" if logits.dim() == 2 else "token"
        found = (kind_of_logits, logits.shape[-1], tuple(infos))
        if not self.vocab_size:
            if self.top_k is not None and not 1 <= self.top_k <= logits.shape[-1]:
                raise LmcompressError(
                    f"top_k must be from 1 to the teacher's {logits.shape[-1]} logits, got {self.top_k}"
                )
            self.logits, self.vocab_size, self.features = found
        elif found != (self.logits, self.vocab_size, self.features):
            raise LmcompressError(
                f"the teacher's answers change shape between batches: logits of {self.vocab_size} per {self.logits}, "
                f"then {found[1]} per {found[0]}"
            )
        greatest = logits.detach().float().amax(-1).cpu()
        if not (greatest if logits.dim() == 2 else greatest[mask]).isfinite().all():
            raise LmcompressError(
                "the teacher's logits are NaN or infinite; a teacher that has diverged cannot teach. Check it on "
                "its own, in float32"
            )

    def _logit_fields(self, logits: Tensor) -> dict[str, Tensor]:
        logits = logits.detach().float()
        if self.top_k is not None:
            total = logits.logsumexp(-1, keepdim=True)
            top = logits.topk(self.top_k, dim=-1)
            values = (top.values - total).clamp(min=_LOWEST).to(_DTYPES[self.dtype])
            return {"values": values, "indices": top.indices.int(), "logsumexp": total}
        if self.dtype == "float32":
            return {"logits": logits}
        greatest = logits.amax(-1, keepdim=True)
        return {"logits": (logits - greatest).clamp(min=_LOWEST).half(), "offsets": greatest}

    def _rounded(self, feature: Tensor, name: str) -> Tensor:
        rounded = feature.detach().to(_DTYPES[self.dtype])
        if self.dtype == "float16" and (rounded.isinf() & feature.isfinite()).any():
            raise LmcompressError(
                f"the feature {name} reaches {float(feature.abs().max()):.3g}, more than float16 holds; "
                "build the store with dtype='float32'"
            )
        return rounded

    def _flush(self) -> None:
        path = self.folder / _shard_name(len(self.shards))
        save_file({name: torch.cat(rows) for name, rows in self.pending.items()}, path)
        self.shards.append(_file_info(path))
        self.pending, self.pending_bytes = {}, 0


def _lasting(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}


def _teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
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


def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().cpu()


def _keys(inputs: Mapping[str, Tensor]) -> list[bytes]:
    mask = _mask(inputs).numpy()
    columns = [inputs[name].cpu().numpy().astype("<i8") for name in ("input_ids", "token_type_ids") if name in inputs]
    keys = []
    for row, valid in enumerate(mask):
        digest = hashlib.blake2b(int(valid.sum()).to_bytes(8, "little"), digest_size=KEY_BYTES)
        for column in columns:
            digest.update(column[row][valid].tobytes())
        keys.append(digest.digest())
    return keys


def _name(feature: Feature) -> str:
    return f"{feature[0]}.{feature[1]}"


def _at(shape: Sequence[int], kept: Tensor) -> tuple[Any, ...]:
    """Where one row's tokens go in the padded tensor: ``kept`` on every axis that is a length."""
    axes = [axis for axis, size in enumerate(shape) if size == 0]
    places: list[Any] = [slice(None)] * len(shape)
    for number, axis in enumerate(axes):
        places[axis] = kept.view(-1, *[1] * (len(axes) - 1 - number))
    return tuple(places)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _files(meta: StoreMeta) -> list[tuple[str, FileInfo]]:
    return [(INDEX_FILE, meta.index), *((_shard_name(i), info) for i, info in enumerate(meta.shards))]


def _file_info(path: Path) -> FileInfo:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileInfo(size_bytes=path.stat().st_size, blake2b=digest.hexdigest())


def _open_checked(path: Path, info: FileInfo) -> Any:
    try:
        if _file_info(path) == info:
            return safe_open(path, framework="pt")
        reason = "its hash is not the one in meta.json"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise LmcompressError(f"the teacher store is damaged: {path}: {reason}; build it again")


def _read_meta(folder: Path) -> StoreMeta:
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


__all__ = [
    "FORMAT_VERSION",
    "Extract",
    "FeatureInfo",
    "FileInfo",
    "Stored",
    "StoredDtype",
    "StoreMeta",
    "TeacherStore",
    "TopK",
    "expand_top_k",
    "row_keys",
    "teacher_fingerprint",
]
