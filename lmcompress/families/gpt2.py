"""GPT-2: ``Conv1D`` matrices stored ``(in, out)``, query, key and value fused in ``c_attn``, a tied head."""

from __future__ import annotations

from typing import Any

from lmcompress.families.base import Family


def _scaling_at(attention: Any, number: int) -> float:
    # as GPT2Attention computes it when it is built
    scaling = float(attention.head_dim**-0.5) if attention.scale_attn_weights else 1.0
    return scaling / float(number + 1) if attention.scale_attn_by_inverse_layer_idx else scaling


GPT2 = Family(
    model_type="gpt2",
    blocks="h",
    attention="attn",
    qkv="attn.c_attn",
    attention_out="attn.c_proj",
    ffn_in="mlp.c_fc",
    activation="mlp.act",
    ffn_out="mlp.c_proj",
    word_embeddings="wte",
    position_embeddings="wpe",
    num_layers="n_layer",
    num_heads="n_head",
    hidden_size="n_embd",
    intermediate_size="n_inner",
    head_attributes=lambda heads, head_size: {"num_heads": heads, "split_size": heads * head_size},
    causal=True,
    packs=True,
    layer_index=("attn.layer_idx", "crossattention.layer_idx"),
    scores=(("attn", "attn.c_attn"), ("crossattention", "crossattention.q_attn")),
    scaling_at=_scaling_at,
    attention_tail=("c_proj", "resid_dropout"),
    final_norm="ln_f",
    attention_norm="ln_1",
    ffn_norm="ln_2",
)
