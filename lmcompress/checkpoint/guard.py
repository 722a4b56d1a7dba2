"""A word in ``config.json`` that keeps software without lmcompress from building stock shapes for compressed weights.

Transformers only warns of a quantization method that it does not know, builds the stock model, and then finds tensors
of other shapes: an error, but not with ``ignore_mismatched_sizes=True``, which fills them with random values. It also
checks ``experts_implementation`` of every config while it builds a model, whether the model has experts or not, and
refuses a name that it does not know, with that name in the message. No model of a family described here has experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer

FIELD = "experts_implementation"
_INTERNAL = "_experts_implementation"

NATIVE = "this checkpoint is compressed: `import lmcompress`, then use from_pretrained"
SELF_LOADING = (
    "this checkpoint is compressed: use from_pretrained with trust_remote_code=True, or after `import lmcompress`"
)
WORDS = (NATIVE, SELF_LOADING)


def allow() -> None:
    """Let Transformers build configs with the word, where it has no hook that could take the word away before."""
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        for word in WORDS:
            ALL_EXPERTS_FUNCTIONS.register(word, _no_experts)


def open_config(config: Any) -> Any:
    """Take the word from a config that was read, so that a model can be built.

    Args:
        config: modified in place.

    Returns:
        The same config.
    """
    if getattr(config, _INTERNAL, None) in WORDS:
        setattr(config, _INTERNAL, None)
    return config


def open_model(model: PreTrainedModel) -> None:
    """The same for a model that was built with the word.

    Args:
        model: its config is modified in place.
    """
    if getattr(model.config, _INTERNAL, None) in WORDS:
        setattr(model.config, f"{_INTERNAL}_internal", model.get_correct_experts_implementation(None))


def guard_config(config: PretrainedConfig, needed: bool) -> None:
    """Let every ``save_pretrained`` of a config write the word, or no longer.

    Args:
        config: modified in place; a model can be built from it as before.
        needed: whether a stock model of this config would not be what its weights belong to.
    """
    if needed:
        setattr(config, FIELD, NATIVE)
    else:
        config.__dict__.pop(FIELD, None)


def guard_folder(folder: Path, word: str) -> None:
    """Write the word into a checkpoint.

    Args:
        folder: holds ``config.json``.
        word: one of :data:`WORDS`.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config[FIELD] = word
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _no_experts(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(NATIVE)
