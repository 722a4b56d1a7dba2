"""Phi-3: Llama's blocks with query, key and value in one matrix, and the gate and what it multiplies in another."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    query="",
    key="",
    value="",
    qkv="self_attn.qkv_proj",
    ffn_in="mlp.gate_up_proj",
    ffn_in_copies=2,
    ffn_gate="",
    head_attributes=lambda heads, head_size: {"num_key_value_heads": heads},
    heads_in_config="num_attention_heads",
)
