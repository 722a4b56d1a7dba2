"""Fake-quantized weights: the quantizer of one matrix, and the class of a module whose weight is read through it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.families.matrices import embedding_scale
from lmcompress.families.narrow import Derived, derive
from lmcompress.numerics.graphs import recording
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.quantizers.base import Quantized, check_finite
from lmcompress.numerics.quantizers.registry import quantizer_for
from lmcompress.quantization.planning import Planned

_FAKE = "_fake_weight"


class FakeWeight(nn.Module):
    """The quantizer of one matrix, wherever the model has it.

    Attributes:
        path: path of its module.
        scheme: its scheme, with the current bits.
        state: the quantizer's learned or chosen state, or ``None``; a parameter if it is learned.
        enabled: whether readers get quantized values; otherwise the parameter itself.
        shared: whether several modules have it.
        in_pass: whether a forward pass is going on, in which a shared matrix is quantized once.
        held: whether it is quantized once without gradient, until this is set again.

    Args:
        planned: entry of the plan.
        weight: the parameter.
        transposed: whether it is stored as ``(in, out)``.
        with_state: whether the initial state is found now; without it, codes must come by :meth:`freeze`.

    Raises:
        LmcompressError: If weights are NaN or infinite.
    """

    state: Tensor | None

    def __init__(self, planned: Planned, weight: Tensor, *, transposed: bool, with_state: bool = True) -> None:
        super().__init__()
        self.path, self.scheme, self.enabled = planned.path, planned.weights, True
        self._part, self._transposed, self.shared = planned.part, transposed, bool(planned.tied)
        self.in_pass = self.held = False
        self._curvature: Tensor | None = None
        self._frozen: Quantized | None = None
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        check_finite(weight, f"weights of {self.path}")
        state = self.scheme.initial_state(self._view(weight)) if with_state else None
        if state is not None and self.scheme.function().learned:
            self.state = nn.Parameter(state)
        else:
            self.register_buffer("state", state)

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches this matrix, by its path or its part.

        Args:
            pattern: as in a :class:`~lmcompress.quantization.config.Rule`.

        Returns:
            Whether it does.
        """
        return any(fnmatchcase(name, pattern) for name in (self.path, self._part) if name)

    def quantize(self, stored: Tensor) -> Quantized:
        """Values and codes of the matrix as ``(out, in)``.

        Args:
            stored: the parameter, as stored.

        Returns:
            The quantizer's result, with gradient.
        """
        if self._frozen is not None:
            return self._frozen
        self._follow(stored)
        options = {} if self._curvature is None else {"curvature": self._curvature.to(stored.device)}
        return self.scheme.quantize(self._view(stored), self.state, **options)

    def values(self, stored: Tensor) -> Tensor:
        """The value for readers of the weight.

        Quantized anew for every reader, except where :class:`~lmcompress.quantization.fake.FakeQuantized` says that
        nothing can have changed: ``Tensor.data`` is written to without a trace, by moving averages of weights for
        example.

        Args:
            stored: the parameter.

        Returns:
            Its shape and dtype.
        """
        if not self.enabled:
            return stored
        keep = self.shared and self.in_pass or self.held and not torch.is_grad_enabled()
        if not keep or torch.compiler.is_compiling() or recording():
            return self._values(stored)
        key = self._key(stored)
        if self._kept is None or self._kept[0] != key:
            values = self._values(stored)
            self._kept = key, values
            if values.requires_grad:
                # then its pass is over, and the optimizer's turn comes
                values.register_hook(self._spent)
            return values
        return self._kept[1]

    def rows(self, stored: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor | None:
        """The embeddings of tokens, if it is enough to quantize these rows.

        Args:
            stored: the table ``(tokens, width)``.
            ids: any shape.
            padding_idx: row of the embedding without gradient.

        Returns:
            ``(*ids.shape, width)``, or ``None`` if the whole table is needed, or available.
        """
        alone = self.scheme.granularity != "tensor" and self.scheme.function().by_rows
        if not (
            alone and self._frozen is None and self.enabled and not self.shared and torch.is_grad_enabled()
        ) or ids.numel() >= len(stored):
            return None
        self._follow(stored)
        wanted = ids.reshape(-1)
        state = None if self.state is None else F.embedding(wanted, self.state)
        quantized = self.scheme.quantize(F.embedding(wanted, stored, padding_idx), state)
        return quantized.values.to(stored.dtype).reshape(*ids.shape, -1)

    def set_bits(self, bits: Bits, stored: Tensor) -> None:
        """Change the bit-width; the state that depends on it is reinitialized from the current weights.

        Args:
            bits: a bit-width that the quantizer supports.
            stored: the parameter.

        Raises:
            LmcompressError: If the quantizer does not support these bits.
        """
        quantizer_for(self.scheme.quantizer, bits)
        if bits == self.scheme.bits:
            return
        self.scheme = self.scheme.model_copy(update={"bits": bits})
        state = self.scheme.initial_state(self._view(stored))
        if state is not None and self.state is not None:
            with torch.no_grad():
                self.state.copy_(state)
        self.forget()

    def set_curvature(self, curvature: Tensor | None, stored: Tensor) -> None:
        """Weight the squared errors that ``laq`` minimizes.

        Args:
            curvature: same shape as the stored parameter, >= 0; ``None`` weights all equally.
            stored: the parameter.

        Raises:
            LmcompressError: If the quantizer takes no curvature, or the shape differs.
        """
        if not self.scheme.function().takes_curvature:
            raise LmcompressError(
                f"a curvature must go to matrices of a quantizer that takes one, such as 'laq', got one for "
                f"{self.path}, which has {self.scheme.name!r}"
            )
        if curvature is not None and curvature.shape != stored.shape:
            raise LmcompressError(
                f"the curvature of {self.path} must have the shape of the parameter, {tuple(stored.shape)}, got "
                f"{tuple(curvature.shape)}"
            )
        self._curvature = None if curvature is None else self._view(curvature.detach())
        self.forget()

    def freeze(self, quantized: Quantized | None) -> None:
        """Use codes found in another way, such as without training.

        Args:
            quantized: the matrix, as ``(out, in)``; ``None``: quantize again.
        """
        self._frozen = quantized
        self.forget()

    def forget(self) -> None:
        """Clear the cached values."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        # values with a graph cannot be copied
        return {**self.__dict__, "_kept": None, "in_pass": False, "held": False}

    def _values(self, stored: Tensor) -> Tensor:
        return self._view(self.quantize(stored).values).to(stored.dtype)

    def _spent(self, gradient: Tensor) -> None:
        self.in_pass = False
        self.forget()

    def _view(self, stored: Tensor) -> Tensor:
        return stored.t() if self._transposed else stored

    def _follow(self, stored: Tensor) -> None:
        if self.state is not None and self.state.device != stored.device:
            self.to(stored.device)

    def _key(self, stored: Tensor) -> tuple[Any, ...]:
        state = (0, 0) if self.state is None else (self.state._version, self.state.data_ptr())
        return stored._version, stored.data_ptr(), *state, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Faked(Derived):
    """Mixed into the class of a module whose weight is quantized when it is read."""

    prefix = "FakeQuantized"

    @property
    def weight(self) -> Tensor:
        """The quantized values, with a gradient to the parameter; the parameter itself if quantization is off."""
        module = cast(nn.Module, self)
        stored, fake = module._parameters["weight"], cast(FakeWeight, module.__dict__[_FAKE])
        if stored is None:
            raise LmcompressError(
                f"{fake.path} must keep the weight that was fake-quantized, it is None now: take quantization away "
                "with FakeQuantized.remove() before the model is changed"
            )
        try:
            return fake.values(stored)
        except AttributeError as error:
            # nn.Module takes an AttributeError for "no property" and would return the parameter itself
            raise RuntimeError(f"the weight could not be quantized: {error}") from error


class FakedEmbedding(Faked):
    """The same for embeddings, of which a batch needs few rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, integers.

        Returns:
            ``(*ids.shape, width)``.
        """
        embedding = cast(nn.Embedding, self)
        plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
        plain = plain and embedding_scale(embedding) is None
        stored, fake = embedding._parameters["weight"], embedding.__dict__[_FAKE]
        rows = fake.rows(stored, ids, embedding.padding_idx) if plain else None
        return cast(Tensor, super().forward(ids) if rows is None else rows)  # type: ignore[misc]


def fake_quantize_module(module: nn.Module, fake: FakeWeight) -> None:
    """Let a module's weight be read through a quantizer.

    Args:
        module: modified in place; its parameter stays where it is.
        fake: the quantizer.
    """
    # bypasses nn.Module: learned values are not parameters of the model
    module.__dict__[_FAKE] = fake
    derive(module, FakedEmbedding if isinstance(module, nn.Embedding) else Faked)


def release_module(module: nn.Module) -> None:
    """Undo :func:`fake_quantize_module`.

    Args:
        module: any module; one that is not fake-quantized is unchanged.
    """
    if isinstance(module, Faked):
        module.__dict__.pop(_FAKE)
        module.__class__ = module.stock
