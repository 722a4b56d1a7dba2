"""BERT, and the families that share its blocks: RoBERTa, ELECTRA, XLM-R, CamemBERT, ERNIE, data2vec."""

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
    activation="intermediate.intermediate_act_fn",
    ffn_out="output.dense",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    token_type_embeddings="embeddings.token_type_embeddings",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    head_attributes=lambda heads, head_size: {"num_attention_heads": heads, "all_head_size": heads * head_size},
    causal_flag="is_decoder",
    layer_index=("attention.self.layer_idx", "crossattention.self.layer_idx"),
    pooler="pooler",
)

ROBERTA = replace(BERT, model_type="roberta")

XLM_ROBERTA = replace(BERT, model_type="xlm-roberta")

CAMEMBERT = replace(BERT, model_type="camembert")

DATA2VEC_TEXT = replace(BERT, model_type="data2vec-text")

ERNIE = replace(BERT, model_type="ernie")

ROBERTA_PRELAYERNORM = replace(
    BERT,
    model_type="roberta-prelayernorm",
    attention_norm="attention.LayerNorm",
    ffn_norm="intermediate.LayerNorm",
    final_norm="LayerNorm",
)

ELECTRA = replace(
    BERT, model_type="electra", embedding_projection="embeddings_project", embedding_size="embedding_size", pooler=""
)
