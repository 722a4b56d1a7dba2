"""Llama and the decoders that share its blocks: grouped queries, rotary positions, RMSNorm, a gated feed-forward."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import Family

LLAMA = Family(
    model_type="llama",
    blocks="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    ffn_in="mlp.up_proj",
    ffn_gate="mlp.gate_proj",
    ffn_out="mlp.down_proj",
    word_embeddings="embed_tokens",
    position_embeddings="",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    key_value_heads="num_key_value_heads",
    head_size="head_dim",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    head_attributes=lambda heads, head_size: {},
    queries_per_head="num_key_value_groups",
    causal=True,
    packs=True,
    layer_index=("self_attn.layer_idx",),
    attention_tail=("o_proj",),
    final_norm="norm",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
)

MISTRAL = replace(LLAMA, model_type="mistral")

QWEN2 = replace(LLAMA, model_type="qwen2", per_layer=("layer_types",))

QWEN3 = replace(QWEN2, model_type="qwen3")

SMOLLM3 = replace(QWEN2, model_type="smollm3", per_layer=("layer_types", "no_rope_layers"))

GRANITE = replace(LLAMA, model_type="granite")

HELIUM = replace(
    LLAMA,
    model_type="helium",
    refused={"hidden": "the output projection of attention is square, whatever the number and the size of heads"},
)

SEED_OSS = replace(LLAMA, model_type="seed_oss")

ERNIE4_5 = replace(LLAMA, model_type="ernie4_5")

ARCEE = replace(LLAMA, model_type="arcee", ffn_gate="", activation="mlp.act_fn")

GLM = replace(LLAMA, model_type="glm", ffn_in="mlp.gate_up_proj", ffn_in_copies=2, ffn_gate="")

EUROBERT = replace(LLAMA, model_type="eurobert", causal=False, packs=False)

STARCODER2 = replace(
    LLAMA, model_type="starcoder2", ffn_in="mlp.c_fc", ffn_gate="", activation="mlp.act", ffn_out="mlp.c_proj"
)

# attention and feed-forward network side by side, reading one norm
COHERE = replace(LLAMA, model_type="cohere", attention_norm="", ffn_norm="")
