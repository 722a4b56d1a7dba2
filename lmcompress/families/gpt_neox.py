"""GPT-NeoX (Pythia): attention and feed-forward network side by side, query, key and value interleaved by head."""

from __future__ import annotations

from lmcompress.families.base import Family

GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="layers",
    attention="attention",
    qkv="attention.query_key_value",
    qkv_interleaved=True,
    attention_out="attention.dense",
    ffn_in="mlp.dense_h_to_4h",
    activation="mlp.act",
    ffn_out="mlp.dense_4h_to_h",
    word_embeddings="embed_in",
    position_embeddings="",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    head_attributes=lambda heads, head_size: {},
    causal=True,
    packs=True,
    layer_index=("attention.layer_idx",),
    attention_tail=("dense",),
    final_norm="final_layer_norm",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    refused={"self_loading": "Transformers changes the name of its head while it loads, for its own classes only"},
)
