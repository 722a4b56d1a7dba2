"""The positions of a model: how many there are, and the number of the first."""

from __future__ import annotations

from transformers import PretrainedConfig

UNLIMITED = 1 << 30
"""Stands for the positions of a model that has no table of them."""

_COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm")


def positions_of(config: PretrainedConfig) -> int:
    """The maximum number of tokens of a model's input.

    Args:
        config: config of the model.

    Returns:
        :data:`UNLIMITED` for a model without a table of positions.
    """
    most = getattr(config, "max_position_embeddings", None)
    return UNLIMITED if most is None else int(most) - first_position(config)


def first_position(config: PretrainedConfig) -> int:
    """The number of the first token's position: not 0 in families that count from the id of the padding.

    Args:
        config: config of the model.
    """
    return int(config.pad_token_id or 0) + 1 if config.model_type in _COUNTED_FROM_PADDING else 0
