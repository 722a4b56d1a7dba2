"""Hooks that pass a model's activations to functions, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, is_described, with_decoder_inputs
from lmcompress.families.mixing import mixing_of
from lmcompress.families.refusal import refuse_unproven
from lmcompress.nn.listening import Heard, listen

H = TypeVar("H", bound="Hooked")


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that the model's ``forward`` takes, without labels.

    Args:
        model: the model to call.
        batch: tensors by name; the inputs of a decoder that reads an encoder are made from labels if they are missing.

    Raises:
        LmcompressError: If the model has an encoder and a decoder, and there are neither labels nor inputs of the
            decoder.
    """
    names = set(inspect.signature(model.forward).parameters) - {"labels"}
    return {name: value for name, value in with_decoder_inputs(model, batch).items() if name in names}


def valid_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """``(rows, length)`` bool, True for tokens that are not padding; several rows per example one after another.

    Args:
        batch: inputs; without ``attention_mask`` all tokens are valid.

    Raises:
        LmcompressError: If there is neither a mask nor ``input_ids`` or ``inputs_embeds``.
    """
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
    elif "input_ids" in batch:
        mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    elif "inputs_embeds" in batch:
        mask = torch.ones_like(batch["inputs_embeds"][..., 0], dtype=torch.bool)
    else:
        raise LmcompressError(f"a batch must have input_ids or attention_mask, got {', '.join(batch) or 'nothing'}")
    return mask.reshape(-1, mask.shape[-1])


def valid_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """``(rows, length)`` bool, True for tokens of a decoder that are not padding.

    Args:
        batch: inputs of a model with an encoder and a decoder; without ``decoder_attention_mask`` all tokens of
            ``decoder_input_ids`` are valid, except those without a label where there are labels.

    Raises:
        LmcompressError: If there is no input of a decoder.
    """
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    if "labels" in batch and batch["labels"].dim() == 2:
        return batch["labels"] != -100
    if "decoder_input_ids" not in batch:
        raise LmcompressError(f"a batch must have decoder_input_ids or labels, got {', '.join(batch) or 'nothing'}")
    return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)


def valid_outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """``(rows, length)`` bool, True for tokens that a model's head has outputs for and that are not padding.

    Args:
        model: of a known family; the head of one with an encoder and a decoder reads the decoder.
        batch: its inputs.

    Raises:
        LmcompressError: If these tokens are not among them.
    """
    return valid_targets(batch) if anatomy_of(model).reads_encoder else valid_tokens(batch)


class Removable(Protocol):
    """A hook or a listener."""

    def remove(self) -> None:
        """Take it away."""


def hear(block: Block, take: Callable[[Heard], None]) -> Removable:
    """Listen to the attention of a block, also of one without heads.

    Args:
        block: a block of any model.
        take: receives the operands of its attention, in every forward pass.

    Returns:
        A handle to stop.

    Raises:
        LmcompressError: If the block mixes neighbours, or its attention cannot be heard.
    """
    attention = block.get("attention")
    if block.model is not None:
        refuse_unproven(block.model, "attention_features", "attention_distillation", instead="use hidden states")
    if mixing_of(block) is not None:
        raise LmcompressError(
            "a block that mixes neighbours in place of attention (lmcompress.students.separate) has no scores, "
            "probabilities, queries, keys or values: use hidden states"
        )
    if block.num_heads:
        return listen(attention, take)

    def none(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        empty = states[..., :0].unflatten(-1, (0, block.head_size)).transpose(1, 2)
        take(Heard(empty, empty, empty, 1.0))

    return attention.register_forward_pre_hook(none, with_kwargs=True)


class Hooked:
    """Has hooks on a model until :meth:`remove` is called, or a ``with`` block ends."""

    def __init__(self) -> None:
        self._handles: list[Removable] = []

    def remove(self) -> None:
        """Take the hooks away. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class Taps(Hooked):
    """Hooks that hand what flows through a model to functions, padding taken out.

    Args:
        model: the model whose modules are observed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self.model = model
        self._masks = [self.mask, self.mask]
        blocks = anatomy_of(model).blocks if is_described(model) else []
        self._of_decoder = {module for block in blocks if block.looks_back for module in block.module.modules()}

    def _turn_to(self, module: nn.Module) -> None:
        """Take the mask of the tokens that a module is given: those of a decoder, or of all other parts."""
        self.mask = self._masks[module in self._of_decoder]

    def on_input(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Pass on the input of a module.

        Args:
            module: called with one tensor ``(rows, length, width)`` or ``(rows * length, width)``.
            take: receives it.
        """

        def hook(_: nn.Module, args: Any) -> None:
            self._turn_to(module)
            take(args[0])

        self._handles.append(module.register_forward_pre_hook(hook))

    def on_output(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Pass on the output of a module.

        Args:
            module: returns one tensor.
            take: receives it.
        """

        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            self._turn_to(module)
            take(output)

        self._handles.append(module.register_forward_hook(hook))

    def on_attention(self, block: Block, take: Callable[[Heard], None]) -> None:
        """Pass on the operands of a block's attention.

        Args:
            block: with or without heads.
            take: receives them.
        """

        def heard(one: Heard) -> None:
            self._turn_to(block.module)
            take(one)

        self._handles.append(hear(block, heard))

    def on_block(self, module: nn.Module, take: Callable[[Tensor, Tensor], None]) -> None:
        """Pass on the input and the output of a block.

        Args:
            module: the block.
            take: receives both.
        """

        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            self._turn_to(module)
            take(args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def tokens(self, tensor: Tensor) -> Tensor:
        """``(rows, length, ...)``, or ``(rows * length, ...)`` as in OPT, as ``(valid tokens, ...)``."""
        flat = tensor.shape[:2] != self.mask.shape
        return tensor[self.mask.flatten() if flat else self.mask]

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """One forward pass, without gradients.

        Args:
            batch: inputs on the model's device.
        """
        given = with_decoder_inputs(self.model, batch)
        self.mask = valid_tokens(batch)
        self._masks = [self.mask, valid_targets(given) if self._of_decoder else self.mask]
        with torch.no_grad():
            self.model(**model_inputs(self.model, given))
