"""Normalisation layers, whatever their class: how they compute, and how factors are multiplied into their scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

_ROOT_MEAN_SQUARE = ("RMSNorm", "T5LayerNorm")
_CENTRED = ("CohereLayerNorm",)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises the last axis of its input: LayerNorm, or RMSNorm of any library.

    Args:
        module: any module. Transformers has an RMSNorm for every family, without a common class, and Cohere's
            LayerNorm without bias: those are known by their names.
    """
    known = (*_ROOT_MEAN_SQUARE, *_CENTRED)
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith(known)


def is_centred(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean, as LayerNorm does and RMSNorm does not.

    Args:
        norm: a norm.
    """
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__.endswith(_CENTRED)


def normalised(x: Tensor, norm: nn.Module, keep: Tensor, offset: float) -> Tensor:
    """The output of a norm whose statistics are those of some of the dimensions.

    Args:
        x: its input, ``(..., dimensions)``.
        norm: a norm.
        keep: bool, broadcastable to ``x``: the dimensions that count.
        offset: what the family adds to the scale that it stores, 1 for Gemma.

    Returns:
        Of the shape and dtype of ``x``; its values in the other dimensions mean nothing.
    """
    layer = cast(Any, norm)
    count = keep.sum(-1, keepdim=True)
    centred = x.float()
    if is_centred(norm):
        centred = centred - (x * keep).sum(-1, keepdim=True) / count
    centred = centred * keep
    eps = layer.eps if hasattr(layer, "eps") else layer.variance_epsilon
    # torch's RMSNorm without an epsilon takes that of the dtype
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + eps)
    if getattr(layer, "weight", None) is not None:
        scaled = scaled * (layer.weight.float() + offset if offset else layer.weight.float())
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        scaled = scaled + bias.float()
    return scaled.to(x.dtype)


def scaled_parameters(
    norm: nn.Module, scale: Callable[[Tensor], Tensor], offset: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of a norm, and their values for an output that is multiplied by a factor.

    Args:
        norm: a norm.
        scale: multiplies ``(dimensions,)`` float32 by the factor.
        offset: what the family adds to the scale that it stores.

    Returns:
        Pairs of parameter and values, float32; the parameters are unchanged.
    """
    found = []
    for name, parameter in norm.named_parameters(recurse=False):
        values = parameter.detach().float()
        if name == "weight" and offset:
            found.append((parameter, scale(values + offset) - offset))
        else:
            found.append((parameter, scale(values)))
    return found
