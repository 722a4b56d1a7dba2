"""What any model shows without a description of its family: a list of blocks, and the token embeddings."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from lmcompress.errors import UnknownFamilyError
from lmcompress.families.base import Family

_REPEATED = re.compile(r"(^|\.)\d+\.")


def outlined(model: PreTrainedModel) -> Family:
    """A description of a model that has the place of its blocks and embeddings, and no part of a block.

    The blocks are the heaviest list of modules of one class; of an encoder–decoder that of one of its stacks.

    Args:
        model: on any device, ``meta`` too.

    Raises:
        UnknownFamilyError: If it has no list of blocks.
    """
    base: nn.Module = model.base_model
    weights = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    if not weights:
        raise UnknownFamilyError(
            f"a {type(model).__name__} must have a list of blocks of one class (ModuleList) to be compressed, found "
            "none"
        )
    embeddings = model.get_input_embeddings()
    return Family(
        model_type=model.config.model_type,
        blocks=max(weights, key=lambda path: weights[path]),
        word_embeddings=next((path for path, module in base.named_modules() if module is embeddings), ""),
        attention="",
        attention_out="",
        ffn_in="",
        ffn_out="",
        position_embeddings="",
        num_layers="",
        num_heads="",
        hidden_size="",
        intermediate_size="",
        head_attributes=lambda heads, head_size: {},
    )


def is_repeated(path: str) -> bool:
    """Whether a module is part of one of several alike, such as a block.

    Args:
        path: path of the module.
    """
    return _REPEATED.search(path) is not None
