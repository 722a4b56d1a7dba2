"""Modules whose weights are codes: packed linear layers, GPT-2's ``Conv1D``, embeddings and tied heads.

Tensors have the names of the dense module. ``weight`` is one row of bytes, never a matrix, so that a loader
without support for it refuses it instead of taking codes for weights. Scales stay float32 whatever the model is
cast to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.kernels.dispatch import settings
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.nn.fusion import Followed, Joined, activated, coded, dtype_of_codes, fusing
from lmcompress.numerics.grids import Granularity, Grid, PerGroup
from lmcompress.numerics.inputs import InputEncoding, check_input_range
from lmcompress.numerics.packing import Container, check_packed, check_scales, pack, packed_bytes, packed_shape
from lmcompress.numerics.quantizers.base import Quantized

InputRange = tuple[Tensor, Tensor | None]
"""Scale and zero point of a static range, one number each."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Layout:
    """The layout of a matrix in its bytes.

    Attributes:
        grid: possible codes.
        container: storage of codes in bytes.
        granularity: which weights share a scale.
        zero_points: whether there are zero points besides the scales.
    """

    grid: Grid
    container: Container
    granularity: Granularity
    zero_points: bool = False


class Packed(nn.Module):
    """A matrix of codes with its scales; its use is defined in the modules below.

    Args:
        rows: number of outputs, or tokens.
        columns: number of inputs, or width of a token's embedding.
        layout: layout of the matrix in its bytes.
        inputs: quantization of the input; None leaves it unquantized.
        device: device of the tensors, whose values are unset.

    Raises:
        LmcompressError: If the group size does not divide the rows.
    """

    weight: Tensor
    weight_scales: Tensor
    weight_zero_points: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self, rows: int, columns: int, layout: Layout, inputs: InputEncoding | None, device: Any = None
    ) -> None:
        super().__init__()
        self.shape, self.layout, self.inputs = (rows, columns), layout, inputs
        scales = layout.granularity.scale_shape(self.shape)
        static = inputs is not None and inputs.range == "static"
        shapes: dict[str, tuple[tuple[int, ...] | None, torch.dtype]] = {
            "weight": ((packed_bytes(self.shape, layout.container),), torch.uint8),
            "weight_scales": (scales, torch.float32),
            "weight_zero_points": (scales if layout.zero_points else None, torch.uint8),
            "input_scale": ((1,) if static else None, torch.float32),
            "input_zero_point": ((1,) if static and inputs and not inputs.symmetric else None, torch.uint8),
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype, device=device))

    def fill(self, quantized: Quantized, input_range: InputRange | None = None) -> None:
        """Copy in codes and scales.

        Args:
            quantized: of this shape and layout.
            input_range: scale and zero point of a static range.

        Raises:
            LmcompressError: If weights or scales are NaN or infinite, shape or layout differ, or a static range is
                missing.
        """
        static = self.inputs is not None and self.inputs.range == "static"
        if static != (input_range is not None):
            raise LmcompressError(
                f"a static range must come with its scale, and no other range with one; got {self.inputs} and "
                f"{input_range}"
            )
        if tuple(quantized.values.shape) != self.shape:
            raise LmcompressError(
                f"the quantized weight must have shape {self.shape}, as (out, in), got {tuple(quantized.values.shape)}"
            )
        layout = self.layout
        came = Layout(quantized.grid, layout.container, quantized.granularity, quantized.zero_points is not None)
        if came != layout:
            raise LmcompressError(f"the quantized weight must be made as the layout says, {layout}, got {came}")
        scale, zero_point = input_range if input_range is not None else (None, None)
        if (zero_point is None) != (self.input_zero_point is None):
            raise LmcompressError(
                "a static range must come with a zero point where it is not symmetric, and only there; got "
                f"{zero_point} for {self.inputs}"
            )
        values = {
            "weight": pack(quantized.codes, layout.grid, layout.container).flatten(),
            "weight_scales": quantized.scales,
            "weight_zero_points": quantized.zero_points,
            "input_scale": scale,
            "input_zero_point": zero_point,
        }
        with torch.no_grad():
            for name, value in values.items():
                if value is not None:
                    buffer: Tensor = getattr(self, name)
                    buffer.copy_(value.reshape(buffer.shape))
        self.check(type(self).__name__)

    def matrix(self) -> Matrix:
        """The codes and scales in the form that the kernels take."""
        # straight from the buffers: the attributes of a module are looked up slowly, and this happens in every call
        layout, buffers = self.layout, self._buffers
        return Matrix(
            cast(Tensor, buffers["weight"]),
            cast(Tensor, buffers["weight_scales"]),
            buffers["weight_zero_points"],
            self.shape,
            layout.grid,
            layout.container,
            layout.granularity,
        )

    def matmul_inputs(self) -> Inputs | None:
        """The quantization of the input in the form that the kernels take, with its range if that is static."""
        if self.inputs is None:
            return None
        return Inputs(self.inputs, self._buffers["input_scale"], self._buffers["input_zero_point"])

    def dequantized(self) -> Tensor:
        """The dequantized weights, ``(out, in)`` float32: bit-exactly what they were quantized to."""
        return self.matrix().values()

    def check(self, name: str) -> None:
        """Refuse tensors that packing never writes.

        Args:
            name: name of the module in the error.

        Raises:
            CheckpointError: If codes are beyond the grid, scales are negative or not finite, zero points are not codes,
                or input ranges cannot come from calibration.
        """
        try:
            check_scales(self.weight_scales, self.shape, self.layout.granularity)
            high = self.layout.grid.high
            if self.weight_zero_points is not None and bool((self.weight_zero_points > high).any()):
                raise CheckpointError(
                    f"zero points must be codes, at most {high}, got {int(self.weight_zero_points.max())}; the "
                    "checkpoint is damaged"
                )
            rows = self.weight.view(packed_shape(self.shape, self.layout.container))
            for part in rows.split(_ROWS_AT_ONCE):
                check_packed(part, (len(part), self.shape[1]), self.layout.grid, self.layout.container)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.weight: {error}") from error
        if self.inputs is not None and self.input_scale is not None:
            check_input_range(self.input_scale, self.input_zero_point, self.inputs, f"{name}'s input")

    def forget(self) -> None:
        """Free the prepacked memory: the tensors have changed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        scales = {name: getattr(self, name) for name in ("weight_scales", "input_scale")}
        super()._apply(fn, recurse)
        for name, kept in scales.items():
            now = getattr(self, name)
            # a cast to half precision is for computation, not for scales of codes
            if now is not None and now.dtype != torch.float32:
                setattr(self, name, kept.to(now.device))
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def extra_repr(self) -> str:
        """Shape and layout, for ``print`` and for PEFT's message that no adapter fits here."""
        layout = self.layout
        return (
            f"{self.shape[0]}×{self.shape[1]}, {layout.grid}, container={layout.container}, {layout.granularity}, "
            f"inputs={self.inputs}; codes, not trainable: model.dequantize() first"
        )


