"""A model's blocks run one after another on calibration data, each on the output of those before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.batches import batches_for
from lmcompress.activations.calibration import Batch, CalibrationData
from lmcompress.activations.hooks import model_inputs, valid_targets, valid_tokens
from lmcompress.errors import LmcompressError
from lmcompress.families import is_described, outline_of
from lmcompress.families.coupled import CROSS
from lmcompress.numerics.padding import stated


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
    return list(CalibrationData(model, [_inputs(model, batch) for batch in batches_for(model, batches)]))


def _inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    inputs = model_inputs(model, batch)
    inputs.pop("use_cache", None)
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        raise LmcompressError(f"a batch must have input_ids or inputs_embeds, got {', '.join(batch) or 'nothing'}")
    return inputs


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Vectors of the tokens that are not padding; all vectors of a tensor that has not one for each token.

    Args:
        x: ``(rows, length, width)``, or ``(rows * length, width)`` as in OPT's feed-forward network; or for example
            ``(rows, width)``, the input of a pooler.
        mask: ``(rows, length)``.

    Returns:
        ``(tokens, width)``.
    """
    if x.shape[:-1] == (mask.numel(),):
        return x[mask.flatten()]
    return x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


@dataclass
class _Call:
    """How the model calls the blocks of a stack for one batch, and the input of the next block.

    Attributes:
        hidden: the input of the next block.
        others: the other arguments, of all blocks alike, or of each if masks and positions differ between them.
        mask: ``(rows, length)``, True for real tokens.
        encoder: in a decoder, the output of the encoder that it reads, and its mask.
    """

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: Tensor
    encoder: tuple[Tensor, Tensor] | None = None


Take = Callable[[Tensor, Tensor], None]
"""``(input of a module, mask (rows, length))``."""


class Walk:
    """Runs a model's blocks one at a time on calibration data, those of an encoder before those of its decoder.

    Args:
        model: in evaluation mode, without gradients.
        batches: from :func:`calibration_batches`.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model, batches
        anatomy = outline_of(model)
        self._blocks = [block.module for block in anatomy.blocks]
        self._starts = anatomy.starts
        alike = is_described(model) and not anatomy.family.per_layer and not anatomy.family.shared_bias
        self._each_differs = not alike
        # keys and values of the encoder's tokens
        self._of_encoder = {block.get(part) for block in anatomy.blocks for part in CROSS[1:3] if block.has(part)}
        self._cacheless = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._calls: list[_Call] = []
        self._stack = 0

    def last_hidden(self, count: int) -> list[Tensor]:
        """The last block's output in a forward pass of the whole model: ``(tokens, width)`` for each batch.

        Args:
            count: number of batches, from the first.
        """
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(without_padding(_hidden(output), mask))

        handle = self._blocks[-1].register_forward_hook(hook)
        try:
            for batch in self.batches[:count]:
                mask = self._mask(batch, len(self._starts) - 1)
                self.model(**batch, **self._cacheless)
        finally:
            handle.remove()
        return found

    def start(self) -> None:
        """Return to the first block: its input is the current output of the embeddings."""
        self._enter(0)

    def _enter(self, stack: int) -> None:
        """Go to the first block of a stack; a decoder reads the current output of its encoder."""
        self._calls, self._stack = [], stack
        ends = (*self._starts[1:], len(self._blocks))
        blocks = self._blocks[self._starts[stack] : ends[stack]]
        # blocks that are all of one kind are called alike: the first call is enough
        count = len(blocks) if self._each_differs else 1

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, positional, named = _split(args, kwargs)
            if module is blocks[0]:
                read = _encoder_of(args, kwargs, valid_tokens(batch)) if stack else None
                self._calls.append(_Call(hidden, [], mask, read))
            call = self._calls[-1]
            call.others.append((positional, named))
            if len(call.others) == count:
                raise _Arrived

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks[:count]]
        try:
            for batch in self.batches:
                mask = self._mask(batch, stack)
                try:
                    self.model(**batch, **self._cacheless)
                except _Arrived:
                    pass
        finally:
            for handle in handles:
                handle.remove()

    def look(self, index: int, takes: Mapping[nn.Module, Take]) -> None:
        """Run one block over all data and pass on the inputs of the given modules.

        Args:
            index: number of the block; the walk stays in front of it.
            takes: receivers by module.
        """
        for call in self._calls:
            with self._listening(takes, call.mask, None if call.encoder is None else call.encoder[1]):
                self._run(index, call)

    def step(self, index: int) -> None:
        """Advance past a block: its current output is the next block's input.

        After the last block of an encoder comes the first of its decoder.

        Args:
            index: number of the block.
        """
        if index + 1 in self._starts:
            self._enter(self._stack + 1)
            return
        for call in self._calls:
            call.hidden = self._run(index, call)

    def hidden(self) -> list[Tensor]:
        """The input of the next block, ``(tokens, width)`` for each batch."""
        return [without_padding(call.hidden, call.mask) for call in self._calls]

    def look_outside(self, takes: Mapping[nn.Module, Take]) -> None:
        """Run the whole model over all data and pass on the inputs of the given modules.

        Args:
            takes: receivers by module, inside or outside of the blocks.
        """
        for batch in self.batches:
            with self._listening(takes, self._mask(batch, len(self._starts) - 1), valid_tokens(batch)):
                self.model(**batch, **self._cacheless)

    def _mask(self, batch: Mapping[str, Tensor], stack: int) -> Tensor:
        """The tokens of the encoder, of the decoder, or of the only stack that are not padding."""
        return valid_targets(batch) if stack else valid_tokens(batch)

    def _run(self, index: int, call: _Call) -> Tensor:
        block = self._blocks[index]
        args, kwargs = call.others[index - self._starts[self._stack] if len(call.others) > 1 else 0]
        with _unchunked(block), stated(call.mask, call.encoder):
            return _hidden(block(call.hidden, *args, **kwargs))

    @contextmanager
    def _listening(self, takes: Mapping[nn.Module, Take], mask: Tensor, of_encoder: Tensor | None) -> Iterator[None]:
        left = set(takes)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            read = of_encoder if of_encoder is not None and module in self._of_encoder else mask
            takes[module](args[0].detach(), read)
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


def _encoder_of(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """The output of the encoder among the arguments of a decoder's block, and its mask."""
    # passed by position or by name; masks and biases have four dimensions
    given = (kwargs.get("encoder_hidden_states"), *args[1:])
    states = next((value for value in given if isinstance(value, Tensor) and value.dim() == 3), None)
    return None if states is None else (states, mask)


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
