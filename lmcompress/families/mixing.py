"""Attention replaced by a local mixing."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from lmcompress.families.base import Block
from lmcompress.families.narrow import Derived, derive
from lmcompress.nn.separable import SeparableMixing


class _Mixing(Derived):
    """The forward pass of attention that mixes neighbours; added to its class by :func:`mix_locally`."""

    prefix = "Mixing"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        module = cast(Any, self)
        given = dict(zip(_argument_names(self.stock), args, strict=False)) | kwargs
        mixing: SeparableMixing = module.get_submodule(module.mixing_path)
        values, length = mixing.values(hidden_states), hidden_states.shape[1]
        past, cache = 0, given.get("past_key_values")
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            past = cache.get_seq_length(module.layer_idx)
            split = values.unflatten(-1, (-1, module.mixing_head_size)).transpose(1, 2)
            # a cache needs keys: one number for each token
            split = cache.update(split.new_zeros(len(split), 1, length, 1), split, module.layer_idx)[1]
            values = split[:, :, : past + length].transpose(1, 2).flatten(2)
        valid = _visible(given.get("attention_mask"), past + length)
        answer = mixing.mix(values, valid, length)
        for name in module.mixing_tail:
            answer = module.get_submodule(name)(answer)
        weights = None
        if module.config._attn_implementation == "eager":
            weights = hidden_states.new_zeros(len(hidden_states), 0, length, past + length)
        return answer, weights


def mix_locally(block: Block, mixing: SeparableMixing) -> None:
    """Replace a block's attention by mixing: its value projection becomes ``mixing``, queries and keys are removed.

    Args:
        block: modified in place; the class of its attention becomes a subclass of it.
        mixing: holds the projection of the values.
    """
    family, attention = block.family, cast(Any, block.get("attention"))
    size = block.head_size
    place = "qkv" if family.qkv else "value"
    block.replace(place, mixing)
    for part in ("query", "key"):
        if path := getattr(family, part):
            parent, _, name = path.rpartition(".")
            delattr(block.module.get_submodule(parent), name)
    derive(attention, _Mixing)
    attention.mixing_path = getattr(family, place).removeprefix(f"{family.attention}.")
    attention.mixing_tail, attention.mixing_head_size = family.attention_tail, size


def mixing_of(block: Block) -> SeparableMixing | None:
    """The replacement of a block's attention, or None if it attends.

    Args:
        block: a block of any model.
    """
    if not isinstance(block.get("attention"), _Mixing):
        return None
    module = block.get("qkv" if block.family.qkv else "value")
    assert isinstance(module, SeparableMixing)
    return module


def _visible(mask: Tensor | None, seen: int) -> Tensor | None:
    """Positions that are not padding, ``(batch, seen)``, from any mask that attention receives."""
    if mask is None:
        return None
    if mask.dim() == 4:
        # the last query attends to all that is not padding, whether or not the model is causal
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    return mask[:, :seen].bool()


@cache
def _argument_names(stock: type) -> tuple[str, ...]:
    return tuple(inspect.signature(stock.forward).parameters)[2:]  # type: ignore[attr-defined]
