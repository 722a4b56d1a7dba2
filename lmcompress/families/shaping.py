"""Giving a newly built model the shapes of a pruned one.

This module depends only on torch, Transformers, :mod:`lmcompress.families.coupled` and
:mod:`lmcompress.families.narrow`: the self-loading format carries its source text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmcompress.families.coupled import Coupled, coupled_heads, coupled_neurons
from lmcompress.families.narrow import (
    ZeroWidthLinear,
    count_own_heads,
    narrow_stream,
    remove_heads,
    stacks_of,
    stream_axes,
)


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
        structure: ``head_size``, ``queries`` (default 1), ``hidden`` or None, ``blocks`` with ``heads`` and ``ffn``.
        paths: paths of the parts of the model's family.
        head_attributes: attributes of the attention module as (a, b), for a * heads + b * heads * head size.
    """
    base, shapes = cast(Any, model).base_model, iter(structure["blocks"])
    for stack in stacks_of(paths):
        for block in base.get_submodule(stack["blocks"]):
            _shape_block(block, next(shapes), structure, stack, head_attributes)
    if structure.get("hidden") is not None:
        narrow_stream(model, stream_axes(model, paths), torch.arange(structure["hidden"]))


def _shape_block(
    block: Any,
    shape: Mapping[str, int],
    structure: Mapping[str, Any],
    paths: Mapping[str, Any],
    head_attributes: Mapping[str, tuple[int, int]],
) -> None:
    """Give one block its shapes."""
    queries = structure.get("queries", 1)
    of_heads, of_neurons = coupled_heads(paths, structure["head_size"], queries), coupled_neurons(paths)
    heads, width = shape["heads"], shape["heads"] * structure["head_size"]
    for coupled in of_heads:
        _resize(block, paths[coupled.part], coupled, heads)
    for coupled in of_neurons:
        _resize(block, paths[coupled.part], coupled, shape["ffn"])
    attention = block.get_submodule(paths["attention"])
    for name, (a, b) in head_attributes.items():
        setattr(attention, name, a * heads + b * width)
    if heads == 0:
        remove_heads(attention, paths["attention_tail"])
    elif paths["heads_in_config"]:
        count_own_heads(attention, paths["heads_in_config"], heads * queries)


def leave_out_pooler(model: nn.Module, found: Iterable[str], name: str) -> None:
    """Take the pooler away from a newly built base model whose checkpoint was written by a model without one.

    Otherwise Transformers would fill it with random values: models of one class exist with and without it.

    Args:
        model: a ``PreTrainedModel``; one with a head, or of another class than the checkpoint's, stays as it is.
        found: names of the tensors in the files.
        name: name of the pooler in the model; empty if its family has none.
    """
    stock = cast(Any, model)
    written_by_this_class = (stock.config.architectures or [""])[0] == type(model).__name__
    if name and stock.base_model is model and written_by_this_class and getattr(model, name, None) is not None:
        if not any(tensor.startswith(f"{name}.") for tensor in found):
            setattr(model, name, None)


def _resize(block: nn.Module, path: str, coupled: Coupled, units: int) -> None:
    """Replace a projection by one for another number of units."""
    parent, _, name = path.rpartition(".")
    old = block.get_submodule(path)
    out, into = cast(Any, old).weight.shape[:: -1 if isinstance(old, Conv1D) else 1]
    wanted = (into, coupled.width(units)) if coupled.side == "in" else (coupled.width(units), out)
    if wanted != (into, out):
        setattr(block.get_submodule(parent), name, resized(old, *wanted))
