"""Families that are described by one line beside BERT's; only ``families/test_relatives.py`` runs over them."""

from __future__ import annotations

import torch
import transformers
from families import FFN, HEADS, HIDDEN, LABELS, LAYERS, VOCAB
from transformers import AutoConfig, PreTrainedModel

RELATIVES = {
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "data2vec-text": "Data2VecText",
    "ernie": "Ernie",
    "roberta-prelayernorm": "RobertaPreLayerNorm",
}
"""Prefix of the model classes by ``model_type``."""


def make_relative(
    name: str, ending: str = "ForSequenceClassification", vocab_size: int = VOCAB, seed: int = 0
) -> PreTrainedModel:
    """A tiny random model in evaluation mode, as ``families.make`` makes them."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN)
    config = AutoConfig.for_model(
        name, **sizes, vocab_size=vocab_size, max_position_embeddings=40, num_labels=LABELS, initializer_range=0.3
    )
    model: PreTrainedModel = getattr(transformers, RELATIVES[name] + ending)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()
