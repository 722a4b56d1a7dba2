"""Writing a store: the teacher runs once over the data, and its outputs are concatenated in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.capture import Feature, Features
from lmcompress.distillation.store import format as layout
from lmcompress.errors import LmcompressError

Extract = Callable[[PreTrainedModel, Mapping[str, Tensor], Sequence[Feature]], tuple[Tensor, Features]]
"""``(teacher, inputs, features) -> (logits, {feature: tensor})``, as :func:`capture.extract`."""


SHARD_BYTES = 256 << 20
# the lowest float16; lower logits have zero probability anyway, and minus infinity would make losses NaN
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
    """Collects rows, writes a shard whenever enough have come, and the index and ``meta.json`` at the end."""

    def __init__(self, folder: Path, dtype: layout.StoredDtype, top_k: int | None) -> None:
        self.folder, self.dtype, self.top_k = folder, dtype, top_k
        self.seen: dict[bytes, None] = {}  # in the order of the rows
        self.lengths: list[int] = []
        self.shard_of: list[int] = []
        self.shards: list[layout.FileInfo] = []
        self.of_rows: dict[str, list[Tensor]] = {}
        self.pending: dict[str, list[Tensor]] = {}
        self.pending_bytes = 0
        self.logits: Literal["row", "token"] = "row"
        self.vocab_size = 0
        self.features: tuple[layout.FeatureInfo, ...] = ()

    def add(self, keys: Sequence[bytes], mask: Tensor, logits: Tensor, features: Features) -> None:
        """Add the outputs for one batch; rows that are already stored are skipped."""
        self._describe(mask, logits, features)
        tensors = self._logit_fields(logits) | {
            layout.field_name(f): self._rounded(t, layout.field_name(f)) for f, t in features.items()
        }
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        axes = {layout.field_name(feature): _LENGTH_AXES[feature[0]] for feature in features}
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
        """Write the remaining rows, the index and ``meta.json``."""
        if not self.seen:
            raise LmcompressError("the dataset has no rows; a store needs at least one")
        if self.pending:
            self._flush()
        keys = b"".join(self.seen)
        index = {
            "keys": torch.from_numpy(np.frombuffer(keys, dtype=np.uint8).copy()).view(-1, layout.KEY_BYTES),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "shards": torch.tensor(self.shard_of, dtype=torch.int32),
        } | {name: torch.stack(rows) for name, rows in self.of_rows.items()}
        save_file(index, self.folder / layout.INDEX_FILE)
        meta = layout.StoreMeta(
            teacher=layout.teacher_fingerprint(teacher),
            teacher_name=str(teacher.config.name_or_path or "")[:1024],
            layers=int(teacher.config.num_hidden_layers),
            rows=len(self.seen),
            logits=self.logits,
            vocab_size=self.vocab_size,
            top_k=self.top_k,
            dtype=self.dtype,
            features=self.features,
            index=layout.file_info(self.folder / layout.INDEX_FILE),
            shards=tuple(self.shards),
        )
        (self.folder / layout.META_FILE).write_text(meta.model_dump_json(indent=2) + "\n")

    def _describe(self, mask: Tensor, logits: Tensor, features: Features) -> None:
        """The shape of the outputs: set by the first batch, the same in all others."""
        length = mask.shape[1]
        if logits.dim() not in (2, 3) or (logits.dim() == 3 and logits.shape[1] != length):
            raise LmcompressError(
                "a store takes logits of shape (batch, classes) or (batch, length, classes); for inputs of shape "
                f"{tuple(mask.shape)} the teacher returned {tuple(logits.shape)}"
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
            infos.append(layout.FeatureInfo(kind=kind, layer=layer, shape=tuple(shape)))
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
                f"the teacher's outputs change shape between batches: logits of {self.vocab_size} per {self.logits}, "
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
            values = (top.values - total).clamp(min=_LOWEST).to(layout.DTYPES[self.dtype])
            return {"values": values, "indices": top.indices.int(), "logsumexp": total}
        if self.dtype == "float32":
            return {"logits": logits}
        greatest = logits.amax(-1, keepdim=True)
        return {"logits": (logits - greatest).clamp(min=_LOWEST).half(), "offsets": greatest}

    def _rounded(self, feature: Tensor, name: str) -> Tensor:
        rounded = feature.detach().to(layout.DTYPES[self.dtype])
        if self.dtype == "float16" and (rounded.isinf() & feature.isfinite()).any():
            raise LmcompressError(
                f"the feature {name} reaches {float(feature.abs().max()):.3g}, more than float16 holds; "
                "build the store with dtype='float32'"
            )
        return rounded

    def _flush(self) -> None:
        path = self.folder / layout.shard_name(len(self.shards))
        save_file({name: torch.cat(rows) for name, rows in self.pending.items()}, path)
        self.shards.append(layout.file_info(path))
        self.pending, self.pending_bytes = {}, 0
