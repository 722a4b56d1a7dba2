r"""Kernel dispatch: matmuls with packed matrices, and the reference that is always available.

============= ====== ============================================================ =====================================
kernel        device operation                                                    what it needs
============= ====== ============================================================ =====================================
``onednn``    CPU    ``onednn::qlinear_pointwise``                                oneDNN in torch
``fbgemm``    CPU    ``quantized::linear_with_input_q_dq_qweight_dq_output_fp32`` x86 (FBGEMM in torch); first for up to
                                                                                  8 tokens
``int_mm``    any    ``torch._int_mm``                                            on a GPU its int8 units
``tinygemm``  CUDA   ``torch._weight_int4pack_mm``                                unquantized inputs in bfloat16,
                                                                                  compute capability 8.0
``fbgemm16``  CPU    ``quantized::linear_dynamic_fp16``                           unquantized inputs in float32, or up
                                                                                  to 8 tokens in bfloat16; x86
``reference`` any    ``torch.nn.functional.linear`` in floating point             nothing
============= ====== ============================================================ =====================================

A matmul multiplies a :class:`~lmcompress.kernels.matrix.Matrix` of codes by an input, which is quantized on the way
as its description specifies. If the input is quantized and scales belong to rows or to the tensor, both sides are
integers of 8 bits or fewer: codes of any width are widened to int8 once, when a matrix is first used, and the integer
matmul is exact; wider matrices than 32-bit sums allow (33,000 columns) go to the reference. If only weights are
quantized, :mod:`~lmcompress.kernels.tinygemm` multiplies on a GPU, and on a CPU, unless scales belong to groups,
:mod:`~lmcompress.kernels.half_codes`. Otherwise the reference multiplies floats.

:class:`~lmcompress.kernels.matmul.Matmul` is what a module holds. It uses the first kernel that works on the device
and accepts the matrix. Each kernel is tested once per device by small matmuls with known results (of integers with the
largest possible codes) and, on a CPU, timed beside the reference, so that an operation that is missing, saturates,
permutes entries or is slow is never used; the choice is logged, and :func:`ladder` returns it.

**Tolerance.** ``int_mm`` multiplies exactly the reference's codes: results differ by the rounding of float32 sums.
``onednn`` and ``fbgemm`` multiply by the reciprocal of the scale where the reference divides by it: a number within
float32's rounding of the middle between two codes (about one in 100,000; of half-precision numbers, which have few
digits, more) may get the other, which changes an output by scale times weight. Matmuls followed by a quantizer
propagate such a step, as they propagate the rounding of any sum. NaN and infinity in an input make NaN of all that
shares their range, if ranges are computed; kernels clip both to a static range, for which nothing is read twice.
``fbgemm16`` has every code exactly and differs by the rounding of float32 sums.
``tinygemm`` and the reference both round to bfloat16, at different points: results differ by the rounding of that type.

``quantized::linear_dynamic`` is the same FBGEMM matmul after a quantizer of its own: never symmetric, and with a
minimum scale of 6.1e-5, so that small inputs would lose their digits. Therefore it is not used.

**Memory.** :data:`settings` determines whether matrices are kept prepacked (``"fast"``: besides the packed bytes int8
codes, a byte for each weight, two where some calls have few tokens and others many; half a byte for ``tinygemm`` with
codes of up to 4 bits; two bytes for ``fbgemm16``; floats for the reference) or unpacked by blocks of rows in every call
(``"low"``: no more than the packed bytes and one block).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from lmcompress.errors import LmcompressError, nearest
from lmcompress.kernels.base import Kernel
from lmcompress.kernels.fbgemm import Fbgemm
from lmcompress.kernels.half_codes import HalfCodes
from lmcompress.kernels.int_mm import IntMM
from lmcompress.kernels.integers import IntegerKernel
from lmcompress.kernels.onednn import Onednn
from lmcompress.kernels.reference import Reference
from lmcompress.kernels.self_test import self_test, too_slow
from lmcompress.kernels.tinygemm import Tinygemm

logger = logging.getLogger(__name__)

Memory = Literal["fast", "low"]
"""Whether matrices are kept prepacked for their kernel, or unpacked by blocks in every call."""

_MEMORY: tuple[Memory, ...] = ("fast", "low")


@dataclass
class Settings:
    """Settings of matmuls, for all models of this process; :func:`using` changes them temporarily.

    Attributes:
        memory: ``fast`` or ``low``.
        kernel: the name of the only kernel to try before the reference; ``None`` tries all of them.
    """

    memory: Memory = "fast"
    kernel: str | None = None


settings = Settings()
"""The settings in force."""


@contextmanager
def using(*, memory: Memory | None = None, kernel: str | None = None) -> Iterator[None]:
    """Temporarily other :data:`settings`; matrices are prepacked again where they differ.

    Args:
        memory: ``fast`` or ``low``; ``None`` keeps the setting.
        kernel: name of a kernel; ``None`` keeps the setting.

    Yields:
        Nothing.

    Raises:
        LmcompressError: If a setting is unknown.

    Example:
        >>> with using(memory="low"):
        ...     settings.memory
        'low'
    """
    before = replace(settings)
    wanted = Settings(before.memory if memory is None else memory, before.kernel if kernel is None else kernel)
    _check_settings(wanted)
    settings.memory, settings.kernel = wanted.memory, wanted.kernel
    try:
        yield
    finally:
        settings.memory, settings.kernel = before.memory, before.kernel


KERNELS: tuple[Kernel, ...] = (Onednn(), Fbgemm(), IntMM(), Tinygemm(), HalfCodes(), Reference())
"""All kernels, best first."""

_WEIGHTS_ONLY = (Tinygemm, HalfCodes)

FEW_TOKENS = 8
"""Up to this many, as decoding has them, FBGEMM is tried first: a call of oneDNN costs 20 µs more than one of FBGEMM,
and then takes less time for each token."""


def ladder(device: str | torch.device = "cpu") -> dict[str, str]:
    """The kernels that work on a device, best first.

    Args:
        device: the device.

    Returns:
        By name ``"works"``, ``"works up to codes of 64"`` if larger ones would saturate, or the reason it does not.

    Example:
        >>> ladder("cpu")["reference"]
        'works'
    """
    return {name: said for name, (_, said) in _tried(str(torch.device(device))).items()}


def kernels(device: str | torch.device = "cpu", *, few: bool = False) -> tuple[Kernel, ...]:
    """The kernels to try on a device in order, according to :data:`settings`; the last is the reference.

    Args:
        device: the device.
        few: whether a call has at most :data:`FEW_TOKENS` tokens.

    Returns:
        At least the reference.

    Raises:
        LmcompressError: If the settings name a kernel that does not work there.
    """
    _check_settings(settings)
    tried = _tried(str(torch.device(device)))
    if settings.kernel is None:
        working = [kernel for kernel, _ in tried.values() if kernel is not None]
        return tuple(sorted(working, key=lambda kernel: not (few and isinstance(kernel, Fbgemm))))
    kernel, said = tried[settings.kernel]
    if kernel is None:
        works = ", ".join(name for name, (other, _) in tried.items() if other is not None)
        raise LmcompressError(
            f"the kernel {settings.kernel!r} does not work on {device} ({said}); set settings.kernel to None, or to "
            f"one that does: {works}"
        )
    return (kernel,) if isinstance(kernel, Reference) else (kernel, Reference())


def _check_settings(wanted: Settings) -> None:
    if wanted.memory not in _MEMORY:
        raise LmcompressError(f"memory must be one of {', '.join(_MEMORY)}, got {wanted.memory!r}")
    names = [kernel.name for kernel in KERNELS]
    if wanted.kernel is not None and wanted.kernel not in names:
        raise LmcompressError(f"unknown kernel {wanted.kernel!r}{nearest(wanted.kernel, names)}")


@cache
def _tried(device: str) -> dict[str, tuple[Kernel | None, str]]:
    """Each kernel as it works on a device, or ``None``, and its status; logged once."""
    tried: dict[str, tuple[Kernel | None, str]] = {}
    for kernel in KERNELS:
        working: Kernel | None = kernel
        reason = _trouble(kernel, torch.device(device))
        if reason is not None:
            working = None
            # without VNNI, sums of two terms are kept in 16 bits, for which codes of 7 bits are small enough
            if isinstance(kernel, IntegerKernel) and not self_test(kernel, torch.device(device), 64):
                working, reason = replace(kernel, greatest=64), "works up to codes of 64"
        if working is not None and not isinstance(working, (Tinygemm, Reference)):
            slow = too_slow(working, torch.device(device), weights_only=isinstance(working, HalfCodes))
        else:
            slow = None
        if slow is not None:
            working, reason = None, slow
        tried[kernel.name] = working, reason or "works"
    those = [one for one, _ in tried.values() if one is not None]
    integers = next(one.name for one in those if not isinstance(one, _WEIGHTS_ONLY))
    weights = next(one.name for one in those if isinstance(one, (*_WEIGHTS_ONLY, Reference)))
    said = "; ".join(f"{name}: {said}" for name, (_, said) in tried.items())
    message = "int8 matmuls on %s use %s, those with only weights quantized use %s where it accepts them (%s)"
    logger.info(message, device, integers, weights, said)
    return tried


def _trouble(kernel: Kernel, device: torch.device) -> str | None:
    """The reason why a kernel does not work on a device."""
    if isinstance(kernel, Reference):
        return None
    return kernel.trouble(device) if isinstance(kernel, _WEIGHTS_ONLY) else self_test(kernel, device, 127)
