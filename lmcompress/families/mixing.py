"""Attention replaced by a local mixing."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.families.base import Block
from lmcompress.families.coupled import ATTENTION_READERS
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
        past, cache = 0, given.get("past_key_values", given.get("layer_past"))
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            past = cache.get_seq_length(module.layer_idx)
            split = values.unflatten(-1, (-1, module.mixing_head_size)).transpose(1, 2)
            # a cache needs keys: one number for each token
            split = cache.update(split.new_zeros(split.shape[0], 1, length, 1), split, module.layer_idx)[1]
            values = split[:, :, : past + length].transpose(1, 2).flatten(2)
        else:
            _refuse_packed(given.get("attention_mask"), given.get("position_ids"))
        valid = _visible(given.get("attention_mask"), past + length)
        answer = mixing.mix(values, valid, length)
        for name in module.mixing_tail:
            answer = module.get_submodule(name)(answer)
        weights = None
        if module.config._attn_implementation == "eager":
            weights = hidden_states.new_zeros(hidden_states.shape[0], 0, length, past + length)
        return answer, weights


def mix_locally(block: Block, mixing: SeparableMixing) -> None:
    """Replace a block's attention by mixing: its value projection becomes ``mixing``, queries and keys are removed.

    Args:
        block: modified in place; the class of its attention becomes a subclass of it.
        mixing: holds the projection of the values.
    """
    family, attention = block.family, cast(Any, block.get("attention"))
    size, place = block.head_size, block.value_part
    block.replace(place, mixing)
    for part in ATTENTION_READERS:
        if part != place and (path := getattr(family, part)):
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
    if not block.has("attention") or not isinstance(block.get("attention"), _Mixing):
        return None
    module = block.get(block.value_part)
    return module if isinstance(module, SeparableMixing) else None


def _visible(mask: Tensor | None, seen: int) -> Tensor | None:
    """Positions that are not padding, ``(batch, seen)``, from any mask that attention receives."""
    if mask is None:
        return None
    if mask.dim() == 4:
        # the last query attends to all that is not padding, whether or not the model is causal
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    return mask[:, :seen].bool()


def _refuse_packed(mask: Tensor | None, positions: Tensor | None) -> None:
    """Refuse documents packed into a row: a kernel would reach from one into the next."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if mask is None or mask.dim() != 4 or positions is None or recorded:
        return
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    # positions of padding may start again too, but no token sees it
    hidden = seen.any(dim=1) & ~seen[:, -1]
    if bool((positions.diff(dim=-1) != 1).any() & hidden.any()):
        raise LmcompressError(
            "a block that mixes neighbours (lmcompress.students.separate) cannot keep documents apart that are packed "
            "into one row by position_ids: use a collator that pads"
        )


@cache
def _argument_names(stock: type) -> tuple[str, ...]:
    return tuple(inspect.signature(stock.forward).parameters)[2:]  # type: ignore[attr-defined]
