"""The matmul of an input with one packed matrix, as a module holds it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmcompress.kernels import graph
from lmcompress.kernels.blockwise import BlockwiseMatmul
from lmcompress.kernels.dispatch import FEW_TOKENS, kernels, settings
from lmcompress.kernels.int_mm import IntMM
from lmcompress.kernels.integers import Int8Matmul
from lmcompress.kernels.matrix import Encoding, Inputs, Matrix, Prepacked
from lmcompress.kernels.onednn import Onednn, OnednnMatmul
from lmcompress.kernels.posts import Post, activated
from lmcompress.kernels.ranges import Range, range_of
from lmcompress.kernels.reference import Reference, float_linear
from lmcompress.kernels.stack import Operand
from lmcompress.numerics.graphs import recording
from lmcompress.numerics.grids import PerGroup

_Slot = Literal["few", "many", "codes"]
# for calls with few tokens, with more, and with inputs that are quantized already

_NUMBERS = itertools.count()
_HELD: weakref.WeakValueDictionary[int, Matmul] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class _Ready:
    """A prepacked matrix, and what it was prepacked from."""

    prepacked: Callable[..., Tensor]
    kernel: str
    key: tuple[Any, ...]
    # kept alive, so that no other tensor gets their addresses
    tensors: tuple[Tensor | None, ...]


class Matmul:
    """The matmul with one matrix, prepacked at the first call and again when tensors or :data:`settings` change.

    Any number of threads may call it: each uses the matrix that it found or prepacked, and one prepacks at a time. A
    copy, pickled or deep, starts empty: prepacked data belong to the device and are not state.

    If the input requires a gradient, the forward pass is the same and the gradient is the reference's (straight
    through); neither matrix nor bias gets any.
    """

    def __init__(self) -> None:
        # read and replaced as a whole: another thread may replace it at any time
        self._ready: dict[_Slot, _Ready] = {}
        self._last = ""
        # the range of what reads the result, its key, and what the key is of
        self._span: tuple[Any, Range, Inputs] | None = None
        self._preparing = threading.Lock()
        # its name in graphs
        self._number = next(_NUMBERS)
        _HELD[self._number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Matmul:
        return Matmul()

    def __reduce__(self) -> tuple[type[Matmul], tuple[()]]:
        return Matmul, ()

    @property
    def kernel(self) -> str:
        """The name of the kernel used last; empty before the first call."""
        return self._last

    def reset(self) -> None:
        """Drop the prepacked matrix and free its memory."""
        self._ready, self._last = {}, ""

    def __call__(
        self,
        x: Tensor,
        matrix: Operand,
        bias: Tensor | None = None,
        inputs: Inputs | None = None,
        *,
        post: Post | None = None,
    ) -> Tensor:
        """The matmul, quantized as described.

        Args:
            x: ``(..., in)``, any floating dtype.
            matrix: the weights, of one module or of several that read ``x``.
            bias: ``(out,)``, any floating dtype, or ``None``; a stack has its own.
            inputs: quantization of ``x``; ``None`` leaves it unquantized.
            post: a function of the result, applied after the bias.

        Returns:
            ``(..., out)`` in ``x``'s dtype. NaN or infinity in ``x`` makes all values NaN that share their range, if it
            is dynamic; a static range clips both.

        Raises:
            LmcompressError: If the kernel that the settings name does not work on the device.
            CheckpointError: If bytes or scales do not fit the matrix's shape and grid.
        """
        # the kernels take ranges as Python's numbers; a graph would freeze those of its example
        if recording():
            return _reference(x, matrix, bias, inputs, post)
        if torch.compiler.is_compiling():
            return self._in_a_graph(x, matrix, bias, inputs, post)
        return self._with_gradient(x, matrix, bias, inputs, post)

    def _in_a_graph(
        self, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None
    ) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _outside_the_graph(self, x, matrix, bias, inputs, post)
        plain = settings.memory == "fast" and settings.kernel is None and x.dim() > 1
        if plain and inputs is not None and not isinstance(matrix.granularity, PerGroup):
            return graph.quantized_before(self._number, x, matrix, bias, inputs, post)
        return graph.whole(self._number, x, matrix, bias, inputs, post)

    def _with_gradient(
        self, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None
    ) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, self, matrix, bias, inputs, post)
        return self.now(x, matrix, bias, inputs, post)

    def now(self, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None) -> Tensor:
        """The matmul by a kernel, without a gradient.

        Args:
            x: as in a call, and the others too.
            matrix: the weights.
            bias: ``(out,)``.
            inputs: quantization of ``x``.
            post: a function of the result.

        Returns:
            ``(..., out)`` in ``x``'s dtype.
        """
        if x.numel() == 0:
            return activated(_empty(x, matrix, bias), post)
        ready = self._ready_for(x, matrix, bias, inputs)
        # some kernels do not accept vectors
        y = _result(ready.prepacked, x if x.dim() > 1 else x.unsqueeze(0), post)
        return (y if x.dim() > 1 else y.squeeze(0)).to(x.dtype)

    def codes_for(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs, post: Post | None, reader: Inputs
    ) -> Tensor | None:
        """The result as the codes by which the next matmul reads it, where the kernel writes them in the same pass.

        Args:
            x: as in a call, and the others too.
            matrix: the weights.
            bias: ``(out,)``.
            inputs: quantization of ``x``.
            post: a function of the result.
            reader: quantization of the result, with a static range.

        Returns:
            ``(..., out)`` uint8; None if the kernel writes floats.
        """
        if x.numel() == 0 or x.dim() < 2:
            return None
        prepacked = self._ready_for(x, matrix, bias, inputs).prepacked
        if not isinstance(prepacked, OnednnMatmul):
            return None
        key, span = (identity(reader.scale), identity(reader.zero_point), reader.encoding), self._span
        if span is None or span[0] != key:
            self._span = span = key, range_of(reader)(x), reader
        return prepacked.codes(x, post, span[1])

    def _ready_for(self, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None) -> _Ready:
        # quantized inputs are the same in every dtype: threads with and without autocast share the matrix
        key, tensors = _key(matrix, bias, inputs, x.dtype if inputs is None else None)
        # floats of 32 bits have one kernel for all
        few = x.numel() <= FEW_TOKENS * x.shape[-1] and (inputs is not None or x.dtype != torch.float32)
        slot: _Slot = "few" if few else "many"
        ready = self._ready.get(slot)
        if ready is None or ready.key != key:
            ready = self._prepared(slot, key, tensors, lambda: _prepare(x, *matrix.whole(bias), inputs, few))
        self._last = ready.kernel
        return ready

    def of_codes(
        self,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        matrix: Operand,
        bias: Tensor | None,
        dtype: torch.dtype,
        post: Post | None,
    ) -> Tensor:
        """The matmul of an input that is quantized already.

        Args:
            codes: ``(tokens, in)`` uint8.
            scales: ``(tokens or 1, 1)`` float32.
            zero_points: of the same shape; without them the byte 128 is 0.
            matrix: the weights, with scales of rows or of the tensor.
            bias: ``(out,)``.
            dtype: dtype of the result.
            post: a function of the result.

        Returns:
            ``(tokens, out)``.
        """
        if codes.numel() == 0:
            return activated(_empty(codes.to(dtype), matrix, bias), post)
        key, tensors = _key(matrix, bias, None, torch.uint8)
        ready = self._ready.get("codes")
        if ready is None or ready.key != key:
            many = self._ready.get("many")
            if many is not None and many.key[0] == key[0] and isinstance(many.prepacked, OnednnMatmul):
                # one layout serves both
                ready = _Ready(many.prepacked.matrix.of_bytes, many.kernel, key, tensors)
                self._ready = {**self._ready, "codes": ready}
            else:
                ready = self._prepared(
                    "codes", key, tensors, lambda: _prepare_for_codes(codes.device, *matrix.whole(bias))
                )
        self._last = ready.kernel
        return ready.prepacked(codes, scales, zero_points, dtype, post).to(dtype)

    def _prepared(
        self,
        slot: _Slot,
        key: tuple[Any, ...],
        tensors: tuple[Tensor | None, ...],
        prepare: Callable[[], tuple[Callable[..., Tensor], str]],
    ) -> _Ready:
        with self._preparing:
            ready = self._ready.get(slot)
            if ready is None or ready.key != key:
                # what is no longer needed is freed before anything new is allocated
                ready = None
                others = {other: kept for other, kept in self._ready.items() if other != slot}
                self._ready = {other: kept for other, kept in others.items() if kept.key[0] == key[0]}
                ready = _Ready(*prepare(), key, tensors)
                # another thread may have dropped the others meanwhile
                self._ready = {**self._ready, slot: ready}
            return ready


# torch.compile breaks its graph here and continues after it
_outside_the_graph = torch.compiler.disable(Matmul._with_gradient)


class _WithGradient(torch.autograd.Function):
    """The matmul itself, with the reference's gradient for the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matmul: Matmul,
        matrix: Operand,
        bias: Tensor | None,
        inputs: Inputs | None,
        post: Post | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operands = matrix, bias, inputs, post
        return matmul.now(x, matrix, bias, inputs, post)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (saved,) = ctx.saved_tensors
        matrix, bias, inputs, post = ctx.operands
        bias = None if bias is None else bias.detach()
        with torch.enable_grad():
            x = saved.detach().requires_grad_()
            y = _reference(x, matrix, bias, inputs, post)
        return torch.autograd.grad(y, x, gradient)[0], None, None, None, None, None


