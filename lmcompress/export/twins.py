"""A model whose packed modules are replaced by twins that exporters understand: codes, scales and standard operators.

Every layout has a twin in both runtimes: :mod:`lmcompress.export.eight_bit`, :mod:`lmcompress.export.low_bit`.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.export import eight_bit, low_bit
from lmcompress.export.attention import GraphQuantizers
from lmcompress.export.joined import join_projections
from lmcompress.families import anatomy_of
from lmcompress.nn.packed import Packed, PackedConv1D, PackedEmbedding, PackedLinear, TiedHead
from lmcompress.nn.quantized_attention import AttentionQuantizers


def _matmul(packed: Packed, bias: Tensor | None, to: str) -> nn.Module:
    low = low_bit.matmul_twin(packed, bias, to)
    return eight_bit.ByteMatmul(eight_bit.operand(packed, bias)) if low is None else low


def _embedding(packed: Packed, to: str) -> nn.Module:
    low = low_bit.embedding_twin(packed, to)
    return eight_bit.ByteEmbedding(eight_bit.operand(packed, None)) if low is None else low


def _head(packed: Packed, embedding: nn.Module, bias: Tensor | None) -> nn.Module:
    if not isinstance(embedding, eight_bit.ByteEmbedding):
        return low_bit.head_twin(packed, embedding, bias)
    head = eight_bit.ByteMatmul(eight_bit.operand(packed, bias), shared=True)
    # the very tensors: exporters store them once
    for name in ("codes", "scales"):
        head.register_buffer(name, embedding.get_buffer(name))
    return head


def exportable(model: PreTrainedModel, *, to: str = "onnx") -> PreTrainedModel:
    """A copy of a model for exporters, in float32 and evaluation mode, without any packed module.

    Queries, keys and values that read the same quantized input become one product.

    Args:
        model: packed or not; unchanged.
        to: the runtime, for layouts whose twins differ.

    Returns:
        The copy; where it holds twins it computes in exported graphs only.
    """
    twin = copy.deepcopy(model).float().eval()
    if twin.config._attn_implementation == "sdpa" and not anatomy_of(twin).causal:
        # the same without a search for rows that have no visible key, which exporters write out over all scores
        twin.config._attn_implementation = "eager"
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    join_projections(twin)
    embeddings: dict[int, nn.Module] = {}
    for parent, name, child in _children(twin):
        if isinstance(child, PackedEmbedding):
            made = embeddings.get(id(child)) or _embedding(child, to)
            embeddings[id(child)] = made
            setattr(parent, name, made)
        elif isinstance(child, (PackedLinear, PackedConv1D)):
            setattr(parent, name, _matmul(child, child.bias, to))
        elif isinstance(child, AttentionQuantizers):
            setattr(parent, name, GraphQuantizers(child))
    for parent, name, child in _children(twin):
        if isinstance(child, TiedHead):
            packed: PackedEmbedding = child.__dict__["embedding"]
            setattr(parent, name, _head(packed, embeddings[id(packed)], child.bias))
    return twin


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every module but the model itself."""
    return [(parent, name, child) for parent in list(model.modules()) for name, child in list(parent.named_children())]
