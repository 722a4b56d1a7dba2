"""Sources of a teacher's outputs: a model that runs alongside the student, or a store on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.capture import Capture, Feature, Features, resolve, shape_of
from lmcompress.activations.documents import documents_of
from lmcompress.data.text import TEACHER_PREFIX
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.distillation.borrowing import borrow, give_back, movable
from lmcompress.distillation.vocabulary import TeacherChunk
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, head_logits, inner_model, input_names, with_decoder_inputs

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

    def resolve(self, kind: str, layer: int | str) -> Feature:
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
        """Called after training, once for each call of :meth:`prepare`: removes hooks and restores the model."""

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
    return {name: v for name, v in (own or batch).items() if name not in ("labels", *SPAN_LABELS, "task")}


class LiveTeacher:
    """A model that runs alongside the student, frozen and without dropout.

    The model is borrowed: once all that use it have released it, its gradients, modes and device are what they were.

    Args:
        model: of any precision; before training it is put in evaluation mode and its gradients are switched off. It
            may be packed, compiled, or a ``PeftModel``: what runs is the model inside.
        tokenizer: the teacher's, if it is another one than the student's and logits are compared by the tokens that
            both share (``shared_tokens``).

    Raises:
        LmcompressError: If the model is no Transformers model, or a ``PeftModel`` that learns a prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        inner = inner_model(model)
        if not isinstance(inner, PreTrainedModel):
            raise LmcompressError(
                f"a teacher must be a PreTrainedModel, or a source such as StoredTeacher, got {type(inner).__name__}; "
                "load a path with load_teacher"
            )
        self._model: PreTrainedModel = inner
        self.tokenizer = tokenizer
        self._capture: Capture | None = None
        self._features: set[Feature] = set()
        self._users = 0
        self._logits = self._causal = False
        self._accepted = input_names(inner)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    def resolve(self, kind: str, layer: int | str) -> Feature:
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
        if not self._users:
            borrow(self._model)
        self._users += 1
        self._model.eval().requires_grad_(False)
        self._features.update(features)
        self._capture = Capture(self._model, self._features)
        self._logits = self._logits or logits
        self._causal = causal
        if movable(self._model):
            self._model.to(device)

    def answer(self, batch: Mapping[str, Any], autocast: Autocast) -> Answers:
        """Run the model; see :class:`Teacher`.

        Args:
            batch: the whole batch.
            autocast: creates the context of the forward pass.

        Returns:
            Logits, or a function that returns them in chunks, and the features.

        Raises:
            LmcompressError: If the teacher is not prepared.
        """
        if (capture := self._capture) is None:
            raise LmcompressError("a teacher must be prepared before it answers, it was not, or was released already")
        if self._model.training:
            # train() may have been called on it in the meantime
            self._model.eval()
        given = teacher_inputs(batch)
        if anatomy_of(self._model).reads_encoder:
            # made from the labels, which a teacher does not get
            labels = batch.get(f"{TEACHER_PREFIX}labels", batch.get("labels"))
            given = with_decoder_inputs(self._model, given | {"labels": labels})
            del given["labels"]
        inputs = {name: v for name, v in given.items() if name in self._accepted}
        documents = documents_of(self._model, inputs)
        if "use_cache" in self._accepted:
            # with a cache, which its config may ask for, packed documents would attend to each other
            inputs["use_cache"] = False
        head = anatomy_of(self._model).head if self._causal else None
        with torch.no_grad(), autocast():
            if not self._logits:
                self._model.base_model(**inputs)
                return Answers(None, None, capture.take(documents))
            if head is None:
                logits = logits_of(self._model(**inputs))
                chunk = _rows_of(logits.flatten(0, 1)) if self._causal else None
                return Answers(None if self._causal else logits, chunk, capture.take(documents))
            hidden = self._model.base_model(**inputs)[0].flatten(0, 1)
        return Answers(None, _chunks(head, hidden, autocast), capture.take(documents))

    def release(self) -> None:
        """Give the model back once as many have released it as prepared it; see :class:`Teacher`."""
        if not self._users:
            return
        self._users -= 1
        if self._users:
            return
        if self._capture is not None:
            self._capture.remove()
        self._capture, self._features, self._logits = None, set(), False
        give_back(self._model)


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model that was given no labels.

    Args:
        outputs: an output of Transformers, a dictionary, a tuple (``return_dict=False``), or the logits themselves.

    Raises:
        LmcompressError: If there are none.
    """
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    found = head_logits(outputs) if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, Tensor):
        raise LmcompressError(f"a teacher must return logits, got {type(outputs).__name__} without any")
    return found


def _chunks(head: nn.Module, hidden: Tensor, autocast: Autocast) -> Callable[[Tensor], TeacherChunk]:
    weight: Tensor = head.weight  # type: ignore[assignment]

    def chunk(rows: Tensor) -> TeacherChunk:
        selected = hidden[rows]

        def logits(start: int, stop: int) -> Tensor:
            with torch.no_grad(), autocast():
                return cast(Tensor, head(selected[start:stop].to(weight.dtype)))

        return logits

    return chunk


def _rows_of(logits: Tensor) -> Callable[[Tensor], TeacherChunk]:
    """The same from logits that are there already."""

    def chunk(rows: Tensor) -> TeacherChunk:
        selected = logits[rows]
        return lambda start, stop: selected[start:stop]

    return chunk


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
