"""What other libraries put into a model, and lmcompress cannot change: adapters, masks, their quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmcompress.errors import LmcompressError
from lmcompress.nn.packed import Packed

_QUANTIZED = (
    "torchao",
    "torch.ao.nn",
    "bitsandbytes",
    "hqq",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "optimum.quanto",
    "quanto",
)
"""Packages whose modules or tensors hold quantized weights."""


def refuse_foreign(module: nn.Module, verb: str) -> None:
    """Refuse a model that carries what another library has put into it, before anything is changed.

    Args:
        module: a model, or a part of one.
        verb: what was to be done with it, such as ``"prune"``.

    Raises:
        LmcompressError: If it has adapters (PEFT), masks of ``torch.nn.utils.prune``, or weights quantized by another
            library; the message names the first such module and the way out.
    """
    if (where := adapter_of(module)) is not None:
        raise LmcompressError(
            f"cannot {verb} a model with adapters (PEFT), got one at {where or 'its root'}: merge it first with "
            "model = peft_model.merge_and_unload(), or take the model without it. An adapter from add_adapter is "
            "merged by lmcompress.families.merge_adapters(model), or removed by model.delete_adapter(name) and "
            "merge_adapters(model)"
        )
    for name, part in module.named_modules():
        where = name or type(part).__name__
        masked = next((n for n in part._buffers if n.endswith("_mask") and f"{n[:-5]}_orig" in part._parameters), None)
        if masked is not None:
            raise LmcompressError(
                f"cannot {verb} a model with masks of torch.nn.utils.prune, got one on {where}: make it permanent "
                f"first with torch.nn.utils.prune.remove(module, {masked[:-5]!r})"
            )
        if (library := library_of(part)) is not None:
            raise LmcompressError(_quantized(verb, library, where))
    stated = getattr(getattr(module, "config", None), "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, Mapping) else getattr(stated, "quant_method", None)
    if stated is not None and str(getattr(method, "value", method)) != "lmcompress":
        raise LmcompressError(_quantized(verb, str(getattr(method, "value", method)), "its config"))


def refuse_packed(module: nn.Module, verb: str) -> None:
    """Refuse a model whose weights are codes, before anything is changed.

    Args:
        module: any model.
        verb: what was to be done with it, such as ``"quantize"``.

    Raises:
        LmcompressError: If a module is packed; the message says where dense weights are to be had.
    """
    if any(isinstance(part, Packed) for part in module.modules()):
        raise LmcompressError(
            f"cannot {verb} a model that is packed already: {verb} the dense one that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives, or better the one that was packed"
        )


def adapter_of(module: nn.Module) -> str | None:
    """The path of the first adapter (PEFT) in a model, or None.

    Args:
        module: a model, a ``PeftModel``, or a part of one.
    """
    if hasattr(type(module), "get_base_model") and hasattr(module, "peft_config"):
        return ""
    for name, part in module.named_modules():
        if isinstance(part._modules.get("base_layer"), nn.Module):
            return name
    return None


def merge_adapters(model: nn.Module) -> None:
    """Merge every adapter into the layer that it wraps, and take it away: the model computes the same without PEFT.

    Args:
        model: modified in place: a model to which ``add_adapter`` was applied. Of a ``PeftModel`` take
            ``merge_and_unload()``.

    Raises:
        LmcompressError: If an adapter cannot be merged.
    """
    for name, part in list(model.named_modules()):
        if not isinstance(part._modules.get("base_layer"), nn.Module):
            continue
        layer: Any = part
        try:
            layer.merge()
            plain = layer.get_base_layer()
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise LmcompressError(f"the adapter at {name} ({type(part).__name__}) cannot be merged: {error}") from error
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    # what Transformers has recorded of them
    for mark in ("_hf_peft_config_loaded", "peft_config"):
        vars(model).pop(mark, None)


def library_of(module: nn.Module) -> str | None:
    """The library that has quantized a module's own weights, or None.

    Args:
        module: any module; those inside of it do not count.
    """
    origins = [f"{type(thing).__module__}." for thing in (module, *module._parameters.values())]
    return next((name for name in _QUANTIZED if any(origin.startswith(f"{name}.") for origin in origins)), None)


def _quantized(verb: str, library: str, where: str) -> str:
    return (
        f"cannot {verb} a model that is quantized by another library ({library}), as {where} is: take the dense model "
        "that it was made from, and quantize the result"
    )
