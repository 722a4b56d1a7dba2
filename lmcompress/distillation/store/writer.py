"""Writing a store: the teacher runs once over the data, and its answers are laid end to end in shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from lmcompress.activations.capture import Feature, Features, resolve
from lmcompress.distillation.store.format import (
    DTYPES,
    INDEX_FILE,
    KEY_BYTES,
    META_FILE,
    FeatureInfo,
    FileInfo,
    StoredDtype,
    StoreMeta,
    field_name,
    file_info,
    keys_of,
    shard_name,
    store_inputs,
    teacher_fingerprint,
    token_mask,
)
from lmcompress.errors import LmcompressError, nearest
from lmcompress.model import replaced_folder

Extract = Callable[[PreTrainedModel, Mapping[str, Tensor], Sequence[Feature]], tuple[Tensor, Features]]
"""``(teacher, inputs, features) -> (logits, {feature: tensor})``, as :func:`capture.extract`."""


SHARD_BYTES = 256 << 20
# the least float16; lower logits have no probability left, and minus infinity would make losses NaN
_LOWEST = -65504.0
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


class StoreWriter:
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
        tensors = self._logit_fields(logits) | {
            field_name(f): self._rounded(t, field_name(f)) for f, t in features.items()
        }
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        axes = {field_name(feature): _LENGTH_AXES[feature[0]] for feature in features}
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
            index=file_info(self.folder / INDEX_FILE),
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
            values = (top.values - total).clamp(min=_LOWEST).to(DTYPES[self.dtype])
            return {"values": values, "indices": top.indices.int(), "logsumexp": total}
        if self.dtype == "float32":
            return {"logits": logits}
        greatest = logits.amax(-1, keepdim=True)
        return {"logits": (logits - greatest).clamp(min=_LOWEST).half(), "offsets": greatest}

    def _rounded(self, feature: Tensor, name: str) -> Tensor:
        rounded = feature.detach().to(DTYPES[self.dtype])
        if self.dtype == "float16" and (rounded.isinf() & feature.isfinite()).any():
            raise LmcompressError(
                f"the feature {name} reaches {float(feature.abs().max()):.3g}, more than float16 holds; "
                "build the store with dtype='float32'"
            )
        return rounded

    def _flush(self) -> None:
        path = self.folder / shard_name(len(self.shards))
        save_file({name: torch.cat(rows) for name, rows in self.pending.items()}, path)
        self.shards.append(file_info(path))
        self.pending, self.pending_bytes = {}, 0


def write_store(
    folder: Path,
    teacher: PreTrainedModel,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    *,
    extract: Extract,
    top_k: int | None,
    features: Sequence[Feature],
    dtype: StoredDtype,
    batch_size: int,
    progress: bool,
) -> None:
    """Run the teacher over the data and write its answers, as :meth:`TeacherStore.build` describes."""
    if dtype not in DTYPES:
        raise LmcompressError(f"unknown dtype {dtype!r}{nearest(str(dtype), DTYPES)}")
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
        with replaced_folder(folder, marker=META_FILE) as temporary, torch.no_grad():
            writer = StoreWriter(temporary, dtype, top_k)
            for batch in batches:
                inputs = store_inputs(batch)
                on_device = {k: v.to(teacher.device) for k, v in inputs.items() if k in takes}
                logits, captured = extract(teacher, on_device, wanted)
                answers = {feature: captured[feature] for feature in wanted}
                writer.add(keys_of(inputs), token_mask(inputs), logits, answers)
            writer.finish(teacher)
    finally:
        teacher.train(training)
