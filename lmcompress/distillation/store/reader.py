"""Reading a store: rows are found by their tokens, and padded like the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from lmcompress.activations.capture import Feature, Features, resolve
from lmcompress.activations.documents import refuse_packed
from lmcompress.checkpoint.saving import replaced_folder
from lmcompress.distillation.store import format as layout
from lmcompress.distillation.store.writer import Extract, StoreWriter
from lmcompress.errors import LmcompressError, nearest


@dataclass(frozen=True)
class TopK:
    """The largest logits of a teacher, as stored.

    Attributes:
        values: ``(..., k)`` float32, largest first.
        indices: ``(..., k)`` int64, their token ids.
        logsumexp: ``(...)`` float32, over the whole vocabulary.
        vocab_size: size of the vocabulary.
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
    """The stored outputs for one batch, padded like the batch.

    Attributes:
        logits: ``(batch, classes)`` or ``(batch, length, classes)`` float32; None if only the largest are stored.
        top_k: the largest logits, or None if all are stored. At padding they describe a uniform distribution.
        features: by kind and layer, float32, shaped as by :mod:`lmcompress.activations.capture`;
            zero wherever a length axis is at padding.
    """

    logits: Tensor | None
    top_k: TopK | None
    features: Features


def expand_top_k(values: Tensor, indices: Tensor, logsumexp: Tensor, vocab_size: int) -> Tensor:
    r"""Logits of the whole vocabulary from the largest ones.

    .. math:: z_v = Z + \log\frac{1 - \sum_{i \in K} e^{z_i - Z}}{V - k} \ (v \notin K), \quad Z = \log\sum_v e^{z_v}

    Stored tokens keep their exact probability at temperature 1; the rest is spread evenly over the
    others.

    Args:
        values: ``(..., k)`` stored logits.
        indices: ``(..., k)`` int, their token ids, without repetition.
        logsumexp: ``(...)`` over all logits, stored or not.
        vocab_size: V, at least k.

    Returns:
        ``(..., vocab_size)`` float32, whose logsumexp is ``logsumexp`` again.

    Raises:
        LmcompressError: If the shapes do not fit together.

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
    # rounding may leave zero or less; a floor keeps the rest finite, so that no loss multiplies 0 by infinity
    rest = (1 - (values - total).exp().sum(-1, keepdim=True)).clamp(min=1e-12)
    others = total + rest.log() - math.log(max(vocab_size - k, 1))
    logits = others.expand(*values.shape[:-1], vocab_size).clone()
    return logits.scatter_(-1, indices.long(), values)


class TeacherStore:
    """A teacher's outputs on disk; created by :meth:`build` or :meth:`open`.

    Shards are memory-mapped and only the rows of a batch are read. Several processes can read one store.

    Args:
        folder: folder of the store.
        meta: its metadata.
    """

    def __init__(self, folder: Path, meta: layout.StoreMeta) -> None:
        self.folder = folder
        self.meta = meta
        self._fields = layout.fields_of(meta)
        self._handles: dict[int, Any] = {}
        index = self._read_index()
        self._rows: dict[bytes, int] = {key.tobytes(): row for row, key in enumerate(index["keys"].numpy())}
        self._lengths = index["lengths"].numpy()
        self._of_rows = {name: index[name] for name in self._fields if self._fields[name].per_row}
        shards = index["shards"].numpy()
        self._shards = shards
        starts = np.searchsorted(shards, np.arange(len(meta.shards) + 1)) if len(meta.shards) else np.zeros(1, int)
        # offset of each row within its shard, for every concatenated field
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
        """The stored features."""
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
        dtype: layout.StoredDtype = "float16",
        batch_size: int = 32,
        progress: bool = True,
    ) -> TeacherStore:
        """Run the teacher over the data once and write its outputs.

        With several processes, let one build and the others wait and :meth:`open`.

        ``float16`` logits are written as differences from the row's largest (``top_k``: from the logsumexp), which is
        stored in float32, so that the error is relative to what a softmax depends on, not to an arbitrary offset.

        Note:
            Rows are identified by their tokens without padding. A teacher that does not derive its positions from
            the mask (GPT-2 with padding on the left) has outputs that depend on the padding; those for the padding used
            here are stored.

        Args:
            folder: new, empty, or a store, which is replaced as a whole once everything is written.
            teacher: on the device where it runs; temporarily in evaluation mode, without gradients.
            dataset: a map-style dataset for ``collator``; rows with the same tokens are stored once.
            collator: list of rows → batch; must treat tokens as the one used in training, without randomness.
            extract: runs the teacher: :func:`lmcompress.activations.capture.extract`.
            top_k: number of logits to store per vector; default: all (GPT-2: 100 kB per token).
            features: kinds and layers, negative layers counted from the end.
            dtype: dtype of the numbers on disk.
            batch_size: rows per forward pass of the teacher.
            progress: whether to show a bar.

        Returns:
            The store, open.

        Raises:
            LmcompressError: If there is no data, a feature is unknown, ``top_k`` is out of range, an output is NaN or
                does not fit ``float16``, ``folder`` holds something else, or the disk is full; previous contents are
                kept.
        """
        if dtype not in layout.DTYPES:
            raise LmcompressError(f"unknown dtype {dtype!r}{nearest(str(dtype), layout.DTYPES)}")
        if batch_size < 1:
            raise LmcompressError(f"batch_size must be at least 1, got {batch_size}")
        wanted = list(dict.fromkeys(resolve(teacher, kind, layer) for kind, layer in features))
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=collator)
        # the progress bar of transformers, which its verbosity settings switch off
        batches = logging.tqdm(loader, desc="teacher", disable=not progress)
        takes = set(inspect.signature(teacher.forward).parameters)
        training = teacher.training
        teacher.eval()
        try:
            with replaced_folder(Path(folder), marker=layout.META_FILE) as temporary, torch.no_grad():
                writer = StoreWriter(temporary, dtype, top_k)
                for batch in batches:
                    inputs = layout.store_inputs(batch)
                    refuse_packed(teacher, batch)
                    on_device = {k: v.to(teacher.device) for k, v in inputs.items() if k in takes}
                    logits, captured = extract(teacher, on_device, wanted)
                    answers = {feature: captured[feature] for feature in wanted}
                    writer.add(layout.keys_of(inputs), layout.token_mask(inputs), logits, answers)
                writer.finish(teacher)
        finally:
            teacher.train(training)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, *, teacher: PreTrainedModel | None = None) -> TeacherStore:
        """Open a store, refusing it if it is damaged or from another teacher.

        Sizes of all files and the index's hash are checked now, the hash of each shard when it is first read.

        Args:
            folder: folder written by :meth:`build`.
            teacher: the teacher it must come from.

        Returns:
            The store; only its index is in memory.

        Raises:
            LmcompressError: If there is no store, or it is damaged, of a later version, or from another teacher.
        """
        folder = Path(folder)
        meta = layout.read_meta(folder)
        for name, info in layout.files_of(meta):
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != info.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {info.size_bytes}"
                raise LmcompressError(f"the teacher store {folder} is damaged: {name} {found}; build it again")
        if teacher is not None and (found := layout.teacher_fingerprint(teacher)) != meta.teacher:
            raise LmcompressError(
                f"the store {folder} was made by another teacher: it has the hash {meta.teacher[:12]} "
                f"({meta.teacher_name or 'no name'}), this one {found[:12]} "
                f"({teacher.config.name_or_path or 'no name'}); weights or config differ. "
                "Build the store again, or load the teacher that made it"
            )
        return cls(folder, meta)

    def lookup(self, batch: Mapping[str, Any], features: Iterable[Feature] = ()) -> Stored:
        """The teacher's outputs for the rows of a batch.

        Args:
            batch: batch for :func:`row_keys`; padded on either side, to any length.
            features: stored features to return; negative layers count from the end.

        Returns:
            Logits and features on the batch's device, padded to the batch's length.

        Raises:
            LmcompressError: If a feature or a row is not in the store, or a shard is damaged.
        """
        wanted = [self._resolve(kind, layer) for kind, layer in features]
        inputs = layout.store_inputs(batch)
        device, mask = inputs["input_ids"].device, layout.token_mask(inputs)
        rows = self._find(layout.keys_of(inputs))
        logits = top_k = None
        if self.meta.top_k is None:
            logits = self._get("logits", rows, mask)
            if "offsets" in self._fields:
                logits = logits + self._get("offsets", rows, mask)
            logits = logits.to(device)
        else:
            top_k = self._top_k(rows, mask, device)
        return Stored(
            logits, top_k, {feature: self._get(layout.field_name(feature), rows, mask).to(device) for feature in wanted}
        )

    def missing(self, batch: Mapping[str, Any]) -> int:
        """The number of a batch's rows that are not in the store.

        Args:
            batch: batch as for :meth:`lookup`.
        """
        return sum(key not in self._rows for key in layout.keys_of(layout.store_inputs(batch)))

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
                "rows): the data, the tokenizer or the maximum length have changed, or the collator changes tokens "
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
        path, meta = self.folder / layout.INDEX_FILE, self.meta
        with layout.open_checked(path, meta.index) as handle:
            index = {name: handle.get_tensor(name) for name in handle.keys()}
        expected = {"keys": (meta.rows, layout.KEY_BYTES), "lengths": (meta.rows,), "shards": (meta.rows,)}
        expected |= {name: (meta.rows, *field.shape) for name, field in self._fields.items() if field.per_row}
        if {name: tuple(tensor.shape) for name, tensor in index.items()} != expected:
            raise LmcompressError(f"{path} does not hold what meta.json says; build the store again")
        shards, last = index["shards"].numpy(), max(len(meta.shards) - 1, 0)
        ordered = bool((np.diff(shards) >= 0).all()) and shards[0] >= 0 and shards[-1] <= last
        if not ordered or int(index["lengths"].min()) < 0:
            raise LmcompressError(f"{path} has invalid row or shard numbers; build the store again")
        return index

    def _shard(self, number: int) -> Any:
        if number not in self._handles:
            path = self.folder / layout.shard_name(number)
            handle = layout.open_checked(path, self.meta.shards[number])
            sizes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
            if sizes != {name: (int(total[number]),) for name, total in self._totals.items()}:
                raise LmcompressError(f"{path} does not hold what the index says; build the store again")
            self._handles[number] = handle
        return self._handles[number]

    def __repr__(self) -> str:
        meta = self.meta
        kept = f"top {meta.top_k} of {meta.vocab_size}" if meta.top_k else f"{meta.vocab_size}"
        return f"TeacherStore({str(self.folder)!r}, rows={meta.rows}, logits={kept} per {meta.logits}, {self.features})"


def _at(shape: Sequence[int], kept: Tensor) -> tuple[Any, ...]:
    """The positions of one row's tokens in the padded tensor: ``kept`` on every axis that is a length."""
    axes = [axis for axis, size in enumerate(shape) if size == 0]
    places: list[Any] = [slice(None)] * len(shape)
    for number, axis in enumerate(axes):
        places[axis] = kept.view(-1, *[1] * (len(axes) - 1 - number))
    return tuple(places)
