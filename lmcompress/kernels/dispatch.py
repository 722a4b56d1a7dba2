r"""Products with packed matrices: the ladder of kernels, and the reference that is always there.

============= ====== ============================================================ =====================================
kernel        device operation                                                    what it needs
============= ====== ============================================================ =====================================
``fbgemm``    CPU    ``quantized::linear_with_input_q_dq_qweight_dq_output_fp32`` x86 (FBGEMM in torch)
``onednn``    CPU    ``onednn::qlinear_pointwise``                                oneDNN in torch
``int_mm``    any    ``torch._int_mm``                                            on a GPU its int8 units
``tinygemm``  CUDA   ``torch._weight_int4pack_mm``                                inputs in bfloat16 that stay as they
                                                                                  are, compute capability 8.0
``reference`` any    ``torch.nn.functional.linear`` in floating point             nothing
============= ====== ============================================================ =====================================

A product is that of a :class:`~lmcompress.numerics.matrix.Matrix` of codes with an input, which is quantized on the way
as its description says. Where the input is quantized and scales belong to rows or to the tensor, both sides are
integers of 8 bits or fewer: codes of any width are widened to int8 once, when a matrix is first used, and the integer
product is exact. Where weights alone are quantized, :mod:`~lmcompress.kernels.tinygemm` multiplies on a GPU. Otherwise
the reference multiplies floats.

:class:`Product` is what a module holds. It takes the first kernel of the ladder that works on the device and takes the
matrix. What works is tried once per device by small products whose results are known (of integers with the greatest
codes there are), so that an operation that is missing, saturates, or mixes up places is never used; the choice is
logged, and :func:`ladder` tells it.

**Tolerance.** ``onednn`` and ``int_mm`` multiply the very codes of the reference: results differ by the rounding of
float32 sums. ``fbgemm`` multiplies by the reciprocal of the scale where the reference divides by it: a number within
float32's rounding of the middle between two codes (about one in 100,000) may get the other, which changes an output by
scale times weight. Products that a quantizer follows carry such a step on, as they carry on the rounding of any sum.
``tinygemm`` and the reference both round to bfloat16, at other places: results differ by the rounding of that type.

``quantized::linear_dynamic`` is the same FBGEMM product behind a quantizer of its own: never symmetric, and with a
least scale of 6.1e-5, so that small inputs would lose their digits. It is not used for that.

**Memory.** :data:`settings` says whether matrices are kept ready (``"fast"``: beside the packed bytes int8 codes, a
byte for each weight; half a byte for ``tinygemm`` with codes of up to 4 bits; floats where the reference multiplies) or
unpacked by blocks of rows in every call (``"low"``: no more than the packed bytes and one block).
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmcompress.errors import LmcompressError, nearest
from lmcompress.kernels.tinygemm import Tinygemm
from lmcompress.numerics.grids import Grid, PerGroup
from lmcompress.numerics.inputs import InputEncoding, input_grid
from lmcompress.numerics.matrix import Inputs, Matrix, Ready
from lmcompress.numerics.quantizers import Quantized

logger = logging.getLogger(__name__)

Memory = Literal["fast", "low"]
"""Whether matrices are kept ready for their kernel, or unpacked by blocks in every call."""

_MEMORY: tuple[Memory, ...] = ("fast", "low")
_BLOCK_WEIGHTS = 1 << 20
# the least scale whose reciprocal is finite in float32
_LEAST_SCALE = 2.0**-126


@dataclass
class Settings:
    """How products are done, for all models of this process; :func:`using` changes it for a while.

    Attributes:
        memory: ``fast`` or ``low``.
        kernel: the name of the only kernel to try before the reference; ``None`` tries the whole ladder.
    """

    memory: Memory = "fast"
    kernel: str | None = None


settings = Settings()
"""The settings in force."""


@contextmanager
def using(*, memory: Memory | None = None, kernel: str | None = None) -> Iterator[None]:
    """Other :data:`settings` for the time; matrices are made ready anew where they differ.

    Args:
        memory: ``fast`` or ``low``; ``None`` leaves it.
        kernel: name of a kernel; ``None`` leaves it.

    Yields:
        Nothing.

    Raises:
        LmcompressError: an unknown setting.

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