def _result(prepacked: Prepacked, x: Tensor, post: Post | None) -> Tensor:
    if isinstance(prepacked, OnednnMatmul):
        return prepacked(x, post)
    return activated(prepacked(x), post)


def _reference(x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None) -> Tensor:
    whole, bias = matrix.whole(bias)
    y = Reference().prepack(replace(whole, trusted=True), bias, inputs, x.dtype)(x)
    return activated(y, post).to(x.dtype)


def _empty(x: Tensor, matrix: Operand, bias: Tensor | None) -> Tensor:
    """The matmul of no tokens, or with a matrix without columns."""
    whole, bias = matrix.whole(bias)
    empty = x.new_zeros(*x.shape[:-1], whole.shape[0])
    return empty if bias is None else empty + bias.to(x.dtype)


def _prepare(x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, few: bool) -> tuple[Prepacked, str]:
    """A matrix prepacked by the first kernel that accepts it, and the kernel's name."""
    bias = None if bias is None else bias.detach()
    fitting = [kernel for kernel in kernels(x.device, few=few) if kernel.refusal(matrix, inputs, x.dtype, few) is None]
    if settings.memory == "low":
        # other kernels rearrange matrices, which costs more than it gains for one call
        integers = any(isinstance(kernel, IntMM) for kernel in fitting) and x.shape[-1] > 0
        return BlockwiseMatmul(
            matrix, bias, inputs, integers
        ), "int_mm by blocks" if integers else "reference by blocks"
    return fitting[0].prepack(matrix, bias, inputs, x.dtype), fitting[0].name


