"""Blocks that share their parameters."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import alike, record_layers
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.families.refusal import refuse_unproven
from lmcompress.families.tied_blocks import share_parameters
from lmcompress.students._choosing import check_ready
from lmcompress.students.report import Before, CompactReport


def share_layers(
    model: PreTrainedModel, *, every: int | None = None, values: Literal["first", "mean"] = "first"
) -> CompactReport:
    """Let runs of neighbouring blocks share their parameters: smaller, at the same speed.

    Each block is still computed, with the parameters of the first of its run. In later training these get the
    sum of the gradients of all of them. Do this last: matrices of shared blocks cannot be replaced or cut.

    Args:
        model: modified in place, including its config.
        every: number of blocks in a run; default: all, as in ALBERT.
        values: initial values of the shared parameters: the ``first`` block's, or the ``mean`` over the run, which is
            the least-squares fit to their values, though not to what they compute.

    Returns:
        The replacements and their cost.

    Raises:
        LmcompressError: If a run has fewer than 2 blocks or more than exist, blocks have different shapes, or the
            model is packed, parametrized, or shares blocks already.

    Reference:
        Lan et al., *ALBERT*, 2020, https://arxiv.org/abs/1909.11942, section 3.1, "Cross-layer parameter sharing".
    """
    check_ready(model)
    refuse_unproven(model, "shared")
    if values not in ("first", "mean"):
        raise LmcompressError(f"values must be 'first' or 'mean', got {values!r}")
    anatomy = anatomy_of(model)
    blocks = list(anatomy.block_list)
    run = len(blocks) if every is None else every
    if not 2 <= run <= len(blocks):
        raise LmcompressError(f"every must be 2 to {len(blocks)}, the number of blocks, got {run}; nothing to share")
    sources = [index // run * run for index in range(len(blocks))]
    for index, source in enumerate(sources):
        if not alike(blocks[index], blocks[source]):
            raise LmcompressError(
                f"blocks that share must have the same shapes and layers, block {index} differs from block {source}; "
                "prune them alike, or choose another number of blocks in a run"
            )
    before = Before.of(model)
    if values == "mean":
        with torch.no_grad():
            for source in set(sources):
                members = [dict(b.named_parameters()) for b, s in zip(blocks, sources, strict=True) if s == source]
                for name, parameter in blocks[source].named_parameters():
                    parameter.copy_(torch.stack([member[name] for member in members]).mean(0))
    share_parameters(blocks, sources)
    record_layers(model)
    path = anatomy.family.blocks
    changed = {f"{path}.{i}": f"has the parameters of block {s}" for i, s in enumerate(sources) if i != s}
    return before.report(model, changed)
