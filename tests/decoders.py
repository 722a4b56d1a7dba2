"""Tiny causal language models: of every family that has one, and of the decoders that share Llama's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from families import BY_NAME, FFN, HEAD_SIZE, HEADS, HIDDEN, LAYERS, VOCAB, make
from transformers import BertLMHeadModel, ElectraForCausalLM, PreTrainedModel, RobertaForCausalLM

_CLASSES = {"bert": BertLMHeadModel, "roberta": RobertaForCausalLM, "electra": ElectraForCausalLM}
DECODERS = ("gpt2", *_CLASSES)


def decoder(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random causal model, in evaluation mode.

    Args:
        name: of its family.
        seed: of its weights.
    """
    if name == "gpt2":
        return make("gpt2", "language", seed)
    torch.manual_seed(seed)
    return _CLASSES[name](BY_NAME[name].make_config(initializer_range=0.3, is_decoder=True)).eval()


def _sizes(**given: Any) -> dict[str, Any]:
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN)
    return {**sizes, **ids, "vocab_size": VOCAB, "max_position_embeddings": 40, "initializer_range": 0.3, **given}


def _grouped(**given: Any) -> dict[str, Any]:
    """Two key/value heads, each read by two query heads."""
    return _sizes(num_key_value_heads=HEADS // 2, **given)


MODERN: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_grouped())),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_grouped(sliding_window=6))),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_grouped())),
    # heads wider than their share of the hidden size, and norms of queries and keys
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_grouped(head_dim=2 * HEAD_SIZE))),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**_grouped(no_rope_layers=[1, 0, 1], tie_word_embeddings=True))
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_grouped(head_dim=2 * HEAD_SIZE))),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_grouped())),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_sizes())),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=FFN, vocab_size=VOCAB,
            max_position_embeddings=40, word_embed_proj_dim=HIDDEN, init_std=0.3, bos_token_id=0, eos_token_id=0,
        )
    ),
}  # fmt: skip
"""One model each of the families whose blocks are of today's kinds, all of them causal."""


def modern(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of one of :data:`MODERN`, in evaluation mode, whose norms and biases are not trivial.

    Args:
        name: of its family.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    model = MODERN[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
