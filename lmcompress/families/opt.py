"""OPT: a decoder with a table of positions, norms before each sub-layer (all sizes but 350M), and ReLU."""

from __future__ import annotations

from lmcompress.families.base import Family

OPT = Family(
    model_type="opt",
    blocks="decoder.layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.out_proj",
    ffn_in="fc1",
    activation="activation_fn",
    ffn_out="fc2",
    word_embeddings="decoder.embed_tokens",
    position_embeddings="decoder.embed_positions",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    hidden_size="hidden_size",
    intermediate_size="ffn_dim",
    embedding_size="word_embed_proj_dim",
    head_attributes=lambda heads, head_size: {"num_heads": heads},
    causal=True,
    layer_index=("self_attn.layer_idx",),
    attention_tail=("out_proj",),
    final_norm="decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    expects=(("do_layer_norm_before", True),),
)