def _prepare_for_codes(device: torch.device, matrix: Matrix, bias: Tensor | None) -> tuple[Callable[..., Tensor], str]:
    """A matrix prepacked for inputs that are quantized already, and the kernel's name."""
    bias = None if bias is None else bias.detach()
    for kernel in kernels(device):
        # every input's codes are bytes
        if kernel.refusal(matrix, Inputs(Encoding()), torch.float32) is not None:
            continue
        if isinstance(kernel, Onednn):
            return kernel.prepack_for_bytes(matrix, bias).of_bytes, kernel.name
        if isinstance(kernel, IntMM):
            return _of_bytes(kernel.prepack(matrix, bias, None, torch.float32)), kernel.name
    weight = matrix.values()

    def multiply(
        codes: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype, post: Post | None
    ) -> Tensor:
        values = (codes.float() - (128.0 if zero_points is None else zero_points.float())) * scales
        return activated(float_linear(values, weight, bias), post)

    return multiply, Reference().name


def _of_bytes(prepacked: Int8Matmul) -> Callable[..., Tensor]:
    def multiply(
        codes: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype, post: Post | None
    ) -> Tensor:
        starts = None if zero_points is None else zero_points.int() - 128
        # flipping the first bit subtracts 128
        return activated(prepacked.of_codes((codes ^ 128).view(torch.int8), scales, starts), post)

    return multiply


def _key(
    matrix: Operand, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype | None
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """What a prepacked matrix depends on: the matrix and settings, then the input; and the tensors among it."""
    static = (None, None) if inputs is None else (inputs.scale, inputs.zero_point)
    of_matrix = (*matrix.tensors, bias)
    first = (*map(identity, of_matrix), matrix.layout, settings.memory, settings.kernel)
    return (first, (*map(identity, static), inputs and inputs.encoding, dtype)), (*of_matrix, *static)


def identity(tensor: Tensor | None) -> tuple[Any, ...]:
    """A key that changes when a tensor is replaced, moved or written to, as long as the tensor is kept alive.

    Args:
        tensor: the tensor.
    """
    if tensor is None:
        return ()
    # inference tensors have no version counter, and cannot be written to outside
    return tensor.data_ptr(), tensor.device, tensor.shape, 0 if tensor.is_inference() else tensor._version


graph.serve(lambda number: _HELD[number])