class Kernel(Protocol):
    """One way to multiply."""

    @property
    def name(self) -> str:
        """Its name in settings and logs."""

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """Why this kernel does not take a matrix, or an input of this dtype; ``None`` where it does."""

    def prepare(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Ready:
        """Makes a matrix ready: unpacks, widens, and lays it out as the kernel likes it."""


class Product:
    """The product with one matrix, made ready at the first call and again when tensors or :data:`settings` change.

    A copy, pickled or deep, starts afresh: what is ready belongs to the device and is no state.

    With gradient asked of the input, the forward pass is the same and the gradient that of the reference (straight
    through); neither matrix nor bias gets any.
    """

    _ready: Ready | None
    _key: tuple[Any, ...]
    _kept: tuple[Tensor | None, ...]
    _kernel: str

    def __init__(self) -> None:
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        return Product()

    def __reduce__(self) -> tuple[type[Product], tuple[()]]:
        return Product, ()

    @property
    def kernel(self) -> str:
        """The name of the kernel that multiplied last; empty before the first call."""
        return self._kernel

    def reset(self) -> None:
        """Forgets what was made ready, and gives its memory back."""
        self._ready, self._kernel = None, ""
        self._key, self._kept = (), ()

    def __call__(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
        """The product, quantized as described.

        Args:
            x: ``(..., in)``, any floating dtype.
            matrix: the weights.
            bias: ``(out,)``, any floating dtype, or ``None``.
            inputs: what happens to ``x`` beforehand; ``None`` leaves it as it is.

        Returns:
            ``(..., out)`` of ``x``'s dtype. NaN or infinity in ``x`` makes NaN of all that shares their range.

        Raises:
            LmcompressError: the kernel that settings name does not work on the device.
            CheckpointError: bytes or scales are not those of the matrix's shape and grid.
        """
        # ranges are numbers in Python to the kernels; a graph would hold those of its example for ever
        if _is_exporting() or torch._C._get_tracing_state() is not None:
            return _reference(x, matrix, bias, inputs)
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, x, matrix, bias, inputs)
        return self._with_gradient(x, matrix, bias, inputs)

    def _with_gradient(self, x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, self, matrix, bias, inputs)
        return self._now(x, matrix, bias, inputs)

    def _now(self, x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        if x.numel() == 0:
            return _empty(x, matrix, bias)
        static = (None, None) if inputs is None else (inputs.scale, inputs.zero_point)
        tensors = (matrix.packed, matrix.scales, matrix.zero_points, bias, *static)
        layout = (matrix.shape, matrix.grid, matrix.container, matrix.granularity, inputs and inputs.encoding)
        key = (*map(_identity, tensors), layout, x.dtype, settings.memory, settings.kernel)
        if self._ready is None or key != self._key:
            # what is no longer needed goes before anything new comes
            self.reset()
            self._ready, self._kernel = _prepare(x, matrix, bias, inputs)
            # kept, so that no other tensor gets their addresses
            self._key, self._kept = key, tensors
        # some kernels take no vector
        return (self._ready(x) if x.dim() > 1 else self._ready(x.unsqueeze(0)).squeeze(0)).to(x.dtype)


# torch.compile breaks its graph here and goes on behind it
_outside_the_graph = torch.compiler.disable(Product._with_gradient)
# torch 2.5 and 2.6 have none
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def ladder(device: str | torch.device = "cpu") -> dict[str, str]:
    """Which kernels work on a device, best first.

    Args:
        device: where.

    Returns:
        By name ``"works"``, ``"works up to codes of 64"`` where greater ones would saturate, or why it does not.

    Example:
        >>> ladder("cpu")["reference"]
        'works'
    """
    return {name: said for name, (_, said) in _tried(str(torch.device(device))).items()}


def kernels(device: str | torch.device = "cpu") -> tuple[Kernel, ...]:
    """The kernels to try on a device in turn, as :data:`settings` have it; the last is the reference.

    Args:
        device: where.

    Returns:
        At least the reference.

    Raises:
        LmcompressError: settings name a kernel that does not work there.
    """
    _check_settings(settings)
    tried = _tried(str(torch.device(device)))
    if settings.kernel is None:
        return tuple(kernel for kernel, _ in tried.values() if kernel is not None)
    kernel, said = tried[settings.kernel]
    if kernel is None:
        works = ", ".join(name for name, (other, _) in tried.items() if other is not None)
        raise LmcompressError(
            f"the kernel {settings.kernel!r} does not work on {device} ({said}); set settings.kernel to None, or to "
            f"one that does: {works}"
        )
    return (kernel,) if isinstance(kernel, Reference) else (kernel, Reference())


@dataclass(frozen=True)
class Reference:
    """Floats: the quantized input times the matrix as numbers. What the others are compared with."""

    name: str = "reference"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """Nothing is refused."""
        return None

    def prepare(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Ready:
        """The matrix as numbers: float32 where the input is quantized, else of the input's dtype."""
        weight = matrix.values()
        if inputs is None:
            weight = weight.to(dtype)
            return lambda x: torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
        return lambda x: _linear(inputs.quantized(x).values, weight, bias)


@dataclass(frozen=True)
class Fbgemm:
    """FBGEMM's product: quantizes the input, multiplies and scales in one pass.

    Attributes:
        greatest: the greatest magnitude of codes that is safe.
        name: its name.
    """

    greatest: int = 128
    name: str = "fbgemm"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """As for all integer products."""
        return _no_integers(matrix, inputs, self.greatest)

    def prepare(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Ready:
        """FBGEMM's own layout, a byte for each weight."""
        if inputs is None:
            raise LmcompressError("fbgemm multiplies quantized inputs, got none; use the reference")
        codes, zeros = _signed(matrix)
        scales = _by_row(matrix.scales, matrix)
        by_token = _by_token(inputs.encoding)
        zero_points = torch.zeros(codes.shape[0], dtype=torch.int64) if zeros is None else zeros.long()
        with warnings.catch_warnings():
            # torch 2.13 says that these tensors will go; then the self-test finds them missing
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
            own_bias = None if bias is None else bias.detach().float()
            packed = torch.ops.quantized.linear_prepack(quantized, None if by_token else own_bias)
        # the overload itself: a packet looks for it in every call
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        ranged = _static(inputs) if inputs.encoding.range == "static" else _dynamic(inputs.encoding)

        def per_tensor(x: Tensor) -> Tensor:
            x, scale, zero = ranged(x.float())
            return multiply(x, scale, zero, packed)

        if not by_token:
            return per_tensor
        sums = _row_sums(codes, zeros) * scales
        out, width = matrix.shape

        def per_token(x: Tensor) -> Tensor:
            if x.numel() == width:
                product = per_tensor(x)
                return product if own_bias is None else product + own_bias
            x_by_tokens = x.reshape(-1, width)
            levels, token_scales, token_zeros = _by_tokens(x_by_tokens, inputs)
            product = multiply(levels, 1.0, 128 if token_zeros is None else 0, packed)
            return _finished(product, token_zeros, token_scales, sums, own_bias).reshape(*x.shape[:-1], out)

        return per_token


@dataclass(frozen=True)
class Onednn:
    """oneDNN's product of bytes, in its own layout; the input is quantized before it.

    Attributes:
        greatest: the greatest magnitude of codes that is safe.
        name: its name.
    """

    greatest: int = 128
    name: str = "onednn"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """As for all integer products."""
        return _no_integers(matrix, inputs, self.greatest)

    def prepare(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Ready:
        """oneDNN's own layout, a byte for each weight."""
        codes, zeros = _signed(matrix)
        scales = _by_row(matrix.scales, matrix)
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        multiply = torch.ops.onednn.qlinear_pointwise.default
        none = torch.zeros(codes.shape[0], dtype=torch.int64)

        def product(x: Tensor) -> Tensor:
            return multiply(x, 1.0, 0, packed, scales, none, None, 1.0, 0, torch.float32, "none", [], "")

        return _Bytes(product, matrix.shape[0], zeros, _row_sums(codes, zeros), scales, bias, inputs, scaled=True)


@dataclass(frozen=True)
class IntMM:
    """torch's own product of bytes, on CPU and CUDA; the input is quantized before it.

    Attributes:
        greatest: the greatest magnitude of codes that is safe.
        name: its name.
    """

    greatest: int = 128
    name: str = "int_mm"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """As for all integer products."""
        return _no_integers(matrix, inputs, self.greatest)

    def prepare(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Ready:
        """The codes as int8, filled up with zeros where the operation needs it."""
        codes, zeros = _signed(matrix)
        sums, scales = _row_sums(codes, zeros), _by_row(matrix.scales, matrix)
        out, width = matrix.shape
        if codes.device.type == "cuda":
            # asked are more than 16 rows on the left and multiples of 8 else, which some versions of cuBLAS multiply
            # wrongly where there are few (pytorch/pytorch#107671, #169956): zeros up to what its fast products use
            least, columns, rows = 32, -width % 16, -out % 16
        else:
            # of an axis of 1 the stride may be anything, and oneDNN gives nonsense then (pytorch/pytorch#195066)
            least, columns, rows = 2, int(width == 1), 0
        right = torch.nn.functional.pad(codes, (0, columns, 0, rows)).t()

        def product(x: Tensor) -> Tensor:
            tokens = x.shape[0]
            if columns or tokens < least:
                x = torch.nn.functional.pad(x, (0, columns, 0, max(0, least - tokens)))
            return torch._int_mm(x, right)[:tokens, :out]

        return _Bytes(product, out, zeros, sums, scales, bias, inputs, scaled=False)


LADDER: tuple[Kernel, ...] = (Fbgemm(), Onednn(), IntMM(), Tinygemm(), Reference())
"""All kernels, best first."""


@dataclass(frozen=True, eq=False)
class _Bytes:
    """A product of bytes ``(tokens, in) -> (tokens, out)`` between the quantizer before and the scales after.

    Attributes:
        product: gives int32, or float32 times the scales of rows where ``scaled``.
        out: rows of the matrix.
        zeros: ``(out,)`` int32, zero points of rows, or ``None``.
        sums: ``(out,)`` int32, of codes less zero points.
        scales: ``(out,)`` float32.
        bias: of the product.
        inputs: of the product.
        scaled: whether the product has the scales in it.
    """

    product: Callable[[Tensor], Tensor]
    out: int
    zeros: Tensor | None
    sums: Tensor
    scales: Tensor
    bias: Tensor | None
    inputs: Inputs | None
    scaled: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            raise LmcompressError("integers multiply quantized inputs, got none; use the reference")
        codes, scales, zero_points = _bytes(self.inputs.quantized(x), static=self.inputs.encoding.range == "static")
        return self.of_codes(codes, scales, zero_points).reshape(*x.shape[:-1], self.out)

    def of_codes(self, x: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """``(tokens, out)`` float32 of int8 codes ``(tokens, in)``, their scales and zero points."""
        product, sums = self.product(x), self.sums
        if self.zeros is not None:
            right = x.sum(dim=1, keepdim=True, dtype=torch.int32) * self.zeros
            product = product - (right * self.scales if self.scaled else right)
        if self.scaled:
            return _finished(product, zero_points, scales, sums * self.scales, self.bias)
        if zero_points is not None:
            product = product - zero_points * sums
        return _finished(product * self.scales, None, scales, sums, self.bias)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A product that keeps nothing ready: rows are unpacked a block at a time in every call.

    Attributes:
        matrix: the weights.
        bias: of the product.
        inputs: of the product.
        integers: whether to multiply bytes, else floats.
    """

    matrix: Matrix
    bias: Tensor | None
    inputs: Inputs | None
    integers: bool

    def __call__(self, x: Tensor) -> Tensor:
        out, width = self.matrix.shape
        flat, matrix = x.reshape(-1, width), replace(self.matrix, trusted=True)
        multiply: Callable[[Matrix, Tensor | None], Tensor]
        if self.integers and self.inputs is not None:
            parts = _bytes(self.inputs.quantized(x), static=self.inputs.encoding.range == "static")

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                ready = IntMM().prepare(rows, bias, self.inputs, x.dtype)
                return ready.of_codes(*parts)  # type: ignore[attr-defined]
        elif self.inputs is not None:
            values = self.inputs.quantized(x).values.reshape(-1, width)

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                return _linear(values, rows.values(), bias)
        else:

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                return Reference().prepare(rows, bias, None, x.dtype)(flat)

        result = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
        step = max(1, _BLOCK_WEIGHTS // max(1, width))
        for start in range(0, out, step):
            stop = min(start + step, out)
            bias = None if self.bias is None else self.bias[start:stop]
            result[:, start:stop] = multiply(matrix.block(start, stop), bias)
        return result.reshape(*x.shape[:-1], out)


class _WithGradient(torch.autograd.Function):
    """The product as it is, with the reference's gradient for the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Product, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operands = matrix, inputs
        return product._now(x, matrix, bias, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (saved,) = ctx.saved_tensors
        matrix, inputs = ctx.operands
        with torch.enable_grad():
            x = saved.detach().requires_grad_()
            y = _reference(x, matrix, None, inputs)
        return torch.autograd.grad(y, x, gradient)[0], None, None, None, None


def _reference(x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
    return Reference().prepare(replace(matrix, trusted=True), bias, inputs, x.dtype)(x).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())


def _empty(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """The product of no tokens, or with a matrix without columns."""
    empty = x.new_zeros(*x.shape[:-1], matrix.shape[0])
    return empty if bias is None else empty + bias.to(x.dtype)


def _prepare(x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None) -> tuple[Ready, str]:
    """A matrix made ready by the first kernel that takes it, and the kernel's name."""
    bias = None if bias is None else bias.detach()
    fitting = [kernel for kernel in kernels(x.device) if kernel.refusal(matrix, inputs, x.dtype) is None]
    if settings.memory == "low":
        # other kernels lay matrices out anew, which costs more than it gains for one call
        integers = any(isinstance(kernel, IntMM) for kernel in fitting) and x.shape[-1] > 0
        return _Blocks(matrix, bias, inputs, integers), "int_mm by blocks" if integers else "reference by blocks"
    return fitting[0].prepare(matrix, bias, inputs, x.dtype), fitting[0].name


def _identity(tensor: Tensor | None) -> tuple[Any, ...]:
    """What changes when a tensor is replaced, moved or written to."""
    if tensor is None:
        return ()
    # inference tensors count no versions, and cannot be written to outside
    return tensor.data_ptr(), tensor.device, tensor.shape, 0 if tensor.is_inference() else tensor._version


def _check_settings(wanted: Settings) -> None:
    if wanted.memory not in _MEMORY:
        raise LmcompressError(f"memory must be one of {', '.join(_MEMORY)}, got {wanted.memory!r}")
    names = [kernel.name for kernel in LADDER]
    if wanted.kernel is not None and wanted.kernel not in names:
        raise LmcompressError(f"unknown kernel {wanted.kernel!r}{nearest(wanted.kernel, names)}")


def _no_integers(matrix: Matrix, inputs: Inputs | None, greatest: int) -> str | None:
    """Why a product is none of integers, or none of these with codes up to ``greatest``."""
    if inputs is None:
        return "only weights are quantized"
    if isinstance(matrix.granularity, PerGroup):
        return "scales belong to groups, and an integer sum runs over whole rows"
    # as `_signed` has them
    reach = 128 if matrix.grid.high > 127 else max(abs(matrix.grid.low), matrix.grid.high)
    return f"codes up to {reach} may saturate on this processor" if reach > greatest else None


def _by_token(encoding: InputEncoding) -> bool:
    return encoding.range == "dynamic" and encoding.granularity == "token"


def _by_row(numbers: Tensor, matrix: Matrix) -> Tensor:
    """Scales or zero points as one for each row, ``(out,)``."""
    return numbers.reshape(-1).expand(matrix.shape[0]).contiguous()


def _signed(matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """Codes as int8 ``(out, in)``, and zero points of rows ``(out,)`` int32 where some remain."""
    codes, grid = matrix.codes(), matrix.grid
    zeros = None if matrix.zero_points is None else _by_row(matrix.zero_points, matrix)
    if codes.dtype == torch.int8:
        return codes, None if zeros is None else zeros.int()
    if grid.high <= 127:
        # of codes and zero points below 128 the difference fits a byte
        signed = codes.to(torch.int8)
        return (signed, None) if zeros is None else (signed - zeros.to(torch.int8).unsqueeze(1), None)
    zeros = torch.zeros(matrix.shape[0], dtype=torch.int32, device=codes.device) if zeros is None else zeros.int()
    # flipping the first bit takes 128 away
    return (codes ^ 128).view(torch.int8), zeros - 128


def _row_sums(codes: Tensor, zeros: Tensor | None) -> Tensor:
    """Sums of codes less zero points, ``(out,)`` int32: what a shift of the input by 1 adds."""
    sums = codes.sum(dim=1, dtype=torch.int32)
    return sums if zeros is None else sums - codes.shape[1] * zeros


def _bytes(quantized: Quantized, *, static: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``(tokens, in)`` int8; scales ``(tokens or 1, 1)``, and zero points likewise, int32 or ``None``."""
    levels = quantized.levels.reshape(-1, quantized.levels.shape[-1])
    scales, zero_points = _no_infinity(quantized.scales), quantized.zero_points
    if static:
        # a range that was given knows nothing of NaN, and no byte is one
        scales = scales.masked_fill(levels.isnan().any(dim=1, keepdim=True), torch.nan)
    if zero_points is None:
        return levels.to(torch.int8), scales, None
    if quantized.grid.high <= 127:
        return levels.to(torch.int8), scales, zero_points.int()
    return (levels - 128).to(torch.int8), scales, zero_points.int() - 128


def _no_infinity(scales: Tensor) -> Tensor:
    """Scales with NaN for infinity, which times the wrong codes might be a number."""
    return scales + (scales - scales)


def _finished(product: Tensor, zero_points: Tensor | None, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """``(product - zero point * sums) * scale + bias``; scales and zero points of tokens, sums of rows."""
    if zero_points is not None:
        product = product - zero_points.float() * sums
    product = product * scales
    return product if bias is None else product + bias.float()


def _by_tokens(x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels ``(tokens, in)``, to be rounded and cut to bytes, and scales and zero points ``(tokens, 1)``."""
    encoding = inputs.encoding
    if encoding.bits != 8 or encoding.clip is not None:
        quantized = inputs.quantized(x)
        return quantized.levels, _no_infinity(quantized.scales), quantized.zero_points
    # the same in fewer passes, since the product rounds
    x, grid = x.float(), input_grid(encoding)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    if encoding.symmetric:
        scales = (torch.maximum(high, -low) / grid.high).clamp_(min=_LEAST_SCALE)
        return x / scales, _no_infinity(scales), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = (high / grid.high - low / grid.high).clamp_(min=_LEAST_SCALE)
    zero_points = grid.nearest(-low / scales)
    return (x / scales).add_(zero_points), _no_infinity(scales), zero_points


_Ranged = Callable[[Tensor], tuple[Tensor, float, int]]
"""An input, cut where its levels end, with its scale and the zero point of its unsigned codes."""


def _dynamic(encoding: InputEncoding) -> _Ranged:
    """The range of :func:`~lmcompress.numerics.activations.dynamic` in Python's numbers."""
    grid, clip, symmetric = input_grid(encoding), encoding.clip, encoding.symmetric

    def ranged(x: Tensor) -> tuple[Tensor, float, int]:
        ends = torch.aminmax(x)
        low, high = ends.min.item(), ends.max.item()
        if clip is not None and (low < -clip or high > clip):
            # NaN comes first in these, so that it stays
            x, low, high = x.clamp(-clip, clip), max(low, -clip), min(high, clip)
        if symmetric:
            return x, _scale(_single(max(high, -low) / grid.high)), 128
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _scale(_single(_single(high / grid.high) - _single(low / grid.high)))
        zero = min(round(-low / scale), grid.high) if math.isfinite(scale) else 0
        # beyond 8 bits the bytes of the product cut nothing
        if grid.high < 255:
            x = x.clamp(-zero * scale, (grid.high - zero) * scale)
        return x, scale, zero

    return ranged


def _static(inputs: Inputs) -> _Ranged:
    """The given range in Python's numbers; NaN of an input makes it NaN."""
    if inputs.scale is None:
        raise LmcompressError("a static range must have a scale, got none; is the checkpoint complete?")
    grid, given = input_grid(inputs.encoding), float(inputs.scale)
    zero = 0 if inputs.zero_point is None else int(inputs.zero_point)
    least, greatest = (grid.low - zero) * given, (grid.high - zero) * given

    def ranged(x: Tensor) -> tuple[Tensor, float, int]:
        ends = torch.aminmax(x)
        low, high = ends.min.item(), ends.max.item()
        if low < least or high > greatest:
            x = x.clamp(least, greatest)
        return x, given if low == low else math.nan, 128 if inputs.zero_point is None else zero

    return ranged


def _single(number: float) -> float:
    """The float32 nearest to a number: of two float32 divided in float64 it is what float32 division gives."""
    return ctypes.c_float(number).value


def _scale(scale: float) -> float:
    """A scale that can be divided by, since where all is 0 any will do; NaN for infinity."""
    if scale < _LEAST_SCALE:
        return _LEAST_SCALE
    return scale if math.isfinite(scale) else math.nan


@cache
def _tried(device: str) -> dict[str, tuple[Kernel | None, str]]:
    """Each kernel as it works on a device, or ``None``, and what to say of it; logged once."""
    tried: dict[str, tuple[Kernel | None, str]] = {}
    for kernel in LADDER:
        working: Kernel | None = kernel
        reason = _trouble(kernel, torch.device(device))
        if reason is not None:
            working = None
            # without VNNI, sums of two products are kept in 16 bits, for which 7 bits are few enough
            if isinstance(kernel, (Fbgemm, Onednn, IntMM)) and not _self_test(kernel, torch.device(device), 64):
                working, reason = replace(kernel, greatest=64), "works up to codes of 64"
        tried[kernel.name] = working, reason or "works"
    those = [one for one, _ in tried.values() if one is not None]
    integers = next(one.name for one in those if not isinstance(one, Tinygemm))
    weights = next(one.name for one in those if isinstance(one, (Tinygemm, Reference)))
    said = "; ".join(f"{name}: {said}" for name, (_, said) in tried.items())
    message = (
        "int8 products on %s go through %s, those with weights alone quantized through %s where it takes them (%s)"
    )
    logger.info(message, device, integers, weights, said)
    return tried


def _trouble(kernel: Kernel, device: torch.device) -> str | None:
    """Why a kernel does not work on a device."""
    if isinstance(kernel, Reference):
        return None
    return kernel.trouble(device) if isinstance(kernel, Tinygemm) else _self_test(kernel, device, 127)


@dataclass(frozen=True)
class _TestEncoding:
    """The input of the self-test."""

    bits: Literal[4, 8] = 8
    symmetric: bool = False
    granularity: Literal["tensor", "token"] = "tensor"
    range: Literal["dynamic", "static"] = "dynamic"
    clip: float | None = None
    full: bool = False


def _self_test(kernel: Kernel, device: torch.device, greatest: int) -> str | None:
    """Why a kernel does not work: it fails, or what it gives for the greatest codes is wrong."""
    out, width = 16, 64
    codes = torch.full((out, width), greatest, dtype=torch.int16)
    codes[1::2] = -greatest
    # rows of one sign saturate first, rows of several numbers show whether places are mixed up
    codes[2::4] = torch.arange(width, dtype=torch.int16) - 32
    matrix = Matrix(
        (codes + greatest).to(torch.uint8).to(device),
        torch.ones(out, 1, device=device),
        None,
        (out, width),
        Grid(-greatest, 2 * greatest + 1),
        8,
    )
    x = torch.full((3, width), 255.0)
    x[1, ::2] = 0.0
    x[2] = torch.arange(width) * 4.0
    x[2, -1] = 255.0
    try:
        with torch.inference_mode():
            # up to 255 without and 127 with levels around 0 the scale is 1, and so codes are the numbers
            # few rows may be filled up, many are not
            for symmetric, times in itertools.product((False, True), (1, 14)):
                these = (x.clamp(max=127.0) if symmetric else x).repeat(times, 1)
                inputs = Inputs(_TestEncoding(symmetric=symmetric))
                given = kernel.prepare(matrix, None, inputs, torch.float32)(these.to(device)).cpu()
                if not torch.allclose(given.double(), these.double() @ codes.double().t(), rtol=1e-5, atol=1.0):
                    return "its results are wrong on this device"
    # what a torch without the operation, or with another signature of it, raises
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        return f"not in this torch, or not for this device: {(str(error) or repr(error)).splitlines()[0]}"
    return None
