"""The only package that knows the structure of BERT, GPT-2 and other families.

A family is a :class:`Family`: the paths of its parts. To add one, write it in a file of this package and name it in
:data:`FAMILIES`; ``tests/families.py`` has the line that puts it through every test.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.errors import UnknownFamilyError
from lmcompress.families.bart import BART, MBART
from lmcompress.families.base import Anatomy, Block, Family, choose_layers_in_config, config_value
from lmcompress.families.bert import (
    BERT,
    CAMEMBERT,
    DATA2VEC_TEXT,
    ELECTRA,
    ERNIE,
    ROBERTA,
    ROBERTA_PRELAYERNORM,
    XLM_ROBERTA,
)
from lmcompress.families.coupled import BLOCK_PARTS, STAGES, Coupled
from lmcompress.families.deberta import DEBERTA_V2
from lmcompress.families.distilbert import DISTILBERT
from lmcompress.families.foreign import merge_adapters, refuse_foreign
from lmcompress.families.gemma import GEMMA
from lmcompress.families.gpt2 import GPT2
from lmcompress.families.gpt_neox import GPT_NEOX
from lmcompress.families.gptj import GPTJ
from lmcompress.families.inside import inner_model, input_names, name_of, with_decoder_inputs
from lmcompress.families.llama import (
    ARCEE,
    COHERE,
    ERNIE4_5,
    EUROBERT,
    GLM,
    GRANITE,
    HELIUM,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
    STARCODER2,
)
from lmcompress.families.matrices import in_features, is_conv1d, new_projection, out_features, weight_view
from lmcompress.families.modernbert import MODERNBERT
from lmcompress.families.mpnet import MPNET
from lmcompress.families.narrow import ZeroWidthLinear, narrow_stream, stream_axes
from lmcompress.families.opt import OPT
from lmcompress.families.outline import outlined
from lmcompress.families.outputs import head_logits
from lmcompress.families.phi import PHI
from lmcompress.families.phi3 import PHI3
from lmcompress.families.t5 import T5

__all__ = [
    "BLOCK_PARTS",
    "FAMILIES",
    "STAGES",
    "Anatomy",
    "Block",
    "Coupled",
    "Family",
    "ZeroWidthLinear",
    "anatomy_of",
    "choose_layers_in_config",
    "config_value",
    "family_of",
    "head_logits",
    "in_features",
    "inner_model",
    "input_names",
    "is_conv1d",
    "is_described",
    "merge_adapters",
    "name_of",
    "narrow_stream",
    "new_projection",
    "outline_of",
    "out_features",
    "readers_of_encoder",
    "refuse_foreign",
    "stream_axes",
    "weight_view",
    "with_decoder_inputs",
]

_RELATIVES = (XLM_ROBERTA, CAMEMBERT, DATA2VEC_TEXT, ERNIE, ROBERTA_PRELAYERNORM)
_ENCODERS = (BERT, ROBERTA, DISTILBERT, ELECTRA, *_RELATIVES, MODERNBERT, EUROBERT, MPNET, DEBERTA_V2)
_LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, HELIUM, SEED_OSS, ERNIE4_5, ARCEE, GLM, STARCODER2)
_DECODERS = (GPT2, *_LLAMAS, GEMMA, PHI3, PHI, COHERE, GPT_NEOX, GPTJ, OPT)
_PAIRS = (BART, MBART, T5)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_ENCODERS, *_DECODERS, *_PAIRS)}


def family_of(config: PretrainedConfig) -> Family:
    """The description of the family that a config belongs to.

    Args:
        config: any Transformers config.

    Raises:
        UnknownFamilyError: If the family is not described; the message names those that are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownFamilyError(
            f"lmcompress does not know the model family {config.model_type!r}. "
            f"It knows: {', '.join(sorted(FAMILIES))}. Quantization without training, sparsity, clustering and storage "
            "need no description and work with any list of blocks; pruning of structures, students and the matching of "
            "layers need one. "
            "To add one, describe its parts as a Family in lmcompress/families/ and name it in FAMILIES there "
            "(CONTRIBUTING.md, 'A new family')."
        )
    # what a config does not name is off, as the models read it
    has = {
        field: getattr(config, field, type(value)()) for v in (family, *family.variants) for field, value in v.expects
    }
    for variant in (family, *family.variants):
        if all(has[field] == value for field, value in variant.expects):
            return variant
    for field, value in family.expects:
        if has[field] != value:
            raise UnknownFamilyError(
                f"lmcompress knows {config.model_type} with {field}={value}, and this config has "
                f"{field}={has[field]}, whose blocks compute in another order"
            )
    return family


def readers_of_encoder(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of a decoder that compute attention to an encoder; none in other models.

    Args:
        model: a model of a known family.
    """
    return [block.get("cross_attention") for block in outline_of(model).blocks if block.has("cross_attention")]


def is_described(model: Any) -> bool:
    """Whether something is a model of Transformers of a family described here.

    Args:
        model: anything.
    """
    return isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """A model seen through its family.

    Args:
        model: a ``PreTrainedModel``, with or without a head.

    Raises:
        UnknownFamilyError: If the family is not described, or the model has only one of its two stacks.
    """
    family = family_of(model.config)
    if family.decoder is not None:
        try:
            for stack in family.stacks:
                model.base_model.get_submodule(stack.blocks)
        except AttributeError:
            raise UnknownFamilyError(
                f"lmcompress knows {family.model_type} with an encoder and a decoder, and a {type(model).__name__} has "
                f"only one of them: load it as {family.model_type}'s model for conditional generation"
            ) from None
    return Anatomy(model, family)


def outline_of(model: PreTrainedModel) -> Anatomy:
    """A model seen through its family, or where that is not described, its blocks without their parts.

    Args:
        model: a ``PreTrainedModel``, with or without a head.

    Raises:
        UnknownFamilyError: If the family is not described and the model has no list of blocks of one class.
    """
    return anatomy_of(model) if is_described(model) else Anatomy(model, outlined(model))
