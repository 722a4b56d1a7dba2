"""Packed models with other ranges of activations: static ones calibrated, dynamic ones, or none.

A graph with other ranges than those of the packed model is compared with a packed model that has the same ranges, so
that the round-trip check stays exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hooks import model_inputs
from lmcompress.activations.running import evaluating
from lmcompress.errors import LmcompressError, argument
from lmcompress.export.config import Activations, Target
from lmcompress.nn.packed import Packed, TiedHead
from lmcompress.nn.quantized_attention import AttentionQuantizers, Role
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.observers import MinMax
from lmcompress.numerics.padding import real


def wanted_range(activations: Activations, to: Target) -> str:
    """The ranges that a graph is to have: ``as trained``, ``static``, ``dynamic`` or ``none``.

    Args:
        activations: as asked for.
        to: the runtime; OpenVINO has integer matmuls for static ranges only.
    """
    if activations == "auto":
        return "static" if to == "openvino" else "as trained"
    return activations


def with_ranges(
    model: PreTrainedModel, ranges: str, batches: Sequence[Mapping[str, Tensor]] | None
) -> tuple[PreTrainedModel, int]:
    """A packed model with other ranges of activations.

    Args:
        model: unchanged.
        ranges: of :func:`wanted_range`.
        batches: real inputs to calibrate static ranges on, or None.

    Returns:
        A copy, or the model itself where nothing changes, and the number of activations whose ranges changed.

    Raises:
        LmcompressError: If ranges must be calibrated and there are no batches, or they show only zeros.
    """
    other = {"static": "dynamic", "dynamic": "static"}.get(ranges)
    changed = [] if ranges == "as trained" else [one for one in _encoded(model) if other in (None, one.range)]
    if not changed:
        return model, 0
    if ranges == "static" and not batches:
        raise LmcompressError(
            f"{len(changed)} activations of this model have dynamic ranges, and the export needs static ones, which "
            f"are calibrated on real inputs: give {argument('batches')}, or export for ONNX Runtime, where dynamic "
            "ranges can stay as they are"
        )
    twin = copy.deepcopy(model)
    if ranges == "static":
        _calibrate(twin, batches or [])
    else:
        for one in _encoded(twin):
            one.set(None if ranges == "none" else "dynamic")
    return twin, len(changed)


class _Encoded:
    """One quantized activation of a model: the input of a packed matmul, or an operand of attention."""

    def __init__(self, name: str, owner: Packed | AttentionQuantizers, reader: nn.Module, role: str | None) -> None:
        self.name, self.owner, self.reader, self.role = name, owner, reader, role

    @property
    def encoding(self) -> Any:
        """Its description."""
        return self.owner.inputs if isinstance(self.owner, Packed) else self.owner.encodings[cast(Role, self.role)]

    @property
    def range(self) -> str:
        """``dynamic`` or ``static``."""
        return str(self.encoding.range)

    def set(self, range: str | None, scale: Tensor | None = None, zero_point: Tensor | None = None) -> None:
        """Give it another range; None leaves the activation unquantized."""
        cut = {"granularity": "tensor", "clip": None} if range == "static" else {"full": False}
        encoding = None if range is None else self.encoding.model_copy(update={"range": range, **cut})
        prefix = "input" if self.role is None else self.role
        self.owner.register_buffer(f"{prefix}_scale", scale)
        self.owner.register_buffer(f"{prefix}_zero_point", zero_point)
        if isinstance(self.owner, Packed):
            self.owner.inputs = encoding
            self.owner.forget()
        elif encoding is None:
            del self.owner.encodings[cast(Role, self.role)]
        else:
            self.owner.encodings[cast(Role, self.role)] = encoding


def _encoded(model: PreTrainedModel) -> list[_Encoded]:
    heads = {id(m.__dict__["embedding"]): m for m in model.modules() if isinstance(m, TiedHead)}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Packed) and module.inputs is not None:
            found.append(_Encoded(name, module, heads.get(id(module), module), None))
        elif isinstance(module, AttentionQuantizers):
            found += [_Encoded(f"{name}.{role}", module, module, role) for role in module.encodings]
    return found


def _calibrate(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Set static ranges, minimum to maximum without padding, in place of dynamic ones."""
    wanted = [one for one in _encoded(model) if one.range == "dynamic"]
    seen = {one.name: MinMax() for one in wanted}
    handles = [one.reader.register_forward_pre_hook(_observer(one, seen)) for one in wanted]
    try:
        with evaluating(model):
            for batch in batches:
                model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    for one in wanted:
        static = one.encoding.model_copy(update={"range": "static", "granularity": "tensor", "clip": None})
        try:
            low, high = seen[one.name].range()
            scale, zero_point = static_range(low, high, static)
        except LmcompressError as error:
            raise LmcompressError(f"{one.name}: {error}") from error
        one.set("static", scale, zero_point)


def _observer(one: _Encoded, seen: dict[str, MinMax]) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
        if one.role is not None and args[0] != one.role:
            return
        x: Tensor = args[-1].detach()
        if (clip := one.encoding.clip) is not None:
            x = x.clamp(-clip, clip)
        mask = real(x)
        seen[one.name] = seen[one.name].updated(x if mask is None else x[mask.expand(x.shape)])

    return observe


def described(model: PreTrainedModel) -> str:
    """The ranges of a model's activations in a word or two: ``static``, ``dynamic``, both, or ``none``.

    Args:
        model: packed or not.
    """
    return " and ".join(sorted({one.range for one in _encoded(model)})) or "none"
