"""T5 and Flan-T5: an encoder and a decoder that reads it, with RMSNorm, and biases of the scores for positions."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import Family

_BIAS = "the first block of a stack computes a bias of the scores with one column for each head, which all blocks add"

_ENCODER = Family(
    model_type="t5",
    blocks="encoder.block",
    attention="layer.0.SelfAttention",
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_out="layer.0.SelfAttention.o",
    ffn_in="layer.1.DenseReluDense.wi",
    activation="layer.1.DenseReluDense.act",
    ffn_out="layer.1.DenseReluDense.wo",
    casts="layer.1.DenseReluDense",
    word_embeddings="shared",
    position_embeddings="",
    num_layers="num_layers",
    num_heads="num_heads",
    head_size="d_kv",
    hidden_size="d_model",
    intermediate_size="d_ff",
    head_attributes=lambda heads, head_size: {"n_heads": heads, "inner_dim": heads * head_size},
    attention_tail=("o",),
    final_norm="encoder.final_layer_norm",
    attention_norm="layer.0.layer_norm",
    ffn_norm="layer.1.layer_norm",
    # the output of the decoder, where its head is tied
    stream_scaled=True,
    fixed_blocks=(0,),
    shared_bias="layer.0.SelfAttention.relative_attention_bias",
    expects=(("is_gated_act", False),),
    refused=dict.fromkeys(("heads", "attention", "emptied"), _BIAS)
    | {
        "self_loading": "decoders that read an encoder",
        "compact": "its feed-forward network casts what it computes to the dtype of a weight that compact layers lack",
        "shared": "blocks that share must have the same shapes and layers",
    },
)

_DECODER = replace(
    _ENCODER,
    blocks="decoder.block",
    num_layers="num_decoder_layers",
    cross_attention="layer.1.EncDecAttention",
    cross_query="layer.1.EncDecAttention.q",
    cross_key="layer.1.EncDecAttention.k",
    cross_value="layer.1.EncDecAttention.v",
    cross_out="layer.1.EncDecAttention.o",
    ffn_in="layer.2.DenseReluDense.wi",
    activation="layer.2.DenseReluDense.act",
    ffn_out="layer.2.DenseReluDense.wo",
    casts="layer.2.DenseReluDense",
    ffn_norm="layer.2.layer_norm",
    layer_index=("layer.0.SelfAttention.layer_idx", "layer.1.EncDecAttention.layer_idx"),
    final_norm="decoder.final_layer_norm",
)


def _gated(stack: Family) -> Family:
    network = stack.ffn_out.removesuffix(".wo")
    return replace(
        stack, ffn_in=f"{network}.wi_1", ffn_gate=f"{network}.wi_0", activation="", expects=(("is_gated_act", True),)
    )


T5 = replace(
    _ENCODER,
    decoder=_DECODER,
    variants=(replace(_gated(_ENCODER), decoder=_gated(_DECODER)),),
)
