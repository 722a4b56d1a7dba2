"""Giving a newly built model the shapes of a pruned one.

This module depends only on torch, Transformers and :mod:`lmcompress.families.narrow`: the self-loading format carries
its source text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmcompress.families.narrow import ZeroWidthLinear, narrow_stream, remove_heads, stream_axes


def resized(old: nn.Module, in_width: int, out_width: int, device: Any = None) -> nn.Module:
    """A new ``Linear`` or ``Conv1D`` like ``old`` but of other widths; its values are unset.

    Args:
        old: module whose kind, dtype and presence of a bias are copied.
        in_width: input width.
        out_width: output width; if one of the two is 0, the output is the bias.
        device: default: that of ``old``.
    """
    # the parameter, even if something else has parametrized it
    weight = cast(Any, old._parameters.get("weight") if old._parameters.get("weight") is not None else old.weight)
    device = weight.device if device is None else device
    if in_width == 0 or out_width == 0:
        return ZeroWidthLinear(in_width, out_width, old.bias is not None, device, weight.dtype)
    if isinstance(old, Conv1D):
        with torch.device(device):
            return Conv1D(out_width, in_width).to(weight.dtype)
    return nn.Linear(in_width, out_width, old.bias is not None, device, weight.dtype)


def shape_model(
    model: nn.Module,
    structure: Mapping[str, Any],
    paths: Mapping[str, Any],
    head_attributes: Mapping[str, tuple[int, int]],
) -> None:
    """Give a newly built model the shapes that a checkpoint's config describes.

    Args:
        model: a ``PreTrainedModel`` with as many blocks as the structure; modified in place; usually on ``meta``.
        structure: ``head_size``, ``blocks`` with ``heads`` and ``ffn``, and ``hidden`` or None.
        paths: paths of the parts of the model's family.
        head_attributes: attributes of the attention module as (a, b), for a * heads + b * heads * head size.
    """
    blocks = cast(Any, model).base_model.get_submodule(paths["blocks"])
    for block, shape in zip(blocks, structure["blocks"], strict=True):
        heads, ffn, width = shape["heads"], shape["ffn"], shape["heads"] * structure["head_size"]
        for part, into, out in (
            ("qkv", None, 3 * width),
            ("query", None, width),
            ("key", None, width),
            ("value", None, width),
            ("attention_out", width, None),
            ("ffn_in", None, ffn),
            ("ffn_out", ffn, None),
        ):
            if paths[part]:
                _resize(block, paths[part], into, out)
        attention = block.get_submodule(paths["attention"])
        for name, (a, b) in head_attributes.items():
            setattr(attention, name, a * heads + b * width)
        if heads == 0:
            remove_heads(attention, paths["attention_tail"])
    if structure.get("hidden") is not None:
        narrow_stream(model, stream_axes(model, paths), torch.arange(structure["hidden"]))


def _resize(block: nn.Module, path: str, in_width: int | None, out_width: int | None) -> None:
    """Replace a projection by one of other widths; None keeps a width."""
    parent, _, name = path.rpartition(".")
    old = block.get_submodule(path)
    out, into = cast(Any, old).weight.shape[:: -1 if isinstance(old, Conv1D) else 1]
    wanted = (into if in_width is None else in_width, out if out_width is None else out_width)
    if wanted != (into, out):
        setattr(block.get_submodule(parent), name, resized(old, *wanted))