class _PackedMatrix(Packed):
    """The common base of :class:`PackedLinear` and :class:`PackedConv1D`: a matmul, and a bias."""

    bias: nn.Parameter | None
    # the modules that read the same input, and the activation function of the output, if the model knows of any
    joined: Joined | None = None
    followed: Followed | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout,
        inputs: InputEncoding | None = None,
        bias: nn.Parameter | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, layout, inputs, device)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self._matmul = Matmul()

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``, with the input quantized as described.

        Args:
            x: ``(..., in_features)``, floating.

        Returns:
            ``(..., out_features)`` of the dtype of ``x``.

        Raises:
            LmcompressError: If the model is in training mode with gradients enabled.
        """
        _refuse_training(self)
        if x.dtype == torch.uint8 and (dtype := dtype_of_codes(x)) is not None:
            return self._of_codes(x, dtype)
        joined, followed = self.joined, self.followed
        if joined is not None and (part := joined.pending(self, x)) is not None:
            return part
        if joined is not None or followed is not None:
            if not fusing(x):
                followed = None
            elif joined is not None and (part := joined(self, x)) is not None:
                return part
        matrix, inputs = self.matrix(), self.matmul_inputs()
        if followed is None or not followed.next_is_known(self):
            return self._matmul(x, matrix, self.bias, inputs)
        if inputs is not None and (reader := followed.reader()) is not None:
            codes = self._matmul.codes_for(x, matrix, self.bias, inputs, followed.post, reader)
            if codes is not None:
                return coded(codes, x.dtype)
        return activated(self._matmul(x, matrix, self.bias, inputs, post=followed.post))

    def reads_codes(self) -> Inputs | None:
        """The quantization of the input, if this module takes its codes: over a static range, for integer matmuls."""
        inputs = self.matmul_inputs()
        if inputs is None or inputs.scale is None or isinstance(self.layout.granularity, PerGroup):
            return None
        return inputs if settings.memory == "fast" else None

    def _of_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The output in a dtype from an input in the codes of :meth:`reads_codes`."""
        scale, zero = cast(Tensor, self.input_scale), self.input_zero_point
        zeros = None if zero is None else zero.reshape(1, 1)
        flat = codes.reshape(-1, self.in_features)
        y = self._matmul.of_codes(flat, scale.reshape(1, 1), zeros, self.matrix(), self.bias, dtype, None)
        return y.reshape(*codes.shape[:-1], self.out_features)

    def release(self) -> None:
        """Free the prepacked memory of this matrix alone."""
        self._matmul.reset()

    def forget(self) -> None:
        """Free the prepacked memory: the tensors have changed."""
        self._matmul.reset()
        if self.joined is not None:
            self.joined.reset()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.joined is not None:
            self.joined.reset(ranges=True)


