"""BERT, and the families that share its blocks: RoBERTa and ELECTRA."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.base import Family

BERT = Family(
    model_type="bert",
    blocks="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    token_type_embeddings="embeddings.token_type_embeddings",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    head_attributes=lambda heads, head_size: {"num_attention_heads": heads, "all_head_size": heads * head_size},
    layer_index=("attention.self.layer_idx",),
)

ROBERTA = replace(BERT, model_type="roberta")

ELECTRA = replace(BERT, model_type="electra", embedding_projection="embeddings_project")
