"""GPT-2: ``Conv1D`` matrices stored ``(in, out)``, query, key and value fused in ``c_attn``, a tied head."""

from __future__ import annotations

from lmcompress.families.base import Family

GPT2 = Family(
    model_type="gpt2",
    blocks="h",
    attention="attn",
    qkv="attn.c_attn",
    attention_out="attn.c_proj",
    ffn_in="mlp.c_fc",
    ffn_out="mlp.c_proj",
    word_embeddings="wte",
    position_embeddings="wpe",
    num_layers="n_layer",
    num_heads="n_head",
    hidden_size="n_embd",
    intermediate_size="n_inner",
    head_attributes=lambda heads, head_size: {"num_heads": heads, "split_size": heads * head_size},
    causal=True,
    layer_index=("attn.layer_idx",),
    attention_tail=("c_proj", "resid_dropout"),
    final_norm="ln_f",
    attention_norm="ln_1",
    ffn_norm="ln_2",
)
