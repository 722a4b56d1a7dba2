"""Hooks by which a model states the padding of every forward pass, from its ``attention_mask``.

A range that is computed from a whole tensor must not depend on what stands where there is no token: the same text would
get another answer in another batch. A mask of four dimensions, as attention takes it, hides padding from every query.
Where no mask is given, or one of another shape, nothing is known to be padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.numerics.graphs import recording
from lmcompress.numerics.padding import Tokens, begin, current, end

_HANDLES = "_padding_handles"
# of the modules that state padding
_NUMBERS = count(1)
# what is added to the scores of hidden tokens is less, whatever the dtype that it is made for
_HIDDEN = -10_000.0
# the function that Transformers gives modules when gradient checkpointing is enabled
_CHECKPOINT = "_gradient_checkpointing_func"


def follow_padding(model: PreTrainedModel, cross: Iterable[nn.Module] = ()) -> None:
    """Let a model state which tokens are padding while it runs; safe to call twice.

    Args:
        model: it and its base model get hooks, which copies of it have too; of a model with an encoder and a decoder,
            these two.
        cross: the modules of a decoder that attend to an encoder.
    """
    for module in cross:
        if _HANDLES not in module.__dict__:
            module.__dict__[_HANDLES] = (
                module.register_forward_pre_hook(_begin_cross),
                module.register_forward_hook(_end, always_call=True),
            )
    for module in _roots(model):
        if _HANDLES in module.__dict__:
            continue
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        first = _begin_decoder if _reads_encoder(model) and module is model.get_decoder() else _begin
        module.__dict__[_HANDLES] = (
            module.register_forward_pre_hook(partial(first, names, next(_NUMBERS)), with_kwargs=True),
            module.register_forward_hook(_end, always_call=True),
        )


def release_padding(model: PreTrainedModel) -> None:
    """Remove what :func:`follow_padding` added; safe to call twice.

    Args:
        model: the model.
    """
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        checkpoint = module.__dict__.get(_CHECKPOINT)
        if isinstance(checkpoint, _Carrying):
            module.__dict__[_CHECKPOINT] = checkpoint.checkpoint


class _Carrying:
    """Gradient checkpointing that runs a part again, in the backward pass, with the padding of the first time."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(partial(_within, current(), function), *args, **kwargs)


def _within(tokens: Tokens | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    begin(tokens)
    try:
        return function(*args, **kwargs)
    finally:
        end()


def _roots(model: PreTrainedModel) -> list[nn.Module]:
    if _reads_encoder(model):
        return [model, model.get_encoder(), model.get_decoder()]
    # some models arrange the batch anew for their base model, such as those for multiple choice
    return [model] if model.base_model is model else [model, model.base_model]


def _reads_encoder(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _begin(
    names: tuple[str, ...], number: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    _carry(module)
    begin(_tokens({**dict(zip(names, args, strict=False)), **kwargs}), number)


def _begin_decoder(
    names: tuple[str, ...], number: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Before a decoder that reads an encoder: its own tokens, and those of the encoder for the attention to it."""
    _carry(module)
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
    own = {name: value for name, value in inputs.items() if not name.startswith("encoder_")}
    tokens = _tokens(own)
    if isinstance(states, Tensor) and isinstance(mask, Tensor):
        seen = _tokens({"attention_mask": mask, "inputs_embeds": states})
        if seen is not None or tokens is not None:
            read = own["input_ids"] if own.get("input_ids") is not None else own["inputs_embeds"]
            now = read.new_ones(read.shape[:2], dtype=torch.bool)
            of_encoder = mask.new_ones(states.shape[:2], dtype=torch.bool) if seen is None else seen.keys
            tokens = (Tokens(now, now) if tokens is None else tokens)._replace(encoder=(states, of_encoder))
    begin(tokens, number)


def _carry(module: nn.Module) -> None:
    """Where gradient checkpointing will run parts again, let it do so with the padding of the first time."""
    if module.training and _checkpoints(module):
        for part in module.modules():
            checkpoint = part.__dict__.get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _Carrying):
                part.__dict__[_CHECKPOINT] = _Carrying(checkpoint)


def _begin_cross(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before attention to an encoder, whose keys and values are of the encoder's tokens."""
    tokens = current()
    if tokens is not None and tokens.encoder is not None:
        source, keys = tokens.encoder
        tokens = Tokens(tokens.now, keys, source=source)
    begin(tokens)


def _end(module: nn.Module, args: Any, output: Any) -> None:
    end()


def _checkpoints(module: nn.Module) -> bool:
    # renamed in transformers 5.2x, where the old name warns
    new = "is_activation_checkpointing"
    return bool(getattr(module, new if hasattr(type(module), new) else "is_gradient_checkpointing", False))


def _tokens(inputs: Mapping[str, Any]) -> Tokens | None:
    if "decoder_input_ids" in inputs:
        # of a model with an encoder and a decoder, only a head is outside of both
        inputs = {
            "attention_mask": inputs.get("decoder_attention_mask"),
            "input_ids": inputs.get("decoder_input_ids"),
            "inputs_embeds": inputs.get("decoder_inputs_embeds"),
        }
    mask, read = inputs.get("attention_mask"), inputs.get("input_ids")
    read = inputs.get("inputs_embeds") if read is None else read
    if not (isinstance(mask, Tensor) and mask.dim() in (2, 4) and isinstance(read, Tensor) and read.dim() > 1):
        return None
    if mask.dim() == 4:
        mask = (mask if mask.dtype == torch.bool else mask > _HIDDEN).any(dim=2).any(dim=1)
    # a second sequence, with a mask of its own, may have the same length
    if inputs.get("encoder_hidden_states") is not None:
        return None
    mask, length = mask.bool(), read.shape[1]
    # asked only where the host need not wait, and where the answer does not stay in a graph
    graph = recording() or torch.compiler.is_compiling()
    if mask.device.type == "cpu" and not graph and bool(mask.all()):
        return None
    # a mask without any token says nothing
    mask = mask | ~mask.any()
    now = mask if mask.shape[1] == length else mask[:, -length:]
    return Tokens(now | ~now.any(), mask)
