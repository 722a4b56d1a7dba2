"""The model inside the wrappers that others put around it: ``torch.compile`` and PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError


def inner_model(model: Any, *, prompts: bool = False) -> Any:
    """The ``PreTrainedModel`` inside of a compiled model or a ``PeftModel``, which computes the same as the whole.

    Adapters of a ``PeftModel`` are modules inside of the model that it wraps, so they still take part.

    Args:
        model: anything; what is no such wrapper is returned unchanged.
        prompts: whether a ``PeftModel`` may learn a prompt, for what does not depend on it.

    Returns:
        The model; it is the same object at every call.

    Raises:
        LmcompressError: If a ``PeftModel`` learns a prompt, which its model does not see, and ``prompts`` is false.
    """
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.Module) and isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif hasattr(type(model), "get_base_model") and hasattr(model, "peft_config"):
            if not prompts:
                _refuse_prompts(model)
            model = model.get_base_model()
        else:
            break
    return model


def without_adapter(module: nn.Module) -> nn.Module:
    """The layer that an adapter is wrapped around, or the module itself.

    Args:
        module: any module.
    """
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in a model, the first if it has several.

    Args:
        model: the model.
        wanted: one of its modules.
    """
    return next(name for name, module in model.named_modules() if module is wanted)


def input_names(model: nn.Module) -> frozenset[str]:
    """Names of the inputs that a model takes by its ``forward``.

    Args:
        model: its class's method is read, as accelerate and hooks wrap the instance's. A method with ``*args`` or
            ``**kwargs`` passes on what the classes it is derived from take.
    """
    names: set[str] = set()
    for known in type(model).__mro__:
        forward = vars(known).get("forward")
        if forward is None or known is nn.Module:
            continue
        parameters = inspect.signature(forward).parameters.values()
        names.update(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            break
    return frozenset(names - {"self"})


def with_decoder_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with the inputs of the decoder, for a language model with an encoder and a decoder; others need none.

    Args:
        model: any ``PreTrainedModel``.
        batch: tensors by name.

    Returns:
        With ``decoder_input_ids`` and ``decoder_attention_mask``, made from the labels if they are missing: the labels
        one position later, as the model makes them itself. Tokens without a label are padding.

    Raises:
        LmcompressError: If there are neither labels nor inputs of the decoder.
    """
    named = dict(batch)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if not getattr(model.config, "is_encoder_decoder", False) or shift is None:
        # a classifier shifts the inputs of its encoder
        return named
    if {"decoder_input_ids", "decoder_inputs_embeds"} & named.keys():
        return named
    labels = named.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise LmcompressError(
            f"a batch for a {type(model).__name__} must have decoder_input_ids, or labels from which they are made, "
            f"got {', '.join(named) or 'nothing'}: tokenize the targets too (text_target=)"
        )
    named["decoder_input_ids"] = shift(labels)
    named.setdefault("decoder_attention_mask", (labels != -100).long())
    return named


def _refuse_prompts(model: Any) -> None:
    configs = model.peft_config.values() if isinstance(model.peft_config, dict) else [model.peft_config]
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise LmcompressError(
            f"{type(model).__name__} learns a prompt or a prefix, which the model inside does not see, so that its "
            "layers cannot be compared or compressed: use an adapter such as LoRA, or the model without it"
        )
