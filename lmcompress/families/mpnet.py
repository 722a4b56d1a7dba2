"""MPNet: BERT's blocks with a bias of relative positions for each head, which all blocks share."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import refused_for_attention
from lmcompress.families.bert import BERT

MPNET = replace(
    BERT,
    model_type="mpnet",
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_out="attention.attn.o",
    token_type_embeddings="",
    causal_flag="",
    layer_index=(),
    attention_tail=("o",),
    refused={
        "heads": "all blocks share one table of relative positions, with a column for each head",
    }
    | refused_for_attention("MPNetSelfAttention"),
)
