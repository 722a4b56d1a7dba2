"""BART and mBART: an encoder and a decoder that reads it, with tables of positions and one shared table of words."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import Family

_ENCODER = Family(
    model_type="bart",
    blocks="encoder.layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.out_proj",
    ffn_in="fc1",
    activation="activation_fn",
    ffn_out="fc2",
    word_embeddings="shared",
    position_embeddings="encoder.embed_positions",
    num_layers="encoder_layers",
    num_heads="encoder_attention_heads",
    hidden_size="d_model",
    intermediate_size="encoder_ffn_dim",
    head_attributes=lambda heads, head_size: {"num_heads": heads},
    attention_tail=("out_proj",),
    # with scale_embedding, by the root of the hidden size
    stream_scaled=True,
    refused={
        "self_loading": "decoders that read an encoder",
        "shared": "blocks that share must have the same shapes and layers",
    },
)

_DECODER = replace(
    _ENCODER,
    blocks="decoder.layers",
    position_embeddings="decoder.embed_positions",
    num_layers="decoder_layers",
    num_heads="decoder_attention_heads",
    intermediate_size="decoder_ffn_dim",
    cross_attention="encoder_attn",
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_out="encoder_attn.out_proj",
    layer_index=("self_attn.layer_idx", "encoder_attn.layer_idx"),
)

BART = replace(_ENCODER, decoder=_DECODER)


def _normed_first(stack: Family, name: str) -> Family:
    return replace(
        stack,
        model_type="mbart",
        final_norm=f"{name}.layer_norm",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        embeddings_normed=True,
    )


MBART = replace(_normed_first(_ENCODER, "encoder"), decoder=_normed_first(_DECODER, "decoder"))
