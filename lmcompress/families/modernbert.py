"""ModernBERT: fused projections of attention and of the gated feed-forward network, rotary positions, local layers."""

from __future__ import annotations

from lmcompress.families.base import Family

MODERNBERT = Family(
    model_type="modernbert",
    blocks="layers",
    attention="attn",
    qkv="attn.Wqkv",
    attention_out="attn.Wo",
    ffn_in="mlp.Wi",
    ffn_in_copies=2,
    ffn_out="mlp.Wo",
    word_embeddings="embeddings.tok_embeddings",
    position_embeddings="",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    head_attributes=lambda heads, head_size: {},
    per_layer=("layer_types",),
    layer_index=("layer_idx", "attn.layer_idx"),
    attention_tail=("Wo", "out_drop"),
    final_norm="final_norm",
    attention_norm="attn_norm",
    ffn_norm="mlp_norm",
    embeddings_normed=True,
    # its attention reads the normed embeddings, that of others a norm of their own
    fixed_blocks=(0,),
    refused={"shared": "blocks that share must have the same shapes and layers"},
)