class PackedLinear(_PackedMatrix):
    """A packed ``nn.Linear``.

    Args:
        in_features: input width.
        out_features: output width.
        layout: layout of the matrix in its bytes.
        inputs: quantization of the input.
        bias: the dense module's parameter.
        device: device of the codes, whose values are unset.

    Raises:
        LmcompressError: If the group size does not divide the rows.
    """


class PackedConv1D(_PackedMatrix):
    """A packed ``Conv1D``: its codes are of the ``(out, in)`` view, so it computes as :class:`PackedLinear` does.

    Args:
        in_features: input width.
        out_features: output width.
        layout: layout of the matrix in its bytes.
        inputs: quantization of the input.
        bias: the dense module's parameter.
        device: device of the codes, whose values are unset.

    Raises:
        LmcompressError: If the group size does not divide the rows.
    """

    @property
    def nf(self) -> int:
        """Output width, under ``Conv1D``'s name for it."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Input width."""
        return self.in_features


class PackedEmbedding(Packed):
    """A packed ``nn.Embedding``: only the embeddings that are looked up are unpacked.

    Attributes:
        stock: class of the dense module.

    Args:
        num_embeddings: number of tokens.
        embedding_dim: width of a token's embedding.
        layout: layout of the matrix in its bytes.
        inputs: quantization of the input of a head that is tied to it.
        padding_idx: kept for compatibility; it has no effect without training.
        device: device of the codes, whose values are unset.
        dtype: dtype of the output; follows the casts of the model.
        scale: factor of the embeddings that are looked up, which a tied head does not have; None: they have none.

    Raises:
        LmcompressError: If the group size does not divide the rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        layout: Layout,
        inputs: InputEncoding | None = None,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, layout, inputs, device)
        self.scale = scale
        self.stock: type[nn.Embedding] = nn.Embedding
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, integers.

        Returns:
            ``(*ids.shape, embedding_dim)`` in the dtype of the model.

        Raises:
            LmcompressError: If the model is in training mode with gradients enabled.
        """
        return self.scaled(ids, self.scale)

    def scaled(self, ids: Tensor, scale: float | None) -> Tensor:
        """The embeddings of tokens times a factor.

        Args:
            ids: any shape, integers.
            scale: the factor; None: 1.

        Returns:
            ``(*ids.shape, embedding_dim)`` in the dtype of the model.

        Raises:
            LmcompressError: If the model is in training mode with gradients enabled.
        """
        _refuse_training(self)
        found = self.matrix().rows(ids).to(self.dtype)
        # a tensor of that dtype, as the dense module has it
        return found if scale is None else found * torch.tensor(scale, dtype=self.dtype, device=found.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        # no tensor here has the model's dtype: apply the cast to a dummy that has it
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)
        return self


class TiedEmbedding(nn.Module):
    """An embedding table that reads the codes of another and has none of its own, such as that of a decoder.

    Attributes:
        stock: class of the dense module.

    Args:
        embedding: owner of the codes; it stays where it is in the model, not in this module.
        padding_idx: that of the dense module.
        scale: factor of the embeddings that are looked up here; None: they have none.
    """

    def __init__(self, embedding: PackedEmbedding, padding_idx: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.scale = padding_idx, scale
        self.stock: type[nn.Embedding] = nn.Embedding
        # as in TiedHead
        self.__dict__["embedding"] = embedding

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, integers.

        Returns:
            ``(*ids.shape, embedding_dim)`` in the dtype of the model.

        Raises:
            LmcompressError: If the model is in training mode with gradients enabled.
        """
        embedding: PackedEmbedding = self.__dict__["embedding"]
        return embedding.scaled(ids, self.scale)

    def extra_repr(self) -> str:
        """The widths, for ``print``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, tied"


class TiedHead(nn.Module):
    """A vocabulary head that reads the codes of the token embeddings and has none of its own.

    Args:
        embedding: owner of the codes; it stays where it is in the model, not in the head.
        bias: the dense head's parameter.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)
        # bypasses nn.Module, which would register it as a submodule and save its tensors twice
        self.__dict__["embedding"] = embedding
        self._matmul = Matmul()

    def forward(self, x: Tensor) -> Tensor:
        """``x Eᵀ + b``, with the input quantized as described.

        Args:
            x: ``(..., width)``, floating.

        Returns:
            ``(..., tokens)`` of the dtype of ``x``.

        Raises:
            LmcompressError: If the model is in training mode with gradients enabled.
        """
        embedding: PackedEmbedding = self.__dict__["embedding"]
        _refuse_training(embedding)
        return self._matmul(x, embedding.matrix(), self.bias, embedding.matmul_inputs())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedHead:
        super()._apply(fn, recurse)
        self._matmul.reset()
        return self

    def extra_repr(self) -> str:
        """The widths, for ``print``."""
        return f"{self.in_features} -> {self.out_features}, tied"


def _refuse_training(packed: Packed) -> None:
    if packed.training and torch.is_grad_enabled():
        raise LmcompressError(
            "a packed model cannot be trained, its codes have no gradient: train the model that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives and quantize that again, or call model.eval()"
        )
