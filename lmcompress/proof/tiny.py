"""Tiny random models: a config's architecture with three blocks and small widths."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lmcompress.errors import LmcompressError
from lmcompress.families import Family, anatomy_of, family_of, is_described
from lmcompress.families.norms import is_norm

LAYERS, HEADS, HEAD_SIZE, FFN, VOCABULARY, LABELS, POSITIONS = 3, 4, 4, 24, 64, 3, 40
"""The sizes of a tiny model; 24 neurons and a hidden size of 16 are no multiples of one another."""

HIDDEN = HEADS * HEAD_SIZE


_AS_RELEASED: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
}


def typical_config(model_type: str) -> PretrainedConfig:
    """A config of a family as its released models have it, where the defaults of its class say something else.

    Args:
        model_type: a model type of Transformers.
    """
    config: PretrainedConfig = AutoConfig.for_model(model_type, **_AS_RELEASED.get(model_type, {}))
    return config


def tiny_config(config: PretrainedConfig, family: Family | None = None) -> PretrainedConfig:
    """A config of the same architecture with three blocks, four heads of 4, 24 neurons and 64 words.

    Args:
        config: any config; what it says of norms, positions, biases and ties stays.
        family: names its fields; default: its family's description.

    Returns:
        A new config. Keys and values keep being shared by two queries where they are shared.
    """
    family = family_of(config) if family is None else family
    sizes = _sizes(config, family)
    said = {name: value for name, value in config.to_diff_dict().items() if name not in _WRITTEN_BY_TRANSFORMERS}
    # lists with an entry for each block follow from the other fields where they are not said
    said = {name: value for name, value in said.items() if name not in family.per_layer}
    tiny: Any = type(config)(**(said | sizes))
    tiny.num_labels = LABELS
    if family.decoder is not None:
        # T5's config has no field for it
        tiny.decoder_start_token_id = 0
    return tiny


_WRITTEN_BY_TRANSFORMERS = frozenset(
    "model_type transformers_version architectures _name_or_path name_or_path quantization_config auto_map torch_dtype "
    "dtype id2label label2id num_labels".split()
)


def _sizes(config: PretrainedConfig, family: Family) -> dict[str, Any]:
    known = type(config)().to_dict() | config.to_dict()
    shared = bool(family.key_value_heads) and known.get(family.key_value_heads) not in (None, known[family.num_heads])
    wanted: dict[str, Any] = {
        family.num_layers: LAYERS,
        family.num_heads: HEADS,
        family.hidden_size: HIDDEN,
        family.intermediate_size: FFN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **dict.fromkeys(("cls_token_id", "sep_token_id", "unk_token_id", "mask_token_id", "decoder_start_token_id"), 0),
        **dict.fromkeys(("sliding_window", "local_attention"), 6),
        "embedding_size": known.get("embedding_size"),
    }
    if known.get("rotary_dim") is not None:
        wanted["rotary_dim"] = HEAD_SIZE
    if known.get("pooler_hidden_size") is not None:
        wanted["pooler_hidden_size"] = HIDDEN
    if family.key_value_heads:
        wanted[family.key_value_heads] = HEADS // 2 if shared else HEADS
    if family.head_size and known.get(family.head_size) is not None:
        wanted[family.head_size] = HEAD_SIZE
    for stack in family.stacks[1:]:
        wanted |= {stack.num_layers: LAYERS, stack.num_heads: HEADS, stack.intermediate_size: FFN}
    if wanted["embedding_size"] is not None:
        same = known["embedding_size"] == known[family.hidden_size]
        wanted["embedding_size"] = HIDDEN if same else HIDDEN // 2
    if known.get("sliding_window") is None:
        del wanted["sliding_window"]
    # what trains must compute what it computes in evaluation
    drops = ("dropout", "drop", "pdrop", "dropout_prob", "dropout_rate")
    wanted |= {name: 0.0 for name, value in known.items() if isinstance(value, float) and name.endswith(drops)}
    return {name: value for name, value in wanted.items() if name in known and value is not None}


def tiny_model(config: PretrainedConfig, *, seed: int = 0, family: Family | None = None) -> PreTrainedModel:
    """A tiny random model of a config's architecture, in evaluation mode.

    Its weights and biases are larger than those of a new model, so that every part shows in the outputs.

    Args:
        config: see :func:`tiny_config`; models of causal families predict the next token, those of an encoder and a
            decoder write texts, others classify.
        seed: seed of the weights.
        family: as for :func:`tiny_config`; of an unknown one it is not known yet whether it is causal, and it is taken
            for one if Transformers has no masked language model of it.

    Raises:
        LmcompressError: If Transformers has no model of this config with such a head.
    """
    described = family_of(config) if family is None else family
    try:
        tiny = tiny_config(config, family)
        causal = described.causal
        if family is not None:
            causal = type(tiny) not in cast(Any, AutoModelForMaskedLM)._model_mapping
        kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        kind = kind if described.decoder is None else AutoModelForSeq2SeqLM
        kind = kind if type(tiny) in kind._model_mapping else AutoModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind.from_config(copy.deepcopy(tiny))
    except Exception as error:
        said = " ".join(str(error).split())
        raise LmcompressError(f"no tiny {config.model_type} can be built: {type(error).__name__}: {said}") from error
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif id(parameter) in norms:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tiny_inputs(
    model: PreTrainedModel, *, rows: int = 3, length: int = 9, seed: int = 0, padded: bool = True
) -> dict[str, Tensor]:
    """Random token ids.

    Args:
        model: its vocabulary bounds the ids.
        rows: number of rows.
        length: tokens of a row.
        seed: seed of the ids.
        padded: whether the second half of the last row is padding.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(rows, length)`` int64; for an encoder and a decoder also
        ``decoder_input_ids`` and ``decoder_attention_mask``, two tokens shorter.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, int(model.config.vocab_size), (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, length // 2 :] = 0
    if not (is_described(model) and anatomy_of(model).reads_encoder):
        return {"input_ids": ids, "attention_mask": mask}
    targets = torch.randint(2, int(model.config.vocab_size), (rows, length - 2), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": targets,
        "decoder_attention_mask": mask[:, 2:].clone(),
    }
