"""GPT-J: attention and feed-forward network side by side, reading one norm; rotary positions on a part of each head."""

from __future__ import annotations

from lmcompress.families.base import Family, refused_for_attention

GPTJ = Family(
    model_type="gptj",
    blocks="h",
    attention="attn",
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    attention_out="attn.out_proj",
    ffn_in="mlp.fc_in",
    activation="mlp.act",
    ffn_out="mlp.fc_out",
    word_embeddings="wte",
    position_embeddings="",
    num_layers="n_layer",
    num_heads="n_head",
    hidden_size="n_embd",
    intermediate_size="n_inner",
    head_attributes=lambda heads, head_size: {"num_attention_heads": heads, "embed_dim": heads * head_size},
    causal=True,
    layer_index=("attn.layer_idx",),
    attention_tail=("out_proj", "resid_dropout"),
    final_norm="ln_f",
    refused=refused_for_attention("GPTJAttention"),
)
