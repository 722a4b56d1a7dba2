"""The matrices of projections, however they are stored: their widths, their weights, and new ones of other widths."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import LmcompressError
from lmcompress.families.foreign import library_of, refuse_foreign
from lmcompress.families.inside import without_adapter
from lmcompress.families.narrow import companion_of
from lmcompress.families.shaping import resized
from lmcompress.nn.base import Compact
from lmcompress.nn.packed import Packed


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's ``Conv1D``, which stores ``(in, out)`` where ``nn.Linear`` stores ``(out, in)``."""
    return isinstance(module, Conv1D)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module holds one matrix: a ``Linear``, ``Conv1D`` or ``Embedding``.

    Args:
        module: any module.
    """
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)


def out_features(module: nn.Module) -> int:
    """Output width of a ``Linear`` or ``Conv1D``, dense, packed, compact or with an adapter."""
    module = without_adapter(module)
    if isinstance(module, Packed):
        return module.shape[0]
    if isinstance(module, Compact):
        return module.out_features
    return _widths(module)[1]


def in_features(module: nn.Module) -> int:
    """Input width of a ``Linear`` or ``Conv1D``, dense, packed, compact or with an adapter."""
    module = without_adapter(module)
    if isinstance(module, Packed):
        return module.shape[1]
    if isinstance(module, Compact):
        return module.in_features
    return _widths(module)[0]


def weight_view(module: nn.Module) -> Tensor:
    """The weight as ``(out, in)``, however it is stored; a view: in-place changes reach the module.

    In a fake-quantized model this is the trained weight, not its quantized value.
    """
    weight = _weight(module)
    return weight.t() if is_conv1d(module) else weight


def _widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width."""
    if library_of(module) is not None:
        # codes of another library have shapes of their own
        return int(cast(Any, module).in_features), int(cast(Any, module).out_features)
    out, into = _stored(module).shape[:: -1 if is_conv1d(module) else 1]
    return into, out


def _weight(module: nn.Module) -> Tensor:
    if isinstance(module, Packed):
        raise LmcompressError(
            f"a {type(module).__name__} has codes and no matrix: use the dense model that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives"
        )
    if isinstance(module, Compact):
        raise LmcompressError(
            f"a {type(module).__name__} has no matrix of its own that could be cut, quantized or replaced: do that "
            "with the dense model first, and make it compact afterwards"
        )
    refuse_foreign(module, "read or change the weights of")
    return _stored(module)


def _stored(module: nn.Module) -> Tensor:
    # the parameter, even if attribute access returns something computed from it, such as quantized values
    stored = module._parameters.get("weight")
    weight = module.weight if stored is None else stored
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise LmcompressError(f"expected a Linear or Conv1D with a matrix as weight, got {type(module).__name__}")
    return weight


def new_projection(
    old: nn.Module, *, in_width: int, out_width: int, device: torch.device | str | None = None
) -> nn.Module:
    """A new ``Linear`` or ``Conv1D`` like ``old`` but of other widths; its values are unset.

    Args:
        old: module whose kind, dtype and presence of a bias are copied.
        in_width: input width.
        out_width: output width.
        device: default: that of ``old``.

    Returns:
        The new module; on ``meta`` nothing is allocated. With a width of 0 it is a
        :class:`~lmcompress.families.narrow.ZeroWidthLinear`, whose bias is zero.

    Raises:
        LmcompressError: If ``old`` has no matrix: it is packed, compact or something else.
    """
    _weight(old)
    return resized(old, in_width, out_width, device)


def embedding_scale(table: nn.Module) -> float | None:
    """The factor by which a module multiplies the embeddings that are looked up, or None.

    Args:
        table: an embedding table of any class; Transformers has a class of its own in every family that scales them.
    """
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    return None if scale is None else float(scale)


def scale_queries(query: nn.Module, factor: float, *, fused: bool) -> None:
    """Multiply the queries that a projection computes, biases included.

    Args:
        query: modified in place.
        factor: the factor.
        fused: whether queries are only the first third of its outputs.
    """
    rows = out_features(query) // 3 if fused else out_features(query)
    with torch.no_grad():
        weight_view(query)[:rows].mul_(factor)
        if isinstance(query.bias, Tensor):
            query.bias[:rows].mul_(factor)


def refuse_unfoldable(module: nn.Module, why: str) -> None:
    """Refuse a projection whose rows cannot be multiplied by a number.

    Args:
        module: a projection.
        why: what makes that necessary.

    Raises:
        LmcompressError: If it is packed, compact, parametrized, quantized by another library or has an adapter, or if
            codes are attached to its rows.
    """
    try:
        weight_view(module)
    except LmcompressError as error:
        raise LmcompressError(f"{why}: that must be multiplied into its queries, and {error}") from error
    if hasattr(type(module), "weight") or companion_of(module) is not None:
        raise LmcompressError(
            f"{why}: that must be multiplied into its queries, and a {type(module).__name__} whose weights are "
            "quantized or masked while it trains cannot be. Choose the layers in an earlier stage"
        )
