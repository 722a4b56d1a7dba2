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

from lmcompress.activations.capture import Capture, Feature, Features, resolve, shape_of
from lmcompress.distillation.vocabulary import TeacherChunk
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of

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

    def resolve(self, kind: str, layer: int) -> Feature:
        """A feature with its layer counted from the beginning.

        Args:
            kind: such as ``"hidden"``.
            layer: negative counts from the end.

        Returns:
            ``(kind, layer)``.

        Raises:
            LmcompressError: If it cannot be given.
        """

    def shape_of(self, feature: Feature) -> tuple[int, ...]:
        """Sizes of a feature of one row, 0 where a size is the row's length.

        Args:
            feature: resolved.

        Returns:
            The shape without the batch axis.
        """

    def prepare(self, features: Sequence[Feature], *, logits: bool, causal: bool, device: torch.device) -> None:
        """Called before training by each method that asks this teacher.

        Args:
            features: that will be asked for, with layers resolved.
            logits: whether logits will be asked for.
            causal: whether the vocabulary's logits are wanted in chunks.
            device: where training happens.
        """

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Answers for one batch; nothing has a gradient.

        Args:
            batch: the whole batch, ``teacher_*`` columns included.
            autocast: makes the context in which a model runs.

        Returns:
            Logits, or what gives them in chunks, and the features.
        """

    def release(self) -> None:
        """Called after training: take hooks away."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, where there is one: what student and teacher must agree on is checked against it."""


Teachers = Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel]
"""One source of answers, or several."""


def teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher is called with: the columns ``teacher_*`` where there are any, else the student's.

    Args:
        batch: a collated batch.

    Returns:
        The inputs by name, without ``teacher_``.
    """
    own = {name.removeprefix(TEACHER_PREFIX): v for name, v in batch.items() if name.startswith(TEACHER_PREFIX)}
    return {name: v for name, v in (own or batch).items() if name not in ("labels", "task")}


class LiveTeacher:
    """A model that runs beside the student, frozen and without dropout.

    Args:
        model: of any precision; before training it is put to evaluation mode and its gradients are switched off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._capture: Capture | None = None
        self._features: set[Feature] = set()
        self._logits = self._causal = False
        # of the class: accelerate and hooks wrap the instance's
        self._accepted = set(inspect.signature(type(model).forward).parameters)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    def resolve(self, kind: str, layer: int) -> Feature:
        """A feature with its layer counted from the beginning; see :class:`Teacher`.

        Args:
            kind: of feature.
            layer: negative counts from the end.

        Returns:
            ``(kind, layer)``.
        """
        return resolve(self._model, kind, layer)

    def shape_of(self, feature: Feature) -> tuple[int, ...]:
        """Sizes of a feature of one row; see :class:`Teacher`.

        Args:
            feature: resolved.

        Returns:
            The shape without the batch axis.
        """
        return shape_of(self._model, feature)

    def prepare(self, features: Sequence[Feature], *, logits: bool, causal: bool, device: torch.device) -> None:
        """Freeze the model, put hooks on it and move it to the device; see :class:`Teacher`.

        Args:
            features: resolved; several methods may ask one teacher, each for its own.
            logits: whether the head is needed.
            causal: whether chunks are wanted.
            device: a model that was loaded in 8 or 4 bits stays where it is.
        """
        if self._capture is not None:
            self._capture.remove()
        self._model.eval().requires_grad_(False)
        self._features.update(features)
        self._capture = Capture(self._model, self._features)
        self._logits = self._logits or logits
        self._causal = causal
        if not getattr(self._model, "is_loaded_in_8bit", False) and not getattr(
            self._model, "is_loaded_in_4bit", False
        ):
            self._model.to(device)

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Run the model; see :class:`Teacher`.

        Args:
            batch: the whole batch.
            autocast: context for the forward pass.

        Returns:
            Logits, or what gives them in chunks, and the features.
        """
        assert self._capture is not None
        if self._model.training:
            # somebody called train() on it in the meantime
            self._model.eval()
        inputs = {name: v for name, v in teacher_inputs(batch).items() if name in self._accepted}
        with torch.no_grad(), autocast():
            if not self._logits:
                self._model.base_model(**inputs)
                return Answers(None, None, self._capture.take(inputs.get("attention_mask")))
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

    def release(self) -> None:
        """Take the hooks away; see :class:`Teacher`."""
        if self._capture is not None:
            self._capture.remove()
        self._capture, self._features, self._logits = None, set(), False


def load_teacher(
    path: str | Path, auto_class: Any, precision: Literal["float32", "bfloat16", "float16", "8bit", "4bit"] = "float32"
) -> PreTrainedModel:
    """A teacher from disk or the Hub, in the precision wanted.

    Args:
        path: folder or name.
        auto_class: such as ``AutoModelForSequenceClassification``.
        precision: ``8bit`` and ``4bit`` (NF4) go through bitsandbytes: ``pip install "lmcompress[bnb]"``.

    Returns:
        The model.

    Raises:
        LmcompressError: If bitsandbytes is missing, or the precision is unknown.
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
