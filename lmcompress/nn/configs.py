"""The config object of a model, which other models may hold too."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig, PreTrainedModel


def own_config(model: PreTrainedModel) -> PretrainedConfig:
    """Give a model a config object that no other model holds, before that is changed.

    Models that were built from one config share it, and each reads its sizes and its attention from it.

    Args:
        model: the whole model, not a part of one: parts get the new object, what the model is a part of keeps the old.

    Returns:
        The new config, equal to the old one.
    """
    shared = model.config
    own: PretrainedConfig = copy.deepcopy(shared)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.__dict__["config"] = own
    return own
