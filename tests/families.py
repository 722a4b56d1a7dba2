"""The model families that tests of structure, loading and training run over: one line per family.

A model here is tiny and random: 3 blocks, 4 heads of 4 (of grouped queries 4 key/value heads, with two query heads
each), 24 neurons, 64 words; it is made in milliseconds and needs no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from lmcompress.checkpoint.cutting import drop_heads, drop_neurons, keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.families import anatomy_of

LAYERS, HEADS, HEAD_SIZE, FFN, VOCAB, LABELS = 3, 4, 4, 24, 64, 3
HIDDEN = HEADS * HEAD_SIZE


@dataclass(frozen=True)
class TestFamily:
    """How to make a tiny model of a family.

    Attributes:
        name: of the test, and key of the family.
        prefix: of the model classes, such as ``Bert``.
        make_config: keyword arguments to a config of 3 blocks.
        language_head: class that gives one vector of logits per token.
    """

    name: str
    prefix: str
    make_config: Callable[..., PretrainedConfig]
    language_head: str

    __test__ = False

    def __str__(self) -> str:
        return self.name


def _bert_like(config: type[PretrainedConfig], **defaults: Any) -> Callable[..., PretrainedConfig]:
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN)
    others = dict(vocab_size=VOCAB, max_position_embeddings=40, num_labels=LABELS)
    return lambda **given: config(**{**sizes, **others, **defaults, **given})


def _distilbert(**given: Any) -> PretrainedConfig:
    sizes = dict(dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=FFN, vocab_size=VOCAB)
    return DistilBertConfig(**{**sizes, "max_position_embeddings": 40, "num_labels": LABELS, **given})


def _gpt2(**given: Any) -> PretrainedConfig:
    sizes = dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN, vocab_size=VOCAB, n_positions=40)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return GPT2Config(**{**sizes, **ids, "num_labels": LABELS, **given})


def _llama(**given: Any) -> PretrainedConfig:
    heads = dict(num_attention_heads=2 * HEADS, num_key_value_heads=HEADS, head_dim=HEAD_SIZE)
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=FFN, vocab_size=VOCAB, **heads)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return LlamaConfig(**{**sizes, **ids, "max_position_embeddings": 40, "num_labels": LABELS, **given})


BERT = TestFamily("bert", "Bert", _bert_like(BertConfig), "BertForMaskedLM")
ROBERTA = TestFamily("roberta", "Roberta", _bert_like(RobertaConfig), "RobertaForMaskedLM")
DISTILBERT = TestFamily("distilbert", "DistilBert", _distilbert, "DistilBertForMaskedLM")
ELECTRA = TestFamily("electra", "Electra", _bert_like(ElectraConfig, embedding_size=HIDDEN), "ElectraForMaskedLM")
PROJECTED = TestFamily(
    "electra-projected", "Electra", _bert_like(ElectraConfig, embedding_size=8), "ElectraForMaskedLM"
)
GPT2 = TestFamily("gpt2", "GPT2", _gpt2, "GPT2LMHeadModel")
LLAMA = TestFamily("llama", "Llama", _llama, "LlamaForCausalLM")
CAUSAL = ("gpt2", "llama")
"""Those whose models are all causal."""

TYPICAL = [BERT, GPT2]
"""An encoder and a decoder, which most tests run over; tests/proof proves all families that are described."""

FAMILIES = [BERT, ROBERTA, PROJECTED, GPT2]
"""Those, one whose positions depend on which ids are padding, and one whose embeddings are projected."""

BY_NAME = {family.name: family for family in (BERT, ROBERTA, DISTILBERT, ELECTRA, PROJECTED, GPT2, LLAMA)}
AUTO_CLASSES = {
    "base": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
}


def class_name(family: TestFamily, head: str) -> str:
    """Name of the model class for ``head``: base, classification, tokens or language."""
    endings = {"base": "Model", "classification": "ForSequenceClassification", "tokens": "ForTokenClassification"}
    return family.language_head if head == "language" else family.prefix + endings[head]


def auto_class(family: TestFamily, head: str) -> Any:
    """The ``AutoModel…`` class that loads :func:`class_name`."""
    language = "AutoModelForCausalLM" if family.name in CAUSAL else "AutoModelForMaskedLM"
    return getattr(transformers, AUTO_CLASSES.get(head, language))


def make(family: TestFamily | str, head: str = "classification", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode; weights larger than stock so that every part shows in the logits."""
    family = BY_NAME[family] if isinstance(family, str) else family
    torch.manual_seed(seed)
    model = getattr(transformers, class_name(family, head))(family.make_config(initializer_range=0.3, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Let every dropout of a model drop with probability ``p``."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p


def inputs(model: PreTrainedModel, *, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids with padding on the right of the last row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: Any, **kwargs: Any) -> torch.Tensor:
    """Logits, or the last hidden state, for :func:`inputs`."""
    with torch.no_grad():
        answer = model(**inputs(model, **kwargs))
    return answer["logits"] if "logits" in answer else answer[0]


def sparse(model: PreTrainedModel) -> PreTrainedModel:
    """Half of each matrix zero and the rest of few values, as pruning and sharing leave it; in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                few = torch.round(parameter * 4) / 4
                parameter.copy_(torch.where(parameter.abs() > parameter.abs().median(), few, 0.0))
    return model


def cut_unevenly(model: PreTrainedModel) -> PreTrainedModel:
    """Takes heads, neurons and the middle block away, differently in each block; in place."""
    keep_layers(model, [0, 2])
    first, second = anatomy_of(model).blocks
    keep_heads(first, [1, 3])
    keep_heads(second, [2])
    keep_neurons(first, range(0, FFN, 2))
    keep_neurons(second, range(5))
    return model


def cut_to_nothing(model: PreTrainedModel) -> PreTrainedModel:
    """Takes all heads of the first block, all neurons of the second and some hidden dimensions away; in place."""
    first, second, third = anatomy_of(model).blocks
    drop_heads(first)
    drop_neurons(second)
    keep_heads(third, [0, 3])
    keep_hidden(model, [d for d in range(HIDDEN) if d not in (1, 6, 7)])
    return model
