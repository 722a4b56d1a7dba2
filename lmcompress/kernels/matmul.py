"""The matmul of an input with one packed matrix, as a module holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmcompress.kernels.blockwise import BlockwiseMatmul
from lmcompress.kernels.dispatch import kernels, settings
from lmcompress.kernels.int_mm import IntMM
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked
from lmcompress.kernels.reference import Reference


class Matmul:
    """The matmul with one matrix, prepacked at the first call and again when tensors or :data:`settings` change.

    A copy, pickled or deep, starts empty: prepacked data belong to the device and are not state.

    If the input requires a gradient, the forward pass is the same and the gradient is the reference's (straight
    through); neither matrix nor bias gets any.
    """

    _prepacked: Prepacked | None
    _key: tuple[Any, ...]
    _kept: tuple[Tensor | None, ...]
    _kernel: str

    def __init__(self) -> None:
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Matmul:
        return Matmul()

    def __reduce__(self) -> tuple[type[Matmul], tuple[()]]:
        return Matmul, ()

    @property
    def kernel(self) -> str:
        """The name of the kernel used last; empty before the first call."""
        return self._kernel

    def reset(self) -> None:
        """Drop the prepacked matrix and free its memory."""
        self._prepacked, self._kernel = None, ""
        self._key, self._kept = (), ()

    def __call__(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
        """The matmul, quantized as described.

        Args:
            x: ``(..., in)``, any floating dtype.
            matrix: the weights.
            bias: ``(out,)``, any floating dtype, or ``None``.
            inputs: quantization of ``x``; ``None`` leaves it unquantized.

        Returns:
            ``(..., out)`` in ``x``'s dtype. NaN or infinity in ``x`` makes all values NaN that share their range.

        Raises:
            LmcompressError: If the kernel that the settings name does not work on the device.
            CheckpointError: If bytes or scales do not fit the matrix's shape and grid.
        """
        # the kernels take ranges as Python numbers; a graph would freeze those of its example
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
        if self._prepacked is None or key != self._key:
            # what is no longer needed is freed before anything new is allocated
            self.reset()
            self._prepacked, self._kernel = _prepare(x, matrix, bias, inputs)
            # kept alive, so that no other tensor gets their addresses
            self._key, self._kept = key, tensors
        # some kernels do not accept vectors
        return (self._prepacked(x) if x.dim() > 1 else self._prepacked(x.unsqueeze(0)).squeeze(0)).to(x.dtype)


# torch.compile breaks its graph here and continues after it
_outside_the_graph = torch.compiler.disable(Matmul._with_gradient)


# torch 2.5 and 2.6 have none
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class _WithGradient(torch.autograd.Function):
    """The matmul itself, with the reference's gradient for the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matmul: Matmul, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operands = matrix, inputs
        return matmul._now(x, matrix, bias, inputs)

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
    return Reference().prepack(replace(matrix, trusted=True), bias, inputs, x.dtype)(x).to(x.dtype)


def _empty(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """The matmul of no tokens, or with a matrix without columns."""
    empty = x.new_zeros(*x.shape[:-1], matrix.shape[0])
    return empty if bias is None else empty + bias.to(x.dtype)


def _prepare(x: Tensor, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None) -> tuple[Prepacked, str]:
    """A matrix prepacked by the first kernel that accepts it, and the kernel's name."""
    bias = None if bias is None else bias.detach()
    fitting = [kernel for kernel in kernels(x.device) if kernel.refusal(matrix, inputs, x.dtype) is None]
    if settings.memory == "low":
        # other kernels rearrange matrices, which costs more than it gains for one call
        integers = any(isinstance(kernel, IntMM) for kernel in fitting) and x.shape[-1] > 0
        return BlockwiseMatmul(
            matrix, bias, inputs, integers
        ), "int_mm by blocks" if integers else "reference by blocks"
    return fitting[0].prepack(matrix, bias, inputs, x.dtype), fitting[0].name


def _identity(tensor: Tensor | None) -> tuple[Any, ...]:
    """A key that changes when a tensor is replaced, moved or written to."""
    if tensor is None:
        return ()
    # inference tensors have no version counter, and cannot be written to outside
    return tensor.data_ptr(), tensor.device, tensor.shape, 0 if tensor.is_inference() else tensor._version
