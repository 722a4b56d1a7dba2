"""Models in processes of their own, which are built there, called like models, and timed there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging

from lmcompress.errors import LmcompressError
from lmcompress.evaluation.timing import Sample, Timed, timed

Mode = Literal["forward", "generate"]

_SECONDS_TO_LEAVE = 10.0


class ModelLike(Protocol):
    """What can be timed: a Transformers model, an exported one, a :class:`Worker`."""

    @property
    def config(self) -> PretrainedConfig:
        """Configuration with the size of the vocabulary and the number of positions."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def eval(self) -> Any:
        """Switch to evaluation mode."""
        ...

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The model's outputs.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``.
        """
        ...


class Worker:
    """A model in a process of its own, so that the threads and the memory of its runtime disturb no other model.

    The process is spawned: a script that makes workers must be safe to import (``if __name__ == "__main__":``). Use it
    as a context manager, or :meth:`close` it.

    Args:
        build: function at the top level of a module that returns the model, see :class:`ModelLike`.
        *arguments: arguments of ``build``; they are pickled.
        threads: torch's threads in the process; default: torch's own.

    Raises:
        ImportError: If ``build`` raised one: a runtime is not installed.
        LmcompressError: If the process died, or ``build`` failed.
    """

    def __init__(self, build: Callable[..., Any], *arguments: Any, threads: int | None = None) -> None:
        context = get_context("spawn")
        self._name = getattr(build, "__name__", str(build))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.config, self._generates = self._receive()
        except BaseException:
            self.close()
            raise
        self.device = torch.device("cpu")

    def eval(self) -> Worker:
        """The worker: models are in evaluation mode there."""
        return self

    def can_generate(self) -> bool:
        """Whether the model generates text."""
        return bool(self._generates)

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the model.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``.

        Returns:
            All outputs that are tensors.
        """
        outputs = self._ask("call", input_ids.numpy(), attention_mask.numpy())
        return tuple(torch.from_numpy(array) for array in outputs)

    def prepare(self, ids: Tensor, mode: Mode, new_tokens: int) -> Timed:
        """Hand over inputs.

        Args:
            ids: ``(batch, length)`` int64.
            mode: what a call does, see :func:`model_call`.
            new_tokens: tokens that ``generate`` makes.

        Returns:
            A call on those inputs, timed in the worker's process. It holds until the next ``prepare``.
        """
        self._ask("prepare", ids.numpy(), mode, new_tokens)
        return lambda: Sample(*self._ask("time"))

    def close(self) -> None:
        """End the process."""
        with suppress(OSError, ValueError):
            self._pipe.send(None)
        self._process.join(_SECONDS_TO_LEAVE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> Worker:
        """The worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def _ask(self, *message: Any) -> Any:
        try:
            self._pipe.send(message)
        except OSError:
            # the reply says why
            pass
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, reply = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_SECONDS_TO_LEAVE)
            raise LmcompressError(
                f"the process of {self._name} must answer, it ended with exit code {self._process.exitcode}; "
                "was there too little memory?"
            ) from None
        if not failed:
            return reply
        missing, text = reply
        if missing:
            raise ImportError(text)
        raise LmcompressError(f"{self._name} failed in its own process: {text}")


def model_call(model: Any, ids: Tensor, mode: Mode, new_tokens: int) -> Callable[[], Any]:
    """A call of a model on ids without padding.

    Args:
        model: see :class:`ModelLike`.
        ids: ``(batch, length)`` int64.
        mode: ``forward``, or ``generate`` for greedy generation.
        new_tokens: tokens that ``generate`` makes, no fewer.
    """
    mask = torch.ones_like(ids)
    if mode == "forward":
        # a decoder that reads an encoder gets a text as long as the encoder's
        more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
        return lambda: model(input_ids=ids, attention_mask=mask, **more)
    # min_new_tokens: a model that ends early would look fast
    return lambda: model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )


def timed_call(model: Any, ids: Tensor, mode: Mode, new_tokens: int) -> Timed:
    """As :func:`model_call`, timed: in the process of a :class:`Worker`, otherwise in this one.

    Args:
        model: see :class:`ModelLike`.
        ids: ``(batch, length)`` int64.
        mode: ``forward`` or ``generate``.
        new_tokens: tokens that ``generate`` makes.
    """
    if isinstance(model, Worker):
        return model.prepare(ids.cpu(), mode, new_tokens)
    return timed(model_call(model, ids, mode, new_tokens), ids.device)


def can_generate(model: Any) -> bool:
    """Whether a model generates text.

    Args:
        model: see :class:`ModelLike`.
    """
    asked = getattr(model, "can_generate", None)
    return bool(asked()) if asked is not None else False


def _serve(pipe: Connection, threads: int | None, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The life of a worker's process: build, then answer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    model: Any = None
    call: Timed | None = None

    def answer(message: tuple[Any, ...]) -> Any:
        nonlocal model, call
        match message:
            case ("build",):
                model = build(*arguments)
                model.eval()
                return model.config, can_generate(model)
            case ("call", ids, mask):
                with torch.inference_mode():
                    outputs = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
                return [tensor.float().numpy() for tensor in _tensors(outputs)]
            case ("prepare", ids, mode, new_tokens):
                call = timed_call(model, torch.from_numpy(ids), mode, new_tokens)
                return None
            case ("time",) if call is not None:
                with torch.inference_mode():
                    return tuple(call())
        raise LmcompressError(f"no such message: {message[0]!r}")

    message: tuple[Any, ...] | None = ("build",)
    while message is not None:
        try:
            reply = (False, answer(message))
        except Exception as error:  # whatever a runtime raises is told to the process that asked
            text = " ".join(str(error).split())
            missing = isinstance(error, ImportError)
            reply = (True, (missing, text if missing else f"{type(error).__name__}: {text}"))
        try:
            pipe.send(reply)
            message = pipe.recv()
        except (EOFError, OSError):
            return


def _tensors(outputs: Any) -> list[Tensor]:
    values = outputs.values() if hasattr(outputs, "values") and not isinstance(outputs, Tensor) else outputs
    values = (values,) if isinstance(values, Tensor) else values
    return [value for value in values if isinstance(value, Tensor)]


def modules_of(model: Any) -> list[nn.Module]:
    """All modules of a model; none where a runtime other than torch computes it.

    Args:
        model: see :class:`ModelLike`.
    """
    return list(model.modules()) if isinstance(model, nn.Module) else []
