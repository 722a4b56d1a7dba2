"""DeBERTa-v2 and v3: BERT's blocks whose queries and keys also meet embeddings of relative positions."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import refused_for_attention
from lmcompress.families.bert import BERT

_RELATIVE = replace(
    BERT,
    model_type="deberta-v2",
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    causal_flag="",
    layer_index=(),
    pooler="",
    # otherwise relative positions have projections of their own, and some models a convolution
    expects=(("share_att_key", True), ("conv_kernel_size", 0)),
    refused={
        "hidden": "relative positions and the pooler are as wide as the residual stream, outside of all blocks",
    }
    | refused_for_attention("DisentangledSelfAttention"),
)

DEBERTA_V2 = replace(
    _RELATIVE,
    # without relative positions nothing but its own projections reads a block's input
    variants=(replace(_RELATIVE, expects=(("relative_attention", False), ("conv_kernel_size", 0))),),
)
