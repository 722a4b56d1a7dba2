"""Fake-quantized activations: ranges computed from every input, calibrated, or learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.errors import LmcompressError
from lmcompress.nn.packed import InputRange
from lmcompress.nn.quantized_attention import Role
from lmcompress.numerics.activations import initial_range, initial_step, learned
from lmcompress.numerics.inputs import quantize_input, static_range
from lmcompress.numerics.observers import Histogram, MinMax
from lmcompress.numerics.padding import real
from lmcompress.quantization.config import ActivationScheme

_NOT_CALIBRATED = (
    "has a range that must be calibrated first: give FakeQuantized batches, or call its calibrate(batches) with a few"
)


@dataclass
class _Seen:
    """The observations of one activation in calibration."""

    ranges: MinMax | Histogram
    step: Tensor | None = None
    count: int = 0


class FakeActivation(nn.Module):
    """The quantizer of one activation; several modules that read the same tensor share one.

    Attributes:
        name: name of the activation.
        scheme: its scheme, with ``symmetric`` resolved.
        enabled: whether it quantizes.
        step: for learned ranges, ``(1, 1)``; NaN until calibrated.
        offset: for learned ranges that are not symmetric, ``(1, 1)``.
        scale: for static ranges, ``(1,)``; NaN until calibrated.
        zero_point: for static ranges that are not symmetric, ``(1,)`` uint8.

    Args:
        name: name of the activation in errors.
        scheme: its scheme.
        readers: number of modules that read the same tensor.
    """

    step: Tensor | None
    offset: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, name: str, scheme: ActivationScheme, *, readers: int = 1) -> None:
        super().__init__()
        self.name, self.scheme, self.enabled = name, scheme, True
        self._readers = readers
        self._encoding = scheme.encoding()
        self._ready = scheme.range == "dynamic"
        self._seen: _Seen | None = None
        # input, whether with gradient, result, number of modules that have yet to read it
        self._kept: tuple[Tensor, bool, Tensor, int] | None = None
        learns, fixed, shifted = scheme.range == "learned", scheme.range == "static", not scheme.symmetric
        # NaN is a range that calibration never produces
        self.step = nn.Parameter(torch.full((1, 1), torch.nan)) if learns else None
        self.offset = nn.Parameter(torch.full((1, 1), torch.nan)) if learns and shifted else None
        self.register_buffer("scale", torch.full((1,), torch.nan) if fixed else None)
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.uint8) if fixed and shifted else None)

    def active(self) -> bool:
        """Whether it currently quantizes or calibrates."""
        return self.enabled or self._seen is not None

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activation.

        Args:
            x: ``(batch, length, ...)``, or with heads as the second axis.

        Returns:
            The same shape and dtype.

        Raises:
            LmcompressError: If its range is not calibrated.
        """
        if self._seen is not None:
            self._look(x.detach(), self._seen)
            return x
        if not self.enabled:
            return x
        if self._readers == 1 or torch.compiler.is_compiling():
            return self._quantized(x)
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is x and kept[1] == torch.is_grad_enabled():
            values, left = kept[2], kept[3] - 1
        else:
            values, left = self._quantized(x), self._readers - 1
        if left:
            self._kept = x, torch.is_grad_enabled(), values, left
        return values

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forward pre-hook of a module that reads the activation.

        Args:
            module: the module.
            args: its inputs.

        Returns:
            The same with the first argument quantized.
        """
        return (self(args[0]), *args[1:])

    def watch(self) -> None:
        """Calibrate from now on: observe inputs, and pass them unchanged."""
        if self.scheme.range != "dynamic":
            least = self.scheme.range == "learned" or self.scheme.calibration == "minmax"
            self._seen = _Seen(MinMax() if least else Histogram())

    def freeze(self, *, discard: bool = False) -> None:
        """End calibration, and set the observed range.

        Args:
            discard: whether to keep the previous range instead.

        Raises:
            LmcompressError: If calibration observed nothing, or only zeros.
        """
        seen, self._seen = self._seen, None
        if seen is None or discard:
            return
        try:
            self._take(seen)
        except LmcompressError as error:
            raise LmcompressError(f"{self.name}: {error}") from error
        self._ready = True

    def final(self) -> tuple[ActivationEncoding, InputRange | None]:
        """The description of the activation in a checkpoint, and its range unless that is dynamic.

        Returns:
            The description, and scale and zero point.

        Raises:
            LmcompressError: If its range is not calibrated.
        """
        if self.scheme.range == "dynamic":
            return self._encoding, None
        self._need_range()
        if self.scale is not None:
            return self._encoding, (self.scale.detach().clone(), _cloned(self.zero_point))
        assert self.step is not None
        last = learned(torch.zeros(1, device=self.step.device), self.step, self.offset, bits=self.scheme.bits)
        zero_point = None if last.zero_points is None else last.zero_points.reshape(1)
        return self._encoding, (last.scales.reshape(1).clone(), zero_point)

    def forget(self) -> None:
        """Clear the cached tensor."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        # values with a graph cannot be copied
        return {**self.__dict__, "_kept": None}

    def _quantized(self, x: Tensor) -> Tensor:
        self._need_range()
        device = next((t.device for t in (self.step, self.scale) if t is not None), x.device)
        if device != x.device:
            self.to(x.device)
        if self.step is not None:
            return learned(x, self.step, self.offset, bits=self.scheme.bits).values.to(x.dtype)
        return quantize_input(x, self._encoding, self.scale, self.zero_point).values.to(x.dtype)

    def _calibrated(self) -> bool:
        if not self._ready:
            # a loaded state is a range as well; checked once, because the host waits for it
            tensor = self.step if self.step is not None else self.scale
            self._ready = tensor is not None and bool(torch.isfinite(tensor).all())
        return self._ready

    def _need_range(self) -> None:
        if not self._calibrated():
            raise LmcompressError(f"{self.name} {_NOT_CALIBRATED}")

    def _look(self, x: Tensor, seen: _Seen) -> None:
        mask = real(x)
        x = x if mask is None else x[mask.expand(x.shape)]
        seen.ranges = seen.ranges.updated(x)
        if self.scheme.range == "learned" and self.scheme.symmetric and x.numel() and bool(x.any()):
            step = initial_step(x, bits=self.scheme.bits).to(x.device) * x.numel()
            seen.step = step if seen.step is None else seen.step + step
        seen.count += x.numel()

    def _take(self, seen: _Seen) -> None:
        if isinstance(seen.ranges, MinMax):
            low, high = seen.ranges.range()
        elif self.scheme.calibration == "percentile":
            low, high = seen.ranges.percentile_range(self.scheme.percentile)
        else:
            low, high = seen.ranges.mse_range(bits=self.scheme.bits, symmetric=bool(self.scheme.symmetric))
        with torch.no_grad():
            if self.scale is not None:
                scale, zero_point = static_range(low, high, self._encoding)
                self.scale.copy_(scale)
                if zero_point is not None and self.zero_point is not None:
                    self.zero_point.copy_(zero_point)
            elif self.offset is not None and self.step is not None:
                step, offset = initial_range(low, high, bits=self.scheme.bits)
                self.step.copy_(step)
                self.offset.copy_(offset)
            elif self.step is not None and seen.step is not None:
                self.step.copy_(seen.step / seen.count)


@contextmanager
def calibrating(activations: Sequence[FakeActivation]) -> Iterator[None]:
    """Calibrate activations while the block runs; their ranges are set at its end, or kept if it fails.

    Padding that is known (:mod:`lmcompress.numerics.padding`) is not observed.

    Args:
        activations: those whose range is not dynamic.

    Yields:
        Nothing.

    Raises:
        LmcompressError: If one of them observed nothing, or only zeros.
    """
    complete = False
    for activation in activations:
        activation.watch()
    try:
        yield
        complete = True
    finally:
        for activation in activations:
            activation.freeze(discard=not complete)


class AttentionFakes:
    """The quantizers of one attention module's activations."""

    def __init__(self, roles: Mapping[Role, FakeActivation]) -> None:
        self.roles = dict(roles)

    def active(self) -> bool:
        """Whether any of them currently quantizes or calibrates."""
        return any(activation.active() for activation in self.roles.values())

    def __call__(self, role: Role, x: Tensor) -> Tensor:
        return cast(Tensor, self.roles[role](x)) if role in self.roles else x


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
