"""Sources of a teacher's outputs: a model that runs alongside the student, or a store on disk."""

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
    """A teacher's outputs for one batch.

    Attributes:
        logits: for heads with few outputs, else None.
        chunk: for causal models: maps row numbers of ``(batch × length)`` to a function that returns their logits in
            chunks.
        features: requested features.
    """

    logits: Tensor | None
    chunk: Callable[[Tensor], TeacherChunk] | None
    features: Features


class Teacher(Protocol):
    """A source of a teacher's outputs."""

    def resolve(self, kind: str, layer: int) -> Feature:
        """A feature with its layer counted from the start.

        Args:
            kind: kind of feature, such as ``"hidden"``.
            layer: negative counts from the end.

        Returns:
            ``(kind, layer)``.

        Raises:
            LmcompressError: If it is not available.
        """

    def shape_of(self, feature: Feature) -> tuple[int, ...]:
        """Shape of a feature for one row, 0 where a size is the row's length.

        Args:
            feature: resolved feature.

        Returns:
            The shape without the batch axis.
        """

    def prepare(self, features: Sequence[Feature], *, logits: bool, causal: bool, device: torch.device) -> None:
        """Called before training by each method that uses this teacher.

        Args:
            features: features that will be requested, with layers resolved.
            logits: whether logits will be requested.
            causal: whether the vocabulary's logits are needed in chunks.
            device: training device.
        """

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Outputs for one batch, without gradients.

        Args:
            batch: the whole batch, ``teacher_*`` columns included.
            autocast: creates the context in which a model runs.

        Returns:
            Logits, or a function that returns them in chunks, and the features.
        """

    def release(self) -> None:
        """Called after training: removes hooks."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, if there is one: student and teacher are checked for agreement against it."""


Teachers = Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel]
"""One teacher, or several."""


def teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a teacher: the columns ``teacher_*`` if there are any, else the student's.

    Args:
        batch: a collated batch.

    Returns:
        The inputs by name, without ``teacher_``.
    """
    own = {name.removeprefix(TEACHER_PREFIX): v for name, v in batch.items() if name.startswith(TEACHER_PREFIX)}
    return {name: v for name, v in (own or batch).items() if name not in ("labels", "task")}


class LiveTeacher:
    """A model that runs alongside the student, frozen and without dropout.

    Args:
        model: of any precision; before training it is put in evaluation mode and its gradients are switched off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._capture: Capture | None = None
        self._features: set[Feature] = set()
        self._logits = self._causal = False
        # the class's method: accelerate and hooks wrap the instance's
        self._accepted = set(inspect.signature(type(model).forward).parameters)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    def resolve(self, kind: str, layer: int) -> Feature:
        """A feature with its layer counted from the start; see :class:`Teacher`.

        Args:
            kind: kind of feature.
            layer: negative counts from the end.

        Returns:
            ``(kind, layer)``.
        """
        return resolve(self._model, kind, layer)

    def shape_of(self, feature: Feature) -> tuple[int, ...]:
        """Shape of a feature for one row; see :class:`Teacher`.

        Args:
            feature: resolved feature.

        Returns:
            The shape without the batch axis.
        """
        return shape_of(self._model, feature)

    def prepare(self, features: Sequence[Feature], *, logits: bool, causal: bool, device: torch.device) -> None:
        """Freeze the model, add hooks and move it to the device; see :class:`Teacher`.

        Args:
            features: resolved; several methods may use one teacher, each with its own features.
            logits: whether the head is needed.
            causal: whether logits are needed in chunks.
            device: training device; a model loaded in 8 or 4 bits stays where it is.
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
            autocast: creates the context of the forward pass.

        Returns:
            Logits, or a function that returns them in chunks, and the features.
        """
        assert self._capture is not None
        if self._model.training:
            # train() may have been called on it in the meantime
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
        """Remove the hooks; see :class:`Teacher`."""
        if self._capture is not None:
            self._capture.remove()
        self._capture, self._features, self._logits = None, set(), False


def load_teacher(
    path: str | Path, auto_class: Any, precision: Literal["float32", "bfloat16", "float16", "8bit", "4bit"] = "float32"
) -> PreTrainedModel:
    """A teacher from disk or the Hub, in the requested precision.

    Args:
        path: folder or name.
        auto_class: class such as ``AutoModelForSequenceClassification``.
        precision: ``8bit`` and ``4bit`` (NF4) use bitsandbytes: ``pip install "lmcompress[bnb]"``.

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
                f'a teacher in {precision} needs bitsandbytes: pip install "lmcompress[bnb]"; or use bfloat16'
            ) from error
        from transformers import BitsAndBytesConfig

        # heads of a few labels have no shape for 4-bit kernels, and cost nothing
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
