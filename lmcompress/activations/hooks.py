"""Hooks that pass a model's activations to functions, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError

H = TypeVar("H", bound="Hooked")


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that the model's ``forward`` takes, without labels.

    Args:
        model: the model to call.
        batch: tensors by name.
    """
    names = set(inspect.signature(model.forward).parameters) - {"labels"}
    return {name: value for name, value in batch.items() if name in names}


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


class Hooked:
    """Has hooks on a model until :meth:`remove` is called, or a ``with`` block ends."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

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

    def on_input(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Pass on the input of a module.

        Args:
            module: called with one tensor ``(rows, length, width)``.
            take: receives it.
        """
        self._handles.append(module.register_forward_pre_hook(lambda _, args: take(args[0])))

    def on_output(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Pass on the output of a module.

        Args:
            module: returns one tensor.
            take: receives it.
        """
        self._handles.append(module.register_forward_hook(lambda _, args, output: take(output)))

    def on_block(self, module: nn.Module, take: Callable[[Tensor, Tensor], None]) -> None:
        """Pass on the input and the output of a block.

        Args:
            module: the block.
            take: receives both.
        """

        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            take(args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def tokens(self, tensor: Tensor) -> Tensor:
        """``(rows, length, ...)`` as ``(valid tokens, ...)``."""
        return tensor[self.mask]

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """One forward pass, without gradients.

        Args:
            batch: inputs on the model's device.
        """
        self.mask = valid_tokens(batch)
        with torch.no_grad():
            self.model(**model_inputs(self.model, batch))
