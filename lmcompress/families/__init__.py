"""The only package that knows the structure of BERT, GPT-2 and other families.

A family is a :class:`Family`: the paths of its parts. To add one, write it in a file of this package and name it in
:data:`FAMILIES`; ``tests/families.py`` has the line that puts it through every test.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.errors import UnknownFamilyError
from lmcompress.families.base import (
    Anatomy,
    Block,
    Family,
    config_value,
    in_features,
    is_conv1d,
    new_projection,
    out_features,
    weight_view,
)
from lmcompress.families.bert import BERT, ELECTRA, ROBERTA
from lmcompress.families.distilbert import DISTILBERT
from lmcompress.families.gpt2 import GPT2
from lmcompress.families.narrow import ZeroWidthLinear, narrow_stream, stream_axes

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Block",
    "Family",
    "ZeroWidthLinear",
    "anatomy_of",
    "config_value",
    "family_of",
    "in_features",
    "is_conv1d",
    "narrow_stream",
    "new_projection",
    "out_features",
    "stream_axes",
    "weight_view",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, ROBERTA, DISTILBERT, ELECTRA, GPT2)}


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
            f"It knows: {', '.join(sorted(FAMILIES))}. "
            "To add one, describe its parts as a Family in lmcompress/families/ and name it in FAMILIES there "
            "(CONTRIBUTING.md, 'A new family')."
        )
    return family


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """A model seen through its family.

    Args:
        model: a ``PreTrainedModel``, with or without a head.

    Raises:
        UnknownFamilyError: If the family is not described.
    """
    return Anatomy(model, family_of(model.config))
