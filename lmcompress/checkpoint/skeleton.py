"""A compressed model from a config alone, for libraries that load weights into a model themselves."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.behaviour import behave
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.encoding import encode_skeleton
from lmcompress.checkpoint.guard import open_config
from lmcompress.checkpoint.layers import replace_skeleton
from lmcompress.checkpoint.schema import SharedBlocks
from lmcompress.checkpoint.structure import shape_skeleton, stock_structure
from lmcompress.errors import LmcompressError


def model_from_config(config: PretrainedConfig, auto_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """A model in the shapes that the config of a checkpoint describes, without the checkpoint's weights.

    ``AutoModel….from_config`` knows stock shapes only. Dense weights have the initial values of the family; codes have
    none, so packed models are built on ``meta``, as accelerate's ``init_empty_weights`` does, and filled by
    ``load_checkpoint_and_dispatch``. As with any model built so, call ``model.tie_weights()`` in between.

    Args:
        config: config of any checkpoint, compressed or not; unchanged.
        auto_class: class such as ``AutoModelForSequenceClassification``; default: the class that wrote the checkpoint.
        **kwargs: passed to ``from_config``.

    Raises:
        CheckpointError: If the config contradicts itself.
        LmcompressError: If blocks share parameters, tensors are streams, or a packed model is not built on ``meta``.
    """
    stock_structure(config)
    config = open_config(copy.deepcopy(config))
    recorded = recorded_compression(config)
    if recorded is not None:
        config.quantization_config = recorded
        if any(isinstance(entry, SharedBlocks) for entry in recorded.layers):
            raise LmcompressError(
                "blocks that share parameters need from_pretrained, which ties them once they are loaded"
            )
        if recorded.storage is not None and recorded.storage.streams:
            raise LmcompressError(
                "tensors that are streams need from_pretrained, which decodes them; or save with storage='plain'"
            )
    model: PreTrainedModel = _class_for(config, auto_class)(config, **kwargs)
    if recorded is None:
        return model
    if recorded.encoding is not None and any(not parameter.is_meta for parameter in model.parameters()):
        raise LmcompressError(
            "a packed model has no initial values: build it on meta, with accelerate's init_empty_weights() or "
            "torch.device('meta'), and load a checkpoint into it; or use from_pretrained"
        )
    if recorded.structure is not None:
        shape_skeleton(model, recorded.structure)
    replace_skeleton(model, recorded.layers)
    if recorded.encoding is not None:
        encode_skeleton(model, recorded.encoding)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.init_weights()
    behave(model)
    return model.eval()


def _class_for(config: PretrainedConfig, auto_class: Any) -> Any:
    if auto_class is not None:
        return auto_class.from_config if hasattr(auto_class, "from_config") else auto_class._from_config
    found = getattr(transformers, (config.architectures or [""])[0], None)
    return transformers.AutoModel.from_config if found is None else found._from_config
