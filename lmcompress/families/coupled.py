"""Which rows and columns of a block's matrices each head and neuron owns: the one table that cutting and scoring read.

This module depends only on torch: the self-loading format carries its source text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

ATTENTION_READERS, FFN_READERS = ("query", "key", "value", "qkv"), ("ffn_in", "ffn_gate")
"""The matrices that read the input of self-attention, and of the feed-forward network."""

CROSS = ("cross_query", "cross_key", "cross_value", "cross_out")
"""The matrices of a decoder's attention to an encoder: queries of its own stream, keys and values of the encoder's."""

STAGES = (
    ATTENTION_READERS,
    ("attention_out",),
    ("cross_query",),
    ("cross_key", "cross_value"),
    ("cross_out",),
    FFN_READERS,
    ("ffn_out",),
)
"""The matrices of a block in the order in which they are computed; those of one stage read the same tensor."""

BLOCK_PARTS = tuple(part for stage in STAGES for part in stage)
"""The matrices of a block."""

READ_STREAM = (*ATTENTION_READERS, *CROSS[:3], *FFN_READERS)
WRITE_STREAM = ("attention_out", "cross_out", "ffn_out")
"""The parts of a block that read a residual stream, its own or the encoder's, and those that write its own."""

ROLES = ("query", "key", "value")
"""What the projections of attention compute, whether they are one matrix each or one together."""


def stage_of(part: str) -> int | None:
    """The number of the stage that a matrix of a block belongs to; None for other parts.

    Args:
        part: the family's name of a matrix.
    """
    return next((number for number, stage in enumerate(STAGES) if part in stage), None)


class Coupled(NamedTuple):
    """A matrix in which every unit of a kind owns rows (they feed it) or columns (they read it).

    Attributes:
        part: the family's name of the matrix.
        side: ``in`` if units own rows, ``out`` if they own columns.
        sections: the axis has so many sections side by side, in each of which every unit owns so many neighbours.
    """

    part: str
    side: str
    sections: tuple[int, ...]

    def width(self, units: int) -> int:
        """Length of the axis.

        Args:
            units: number of units.
        """
        return units * sum(self.sections)

    def places(self, units: int, keep: Tensor) -> Tensor:
        """Positions on the axis that belong to some of the units.

        Args:
            units: number of units that the matrix has.
            keep: ``(kept,)`` int64, their numbers.

        Returns:
            int64, in the order of the units within each section.
        """
        found, start = [], 0
        for size in self.sections:
            found.append((start + keep[:, None] * size + torch.arange(size, device=keep.device)).flatten())
            start += units * size
        return torch.cat(found)

    def views(self, tensor: Tensor, units: int) -> list[Tensor]:
        """The parts of a tensor that each unit owns.

        Args:
            tensor: a matrix whose first axis is the one described, or a bias.
            units: number of units that it has.

        Returns:
            Views of the tensor whose first axis is the unit; together they cover it. One if sections are of one size.
        """
        if self.sections == (1,):
            return [tensor]
        if len(set(self.sections)) == 1 and len(self.sections) > 1:
            return [tensor.unflatten(0, (len(self.sections), units, self.sections[0])).transpose(0, 1)]
        parts = tensor.split([units * size for size in self.sections])
        return [part.unflatten(0, (units, size)) for part, size in zip(parts, self.sections, strict=True)]


def coupled_heads(paths: Mapping[str, Any], head_size: int, queries: int) -> list[Coupled]:
    """The matrices that are cut together with the heads of a block, in the order in which they are computed.

    Args:
        paths: the fields of a family: ``qkv`` and ``qkv_interleaved``.
        head_size: width of one query, key or value.
        queries: query heads that read one key.
    """
    width = head_size * queries
    if paths["qkv"]:
        sections = (width, head_size, head_size)
        first = [Coupled("qkv", "in", (sum(sections),) if paths["qkv_interleaved"] else sections)]
    else:
        first = [Coupled(role, "in", (width if role == "query" else head_size,)) for role in ROLES]
    return [*first, Coupled("attention_out", "out", (width,))]


def coupled_neurons(paths: Mapping[str, Any]) -> list[Coupled]:
    """The matrices that are cut together with the neurons of a block, in the order in which they are computed.

    Args:
        paths: the fields of a family: ``ffn_gate`` and ``ffn_in_copies``.
    """
    first = [Coupled("ffn_in", "in", (1,) * paths["ffn_in_copies"])]
    if paths["ffn_gate"]:
        first.append(Coupled("ffn_gate", "in", (1,)))
    return [*first, Coupled("ffn_out", "out", (1,))]


def rows_of(paths: Mapping[str, Any], role: str, heads: int, head_size: int, queries: int) -> tuple[str, Tensor]:
    """The matrix that computes queries, keys or values, and which of its rows do.

    Args:
        paths: the fields of a family, as for :func:`coupled_heads`.
        role: one of :data:`ROLES`.
        heads: number of key/value heads.
        head_size: width of one query, key or value.
        queries: query heads that read one key.

    Returns:
        The family's name of the matrix; its rows, int64, head after head.
    """
    sizes = {"query": queries * head_size, "key": head_size, "value": head_size}
    if not paths["qkv"]:
        return role, torch.arange(heads * sizes[role])
    before = sum(sizes[other] for other in ROLES[: ROLES.index(role)])
    if not paths["qkv_interleaved"]:
        return "qkv", heads * before + torch.arange(heads * sizes[role])
    starts = torch.arange(heads) * sum(sizes.values()) + before
    return "qkv", (starts[:, None] + torch.arange(sizes[role])).flatten()
