"""The cost of a model as built, compact layers included."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import PARTS
from lmcompress.families import ZeroWidthLinear, anatomy_of, in_features, out_features
from lmcompress.families.mixing import mixing_of
from lmcompress.nn.base import Compact


def model_flops(model: PreTrainedModel, *, batch_size: int = 1, length: int = 128) -> int:
    """Floating-point operations of one forward pass, a multiplication and an addition being two.

    Matmuls of the blocks, and of factorized embeddings; for a dense model the same as
    :class:`lmcompress.pruning.structured.costs.FlopCost` of its structure. Norms, softmax and activations are
    below a percent of them, look-ups are free, and heads are excluded in both.

    Args:
        model: a model of a known family, on any device, ``meta`` too.
        batch_size: rows.
        length: tokens of a row; attention grows with its square, local mixing does not.

    Returns:
        Number of FLOPs.
    """
    anatomy = anatomy_of(model)
    macs = 0
    for block in anatomy.blocks:
        macs += sum(projection_macs(block.get(part)) for part in PARTS if block.has(part))
        if mixing_of(block) is None:
            macs += 2 * length * block.num_heads * block.head_width
    words = anatomy.embedding("word_embeddings")
    macs += words.macs if isinstance(words, Compact) else 0
    return 2 * batch_size * length * macs


def projection_macs(module: nn.Module) -> int:
    """Multiply-accumulates of a projection for one token.

    Args:
        module: dense, packed, compact, or pruned to nothing.

    Returns:
        Number of multiply-accumulates.
    """
    if isinstance(module, Compact):
        return module.macs
    return 0 if isinstance(module, ZeroWidthLinear) else in_features(module) * out_features(module)
