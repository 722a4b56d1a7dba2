"""Phi: attention and feed-forward network side by side, reading one norm; rotary positions on a part of each head."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.llama import LLAMA

PHI = replace(
    LLAMA,
    model_type="phi",
    attention_out="self_attn.dense",
    ffn_in="mlp.fc1",
    ffn_gate="",
    activation="mlp.activation_fn",
    ffn_out="mlp.fc2",
    attention_tail=("dense",),
    final_norm="final_layernorm",
    # one norm is read by both, so neither has one of its own
    attention_norm="",
    ffn_norm="",
)
