"""A model's blocks run one after another on calibration data, each on the output of those before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch, CalibrationData
from lmcompress.activations.hooks import valid_tokens
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of


class _Arrived(Exception):
    """Stops the forward pass once everything needed has been recorded."""


def calibration_batches(model: PreTrainedModel, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """Batches as the model takes them, on its device, without labels and without rows of padding only.

    Args:
        model: the model they are for.
        batches: ``input_ids`` or ``inputs_embeds``, usually with ``attention_mask``; iterated once.

    Returns:
        The batches; those without any token are dropped.

    Raises:
        LmcompressError: If there are no batches, none has a token that is not padding, or one has no input.
    """
    names = set(inspect.signature(model.forward).parameters) - {"labels", "use_cache"}
    return list(CalibrationData(model, (_inputs(batch, names) for batch in batches)))


def _inputs(batch: Batch, names: set[str]) -> Batch:
    inputs = {name: value for name, value in batch.items() if name in names}
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        raise LmcompressError(f"a batch must have input_ids or inputs_embeds, got {', '.join(batch) or 'nothing'}")
    return inputs


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Vectors of the tokens that are not padding; all vectors of a tensor that is not ``(rows, length, width)``.

    Args:
        x: ``(rows, length, width)``, or for example ``(rows, width)``, the input of a pooler.
        mask: ``(rows, length)``.

    Returns:
        ``(tokens, width)``.
    """
    return x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


@dataclass
class _Call:
    """How the model calls its blocks for one batch, and the input of the next block."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor


Take = Callable[[Tensor, Tensor], None]
"""``(input of a module, mask (rows, length))``."""


class Walk:
    """Runs a model's blocks one at a time on calibration data.

    Args:
        model: in evaluation mode, without gradients.
        batches: from :func:`calibration_batches`.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self._blocks = [block.module for block in anatomy_of(model).blocks]
        self._cacheless = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._calls: list[_Call] = []

    def last_hidden(self) -> list[Tensor]:
        """The last block's output for each batch in a forward pass of the whole model: ``(tokens, width)``."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(without_padding(_hidden(output), mask))

        handle = self._blocks[-1].register_forward_hook(hook)
        try:
            for batch in self.batches:
                mask = valid_tokens(batch)
                self.model(**batch, **self._cacheless)
        finally:
            handle.remove()
        return found

    def start(self) -> None:
        """Return to the first block: its input is the current output of the embeddings."""
        self._calls = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split(args, kwargs)
            self._calls.append(_Call(hidden, rest, named, mask))
            raise _Arrived

        handle = self._blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for batch in self.batches:
                mask = valid_tokens(batch)
                try:
                    self.model(**batch, **self._cacheless)
                except _Arrived:
                    pass
        finally:
            handle.remove()

    def look(self, index: int, takes: Mapping[nn.Module, Take], masked: Callable[[Tensor], None] | None = None) -> None:
        """Run one block over all data and pass on the inputs of the given modules.

        Args:
            index: number of the block; the walk stays in front of it.
            takes: receivers by module.
            masked: called with the mask of each batch first.
        """
        for call in self._calls:
            if masked is not None:
                masked(call.mask)
            with _listening(takes, call.mask):
                self._run(index, call)

    def step(self, index: int) -> None:
        """Advance past a block: its current output is the next block's input.

        Args:
            index: number of the block.
        """
        for call in self._calls:
            call.hidden = self._run(index, call)

    def hidden(self) -> list[Tensor]:
        """The input of the next block, ``(tokens, width)`` for each batch."""
        return [without_padding(call.hidden, call.mask) for call in self._calls]

    def look_outside(self, takes: Mapping[nn.Module, Take], masked: Callable[[Tensor], None] | None = None) -> None:
        """Run the whole model over all data and pass on the inputs of the given modules.

        Args:
            takes: receivers by module, inside or outside of the blocks.
            masked: called with the mask of each batch first.
        """
        for batch in self.batches:
            mask = valid_tokens(batch)
            if masked is not None:
                masked(mask)
            with _listening(takes, mask):
                self.model(**batch, **self._cacheless)

    def _run(self, index: int, call: _Call) -> Tensor:
        block = self._blocks[index]
        with _unchunked(block):
            return _hidden(block(call.hidden, *call.args, **call.kwargs))


@contextmanager
def _listening(takes: Mapping[nn.Module, Take], mask: Tensor) -> Iterator[None]:
    left = set(takes)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        takes[module](args[0].detach(), mask)
        left.discard(module)
        if not left:
            raise _Arrived

    handles = [module.register_forward_pre_hook(hook) for module in takes]
    try:
        yield
    except _Arrived:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unchunked(block: nn.Module) -> Iterator[None]:
    """BERT can run its feed-forward network in chunks, which masks cannot follow; the result is the same."""
    chunked = cast(Any, block)
    size = getattr(chunked, "chunk_size_feed_forward", 0)
    if not size:
        yield
        return
    chunked.chunk_size_feed_forward = 0
    try:
        yield
    finally:
        chunked.chunk_size_feed_forward = size


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
