"""DistilBERT: BERT's blocks under other names, without token types or pooler."""

from __future__ import annotations

from lmcompress.families.base import Family

DISTILBERT = Family(
    model_type="distilbert",
    blocks="transformer.layer",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    ffn_in="ffn.lin1",
    activation="ffn.activation",
    ffn_out="ffn.lin2",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    num_layers="n_layers",
    num_heads="n_heads",
    hidden_size="dim",
    intermediate_size="hidden_dim",
    head_attributes=lambda heads, head_size: {"n_heads": heads},
    attention_tail=("out_lin",),
)
