"""A teacher whose outputs were written to disk earlier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmcompress.activations.capture import Feature
from lmcompress.activations.documents import Documents, documents_in
from lmcompress.distillation.store.reader import TeacherStore, expand_top_k
from lmcompress.distillation.teachers import Answers, Autocast, teacher_inputs
from lmcompress.distillation.vocabulary import TeacherChunk
from lmcompress.errors import LmcompressError


class StoredTeacher:
    """A teacher whose outputs were written to disk earlier.

    Args:
        store: an opened store.
    """

    model = None

    def __init__(self, store: TeacherStore) -> None:
        self.store = store
        self._features: set[Feature] = set()
        self._causal = False
        self._users = 0

    def resolve(self, kind: str, layer: int | str) -> Feature:
        """A feature with its layer counted from the start; see :class:`Teacher`.

        Args:
            kind: kind of feature.
            layer: negative counts from the end.

        Returns:
            ``(kind, layer)``.

        Raises:
            LmcompressError: If the store lacks it, or the layer is named by its stack.
        """
        if isinstance(layer, str):
            raise LmcompressError(
                f"a teacher store has no layers by the name of their stack, got {layer!r}: count them, the decoder's "
                "after the encoder's"
            )
        feature = (kind, layer if layer >= 0 else self.store.meta.layers + 1 + layer)
        if feature not in self.store.features:
            there = ", ".join(f"{kind} {layer}" for kind, layer in self.store.features) or "no features"
            raise LmcompressError(
                f"the teacher store {self.store.folder} has no {kind} of layer {layer}, it has {there}: build it again "
                "with the features that are matched"
            )
        return feature

    def shape_of(self, feature: Feature) -> tuple[int, ...]:
        """Shape of a feature for one row; see :class:`Teacher`.

        Args:
            feature: resolved feature.

        Returns:
            The shape without the batch axis.
        """
        return {(info.kind, info.layer): info.shape for info in self.store.meta.features}[feature]

    def prepare(self, features: Sequence[Feature], *, logits: bool, causal: bool, device: torch.device) -> None:
        """Record what will be requested; see :class:`Teacher`.

        Args:
            features: resolved features.
            logits: unused, they are always stored.
            causal: whether logits are requested in chunks.
            device: unused, outputs are on the batch's device.
        """
        self._users += 1
        self._features.update(features)
        self._causal = causal

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Look the batch up; see :class:`Teacher`.

        Args:
            batch: the whole batch.
            autocast: unused.

        Returns:
            Logits, or a function that returns them in chunks, and the features.
        """
        documents = documents_in(teacher_inputs(batch)) if self.store.meta.logits == "token" else None
        if documents is not None:
            batch = documents.of_inputs(teacher_inputs(batch))
        found = self.store.lookup(batch, sorted(self._features))
        whole = _as_packed(documents)
        if found.logits is not None:
            logits = whole(found.logits)
            if not self._causal:
                return Answers(logits, None, found.features)
            flat = logits.flatten(0, 1)

            def full(rows: Tensor) -> TeacherChunk:
                selected = flat[rows]
                return lambda start, stop: selected[start:stop].float()

            return Answers(None, full, found.features)
        top = found.top_k
        if top is None:
            raise LmcompressError(f"the teacher store {self.store.folder} has no logits: build it again")
        if not self._causal:
            return Answers(whole(top.logits()), None, found.features)
        values, indices, total = (whole(part).flatten(0, 1) for part in (top.values, top.indices, top.logsumexp))

        def sparse(rows: Tensor) -> TeacherChunk:
            kept = values[rows], indices[rows], total[rows]

            def logits(start: int, stop: int) -> Tensor:
                chosen = [part[start:stop] for part in kept]
                return expand_top_k(chosen[0], chosen[1], chosen[2], top.vocab_size)

            return logits

        return Answers(None, sparse, found.features)

    def release(self) -> None:
        """Clear the record of what was requested, once all have released it; see :class:`Teacher`."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self._features.clear()


def _as_packed(documents: Documents | None) -> Callable[[Tensor], Tensor]:
    """Puts what was found for each document back to its place in the packed row."""
    return (lambda tensor: tensor) if documents is None else documents.packed
