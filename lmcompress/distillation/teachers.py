"""Where a teacher's answers come from: a model that runs beside the student, or a store on disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.anatomy import anatomy_of
from lmcompress.distillation.capture import Capture, Feature, Features
from lmcompress.distillation.store import TeacherStore, expand_top_k
from lmcompress.distillation.vocabulary import TeacherChunk
from lmcompress.errors import LmcompressError

TEACHER_PREFIX = "teacher_"
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Answers:
    """What a teacher says of one batch.

    Attributes:
        logits: for heads whose logits are small, else None.
        chunk: for causal models, given the numbers of the rows of ``(batch × length)`` wanted: their logits by chunks.
        features: as asked for.
    """

    logits: Tensor | None
    chunk: Callable[[Tensor], TeacherChunk] | None
    features: Features


class Teacher(Protocol):
    """A source of answers."""

    def prepare(self, features: Sequence[Feature], *, causal: bool, device: torch.device) -> None:
        """Called once before training.

        Args:
            features: that will be asked for, with layers resolved.
            causal: whether the vocabulary's logits are wanted in chunks.
            device: where training happens.

        Raises:
            LmcompressError: a feature cannot be given.
        """

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Answers for one batch; nothing has a gradient.

        Args:
            batch: the whole batch, ``teacher_*`` columns included.
            autocast: makes the context in which a model runs.
        """

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, where there is one: what student and teacher must agree on is checked against it."""


def teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher is called with: the columns ``teacher_*`` where there are any, else the student's.

    Args:
        batch: a collated batch.
    """
    own = {name.removeprefix(TEACHER_PREFIX): v for name, v in batch.items() if name.startswith(TEACHER_PREFIX)}
    return own or {name: v for name, v in batch.items() if name not in ("labels", "task")}


class LiveTeacher:
    """A model that runs beside the student, frozen and without dropout.

    Args:
        model: of any precision; it is put to evaluation mode and its gradients are switched off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval().requires_grad_(False)
        self._capture: Capture | None = None
        self._causal = False
        self._accepted = set(inspect.signature(model.forward).parameters)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    def prepare(self, features: Sequence[Feature], *, causal: bool, device: torch.device) -> None:
        """Put hooks on the model and move it to the device; see :class:`Teacher`.

        Args:
            features: resolved.
            causal: whether chunks are wanted.
            device: a model that was loaded in 8 or 4 bits stays where it is.
        """
        if self._capture is not None:
            self._capture.remove()
        self._capture = Capture(self._model, features)
        self._causal = causal
        if not getattr(self._model, "is_loaded_in_8bit", False) and not getattr(self._model, "is_loaded_in_4bit", False):
            self._model.to(device)

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Run the model; see :class:`Teacher`.

        Args:
            batch: the whole batch.
            autocast: context for the forward pass.
        """
        assert self._capture is not None
        inputs = {name: v for name, v in teacher_inputs(batch).items() if name in self._accepted}
        with torch.no_grad(), autocast():
            if not self._causal:
                return Answers(self._model(**inputs).logits, None, self._capture.take(inputs.get("attention_mask")))
            hidden = self._model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)
        head = anatomy_of(self._model).head
        assert head is not None

        def chunk(rows: Tensor) -> TeacherChunk:
            selected = hidden[rows]

            def logits(start: int, stop: int) -> Tensor:
                with torch.no_grad(), autocast():
                    return head(selected[start:stop].to(head.weight.dtype))

            return logits

        return Answers(None, chunk, self._capture.take(inputs.get("attention_mask")))


class StoredTeacher:
    """A teacher whose answers were written to disk before.

    Args:
        store: an opened store.
    """

    model = None

    def __init__(self, store: TeacherStore) -> None:
        self.store = store
        self._features: tuple[Feature, ...] = ()
        self._causal = False

    def prepare(self, features: Sequence[Feature], *, causal: bool, device: torch.device) -> None:
        """Check that the store has what will be asked for; see :class:`Teacher`.

        Args:
            features: resolved.
            causal: whether chunks are wanted.
            device: answers come on the batch's device.

        Raises:
            LmcompressError: the store lacks a feature.
        """
        missing = [feature for feature in features if feature not in self.store.features]
        if missing:
            raise LmcompressError(
                f"the teacher store has no {missing}, it has {list(self.store.features)}: build it anew with these features"
            )
        self._features, self._causal = tuple(features), causal

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Look the batch up; see :class:`Teacher`.

        Args:
            batch: the whole batch.
            autocast: not needed.
        """
        found = self.store.lookup(batch, self._features)
        if found.top_k is None:
            logits = found.logits
            assert logits is not None
            if not self._causal:
                return Answers(logits, None, found.features)
            flat = logits.flatten(0, 1)

            def full(rows: Tensor) -> TeacherChunk:
                selected = flat[rows]
                return lambda start, stop: selected[start:stop].float()

            return Answers(None, full, found.features)
        top = found.top_k
        if not self._causal:
            return Answers(top.logits(), None, found.features)
        values, indices, total = top.values.flatten(0, -2), top.indices.flatten(0, -2), top.logsumexp.flatten()

        def sparse(rows: Tensor) -> TeacherChunk:
            kept = values[rows], indices[rows], total[rows]

            def logits(start: int, stop: int) -> Tensor:
                return expand_top_k(*(part[start:stop] for part in kept), top.vocab_size)

            return logits

        return Answers(None, sparse, found.features)


def load_teacher(
    path: str | Path, auto_class: Any, precision: Literal["float32", "bfloat16", "float16", "8bit", "4bit"] = "float32"
) -> PreTrainedModel:
    """A teacher from disk or the Hub, in the precision wanted.

    Args:
        path: folder or name.
        auto_class: such as ``AutoModelForSequenceClassification``.
        precision: ``8bit`` and ``4bit`` (NF4) go through bitsandbytes: ``pip install "lmcompress[bnb]"``.

    Raises:
        LmcompressError: bitsandbytes is missing, or the precision is unknown.
    """
    if precision in ("8bit", "4bit"):
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise LmcompressError(
                f'a teacher in {precision} needs bitsandbytes: pip install "lmcompress[bnb]"; or ask for bfloat16'
            ) from error
        from transformers import BitsAndBytesConfig

        # heads of a few labels are no shape for 4-bit kernels, and cost nothing
        skip = ["classifier", "score", "lm_head", "pre_classifier"]
        quantized = BitsAndBytesConfig(
            load_in_8bit=precision == "8bit",
            load_in_4bit=precision == "4bit",
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=skip,
        )
        return auto_class.from_pretrained(path, quantization_config=quantized)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    if dtype is None:
        raise LmcompressError(f"precision must be float32, bfloat16, float16, 8bit or 4bit, got {precision!r}")
    return auto_class.from_pretrained(path, dtype=dtype)
