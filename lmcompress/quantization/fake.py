"""A model that computes with quantized numbers while its weights stay as they are, to be trained or to be packed.

**Weights.** The class of a module that is quantized becomes one whose ``weight`` is a property: whoever reads it, the
module's own ``forward`` or a loss over the vocabulary, gets quantized values with a gradient to the parameter, which
stays where it was under its own name. So tied matrices stay tied and are quantized once, and checkpoints of a training
are ordinary ones of the full-precision weights. (``torch.nn.utils.parametrize`` would rename every tensor.)

**Activations.** Inputs of the products by forward pre-hooks; within attention by
:mod:`lmcompress.nn.quantized_attention`.

What is learned on top, γ, clips and steps, belongs to no module of the model: it is in :attr:`FakeQuantized.state`, for
a learning rate of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lmcompress.checkpoint.config import ActivationEncoding, AttentionEncoding
from lmcompress.checkpoint.encoding import Packable, pack_model
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of, is_conv1d
from lmcompress.nn.packed import InputRange
from lmcompress.nn.quantized_attention import (
    ROLES,
    Role,
    attach,
    attention_quantizers,
    quantize_attention,
    release_attention,
)
from lmcompress.numerics.activations import initial_range, initial_step, learned
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.inputs import quantize_input, static_range
from lmcompress.numerics.observers import Histogram, MinMax
from lmcompress.numerics.quantizers import Quantized, check_finite, quantizer_for
from lmcompress.quantization.config import ActivationScheme
from lmcompress.quantization.planning import Plan, Planned, reads_alike, relative_path, stored_weight

_FAKE = "_fake_weight"
_NOT_CALIBRATED = (
    "has a range that must be calibrated first: give FakeQuantized batches, or call its calibrate(batches) with a few"
)
_BY_ROWS = ("dynamic_scaling", "pact", "lsq", "elastic", "twn", "tbt", "binary", "minmax", "percentile", "mse")
"""Quantizers by which a row comes out the same whatever rows are beside it; laq stops turning for all at once."""


class FakeWeight(nn.Module):
    """What quantizes one matrix, wherever the model has it.

    Attributes:
        path: of its module.
        scheme: how, with the bits that are set now.
        state: what its quantizer learned or chose, or ``None``; a parameter where it is learned.
        enabled: whether readers get quantized values; else the parameter itself.

    Args:
        planned: what the plan says.
        weight: the parameter.
        transposed: whether it is stored as ``(in, out)``.

    Raises:
        LmcompressError: weights that are NaN or infinite.
    """

    state: Tensor | None

    def __init__(self, planned: Planned, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.path, self.scheme, self.enabled = planned.path, planned.weights, True
        self._part, self._transposed, self._shared = planned.part, transposed, bool(planned.tied)
        self._curvature: Tensor | None = None
        self._settled: Quantized | None = None
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        check_finite(weight, f"weights of {self.path}")
        state = self._initial(weight)
        if state is not None and self.scheme.function().learned:
            self.state = nn.Parameter(state)
        else:
            self.register_buffer("state", state)

    def matches(self, pattern: str) -> bool:
        """Whether a glob names this matrix, by its path or its part.

        Args:
            pattern: as in a :class:`~lmcompress.quantization.config.Rule`.

        Returns:
            Whether it does.
        """
        return any(fnmatchcase(name, pattern) for name in (self.path, self._part) if name)

    def quantize(self, stored: Tensor) -> Quantized:
        """Values and codes of the matrix as ``(out, in)``.

        Args:
            stored: the parameter, as it is stored.

        Returns:
            What the quantizer gives, with gradient.
        """
        if self._settled is not None:
            return self._settled
        self._follow(stored)
        options = {} if self._curvature is None else {"curvature": self._curvature.to(stored.device)}
        return self.scheme.function().function(
            self._view(stored), self.state, bits=self.scheme.bits, granularity=self.scheme.grouping(), **options
        )

    def values(self, stored: Tensor) -> Tensor:
        """What who reads the weight gets: quantized once for each forward pass, and without gradient once for all.

        Without gradient the values are kept until a weight or scale changes, or until the next pass with gradient, so
        that ``generate`` does not quantize for every token; meanwhile the model takes its size once more.

        Args:
            stored: the parameter.

        Returns:
            Its shape and dtype.
        """
        if not self.enabled:
            return stored
        keep = not torch.compiler.is_compiling() and (self._shared or not torch.is_grad_enabled())
        key = self._key(stored) if keep else ()
        if keep and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        values = self._view(self.quantize(stored).values).to(stored.dtype)
        if keep:
            self._kept = key, values
        return values

    def rows(self, stored: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor | None:
        """The vectors of words, where it is enough to quantize these alone.

        Args:
            stored: the table ``(words, width)``.
            ids: any shape.
            padding_idx: of the embedding: a row without gradient.

        Returns:
            ``(*ids.shape, width)``, or ``None`` where the whole table is wanted, or at hand.
        """
        alone = self.scheme.granularity != "tensor" and self.scheme.quantizer in _BY_ROWS
        if not (
            alone and self._settled is None and self.enabled and not self._shared and torch.is_grad_enabled()
        ) or ids.numel() >= len(stored):
            return None
        self._follow(stored)
        wanted = ids.reshape(-1)
        state = None if self.state is None else F.embedding(wanted, self.state)
        quantized = self.scheme.function().function(
            F.embedding(wanted, stored, padding_idx),
            state,
            bits=self.scheme.bits,
            granularity=self.scheme.grouping(),
        )
        return quantized.values.to(stored.dtype).reshape(*ids.shape, -1)

    def set_bits(self, bits: Bits, stored: Tensor) -> None:
        """Go on with other bits; what belongs to bits begins anew, from the weights as they are.

        Args:
            bits: that the quantizer has.
            stored: the parameter.

        Raises:
            LmcompressError: the quantizer has no such bits.
        """
        quantizer_for(self.scheme.quantizer, bits)
        if bits == self.scheme.bits:
            return
        self.scheme = self.scheme.model_copy(update={"bits": bits})
        state = self._initial(stored)
        if state is not None and self.state is not None:
            with torch.no_grad():
                self.state.copy_(state)
        self.forget()

    def set_curvature(self, curvature: Tensor | None, stored: Tensor) -> None:
        """Weigh the squared errors that ``laq`` makes small.

        Args:
            curvature: of the parameter's shape as it is stored, >= 0; ``None`` weighs all alike.
            stored: the parameter.

        Raises:
            LmcompressError: another quantizer, or another shape.
        """
        if self.scheme.quantizer != "laq":
            raise LmcompressError(
                f"a curvature must go to matrices of the quantizer 'laq', got one for {self.path}, which has "
                f"{self.scheme.quantizer!r}"
            )
        if curvature is not None and curvature.shape != stored.shape:
            raise LmcompressError(
                f"the curvature of {self.path} must have the shape of the parameter, {tuple(stored.shape)}, got "
                f"{tuple(curvature.shape)}"
            )
        self._curvature = None if curvature is None else self._view(curvature.detach())
        self.forget()

    def settle(self, quantized: Quantized | None) -> None:
        """Stand for codes that were found otherwise, such as without training.

        Args:
            quantized: of the matrix as ``(out, in)``; ``None``: quantize again.
        """
        self._settled = quantized
        self.forget()

    def forget(self) -> None:
        """Forget the values that were kept."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        # values with a graph cannot be copied
        return {**self.__dict__, "_kept": None}

    def _view(self, stored: Tensor) -> Tensor:
        return stored.t() if self._transposed else stored

    def _initial(self, stored: Tensor) -> Tensor | None:
        initial = self.scheme.function().initial
        if initial is None:
            return None
        options = {"percentile": self.scheme.percentile} if self.scheme.quantizer.endswith("percentile") else {}
        weight = self._view(stored.detach())
        return initial(weight, bits=self.scheme.bits, granularity=self.scheme.grouping(), **options)

    def _follow(self, stored: Tensor) -> None:
        if self.state is not None and self.state.device != stored.device:
            self.to(stored.device)

    def _key(self, stored: Tensor) -> tuple[Any, ...]:
        state = (0, 0) if self.state is None else (self.state._version, self.state.data_ptr())
        return stored._version, stored.data_ptr(), *state, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@dataclass
class _Seen:
    """What calibration has seen of one activation."""

    ranges: MinMax | Histogram
    step: Tensor | None = None
    count: int = 0


class FakeActivation(nn.Module):
    """What quantizes one activation; several modules that read the same tensor share one.

    Attributes:
        name: of the activation.
        scheme: how; ``symmetric`` is decided.
        enabled: whether it does.
        step: of learned ranges, ``(1, 1)``; NaN until it is calibrated.
        offset: of learned ranges that are not symmetric, likewise.
        scale: of static ranges, ``(1,)``; NaN until it is calibrated.
        zero_point: of static ranges that are not symmetric, ``(1,)`` uint8.

    Args:
        name: of the activation, for errors.
        scheme: how.
        readers: how many modules read the same tensor.
        heads: whether the tensor is ``(batch, heads, length, ...)`` and not ``(batch, length, ...)``.
    """

    step: Tensor | None
    offset: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, name: str, scheme: ActivationScheme, *, readers: int = 1, heads: bool = False) -> None:
        super().__init__()
        self.name, self.scheme, self.enabled = name, scheme, True
        self._readers, self._heads = readers, heads
        self._encoding = scheme.encoding()
        self._ready = scheme.range == "dynamic"
        self._seen: _Seen | None = None
        self._mask: Tensor | None = None
        # input, whether with gradient, result, how many have yet to read it
        self._kept: tuple[Tensor, bool, Tensor, int] | None = None
        learns, fixed, shifted = scheme.range == "learned", scheme.range == "static", not scheme.symmetric
        # NaN is a range that no calibration gives
        self.step = nn.Parameter(torch.full((1, 1), torch.nan)) if learns else None
        self.offset = nn.Parameter(torch.full((1, 1), torch.nan)) if learns and shifted else None
        self.register_buffer("scale", torch.full((1,), torch.nan) if fixed else None)
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.uint8) if fixed and shifted else None)

    def active(self) -> bool:
        """Whether it quantizes or calibrates now."""
        return self.enabled or self._seen is not None

    def forward(self, x: Tensor) -> Tensor:
        """The activation on its levels.

        Args:
            x: ``(batch, length, ...)``, or with heads as the second axis.

        Returns:
            The same shape and dtype.

        Raises:
            LmcompressError: a range that must be calibrated is not.
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
            args: what it is called with.

        Returns:
            The same with the first argument quantized.
        """
        return (self(args[0]), *args[1:])

    def watch(self) -> None:
        """Calibrate from now on: look at what comes, and let it pass."""
        if self.scheme.range != "dynamic":
            least = self.scheme.range == "learned" or self.scheme.calibration == "minmax"
            self._seen = _Seen(MinMax() if least else Histogram())

    def look_through(self, mask: Tensor | None) -> None:
        """What counts of the next batch.

        Args:
            mask: ``(batch, length)``, true for tokens that are no padding; ``None``: all.
        """
        self._mask = mask

    def settle(self, *, discard: bool = False) -> None:
        """Calibrate no longer, and take over the range that was seen.

        Args:
            discard: whether to leave the range as it was instead.

        Raises:
            LmcompressError: nothing was seen, or nothing but zeros.
        """
        seen, self._seen, self._mask = self._seen, None, None
        if seen is None or discard:
            return
        try:
            self._take(seen)
        except LmcompressError as error:
            raise LmcompressError(f"{self.name}: {error}") from error
        self._ready = True

    def set_bits(self, bits: Literal[8, 4]) -> None:
        """Go on with other bits, over the same range.

        Args:
            bits: 8 or 4.

        Raises:
            LmcompressError: neither, or a range that was chosen for its bits.
        """
        if bits not in (4, 8) or isinstance(bits, (bool, float)):
            raise LmcompressError(f"bits of activations must be 8 or 4, got {bits!r}")
        if bits == self.scheme.bits:
            return
        if self.scheme.calibration == "mse":
            raise LmcompressError(
                f"{self.name} has a range of the least error at {self.scheme.bits} bits, which is none at {bits}: plan "
                "anew with these bits and calibrate"
            )
        old = self.final() if self._calibrated() else None
        self.scheme = self.scheme.model_copy(update={"bits": bits})
        self._encoding = self.scheme.encoding()
        if old is None or old[1] is None:
            return
        steps = (
            (2 ** old[0].bits - 1) / (2**bits - 1) if not self.scheme.symmetric else _half(old[0].bits) / _half(bits)
        )
        with torch.no_grad():
            for tensor in (self.step, self.scale) if self.scheme.range == "learned" else (self.scale,):
                if tensor is not None:
                    tensor.mul_(steps)
            if self.scheme.range == "static" and old[1][1] is not None and self.zero_point is not None:
                self.zero_point.copy_((old[1][1].float() / steps).round())
        self.forget()

    def final(self) -> tuple[ActivationEncoding, InputRange | None]:
        """How the activation is described once it is settled, and the range of what is not dynamic.

        Returns:
            The description, and scale and zero point.

        Raises:
            LmcompressError: a range that must be calibrated is not.
        """
        if self.scheme.range == "dynamic":
            return self._encoding, None
        self._need_range()
        if self.scale is not None:
            return self._encoding, (self.scale.detach().clone(), _cloned(self.zero_point))
        assert self.step is not None
        settled = learned(torch.zeros(1, device=self.step.device), self.step, self.offset, bits=self.scheme.bits)
        zero_point = None if settled.zero_points is None else settled.zero_points.reshape(1)
        return self._encoding, (settled.scales.reshape(1).clone(), zero_point)

    def forget(self) -> None:
        """Forget the tensor that was read last."""
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
            # a state that was loaded is a range as well; asked once, for the host waits for it
            tensor = self.step if self.step is not None else self.scale
            self._ready = tensor is not None and bool(torch.isfinite(tensor).all())
        return self._ready

    def _need_range(self) -> None:
        if not self._calibrated():
            raise LmcompressError(f"{self.name} {_NOT_CALIBRATED}")

    def _look(self, x: Tensor, seen: _Seen) -> None:
        x = x.transpose(1, 2) if self._heads else x
        if self._mask is not None and x.dim() > 2 and x.shape[:2] == self._mask.shape:
            x = x[self._mask.bool()]
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


class _AttentionFakes:
    """What one module of attention quantizes with."""

    def __init__(self, roles: Mapping[Role, FakeActivation]) -> None:
        self.roles = dict(roles)

    def active(self) -> bool:
        return any(activation.active() for activation in self.roles.values())

    def __call__(self, role: Role, x: Tensor) -> Tensor:
        return cast(Tensor, self.roles[role](x)) if role in self.roles else x


class _Faked:
    """Mixed into the class of a module whose weight is quantized when it is read."""

    @property
    def weight(self) -> Tensor:
        module = cast(nn.Module, self)
        stored = module._parameters["weight"]
        assert stored is not None
        try:
            return cast(FakeWeight, module.__dict__[_FAKE]).values(stored)
        except AttributeError as error:
            # nn.Module takes an AttributeError for "no property" and would give the parameter itself
            raise RuntimeError(f"the weight could not be quantized: {error}") from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: copies and pickles name the class that it was made of
        return _rebuilt, (_stock(type(self)),), self.__dict__.copy()


class _FakedEmbedding(_Faked):
    """The same for embeddings, which need few of their rows."""

    def forward(self, ids: Tensor) -> Tensor:
        embedding = cast(nn.Embedding, self)
        plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
        stored, fake = embedding._parameters["weight"], embedding.__dict__[_FAKE]
        rows = fake.rows(stored, ids, embedding.padding_idx) if plain else None
        return cast(Tensor, super().forward(ids) if rows is None else rows)  # type: ignore[misc]


@cache
def _faked_class(stock: type) -> type:
    mixin = _FakedEmbedding if issubclass(stock, nn.Embedding) else _Faked
    return type(f"FakeQuantized{stock.__name__}", (mixin, stock), {"__module__": stock.__module__})


def _stock(faked: type) -> type:
    return next(cls for cls in faked.__mro__ if not issubclass(cls, _Faked))


def _rebuilt(stock: type) -> Any:
    made = cast(Any, _faked_class)(stock)
    return made.__new__(made)


class FakeQuantized:
    """A model that computes with quantized numbers, as a plan says; its parameters keep their values and their names.

    Args:
        model: changed in place, until :meth:`remove` or :meth:`finish`.
        plan: what gets what, of this very model.
        batches: for ranges that are calibrated, see :meth:`calibrate`; none are needed where all are dynamic.

    Attributes:
        weights: what quantizes each matrix, by its path.
        activations: what quantizes each activation, by its name.
        inputs: the activation that enters the product with a matrix, by the path of the matrix; of embeddings, that of
            the head which is tied to them.
        state: what is learned or calibrated, as a module whose ``state_dict`` belongs into checkpoints of training.

    Raises:
        LmcompressError: the model is fake-quantized already, a plan of another model, weights that are NaN or infinite,
            or calibration without data.

    Note:
        With ranges of the whole tensor, padding and the other rows of a batch have a part in dynamic ranges, as in
        TernaryBERT's code. Calibrated ranges leave padding out.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, batches: Iterable[Mapping[str, Any]] | None = None) -> None:
        self.model, self.plan = model, plan
        self._modules = {relative_path(model, name): module for name, module in model.named_modules()}
        self._handles: list[RemovableHandle] = []
        self._check()
        # all that can be refused is refused before the model is changed
        self.weights = {planned.path: self._fake_weight(planned) for planned in plan.matrices}
        self.activations: dict[str, FakeActivation] = {}
        self.inputs: dict[str, FakeActivation] = {}
        self._readers: list[tuple[nn.Module, FakeActivation]] = []
        self._plan_inputs()
        self._attention = self._plan_attention()
        self.state = nn.ModuleDict(
            {
                "weights": nn.ModuleDict({_key(path): fake for path, fake in self.weights.items()}),
                "activations": nn.ModuleDict({_key(name): fake for name, fake in self.activations.items()}),
            }
        ).to(model.device)
        self._put()
        if batches is not None:
            try:
                self.calibrate(batches)
            except BaseException:
                self.remove()
                raise

    def scales(self) -> dict[str, nn.Parameter]:
        """What is learned beside the weights.

        Returns:
            γ, clip or step of a matrix by its path; step and offset of an activation by its name.
        """
        found = {path: fake.state for path, fake in self.weights.items() if isinstance(fake.state, nn.Parameter)}
        for name, activation in self.activations.items():
            found |= {f"{name}.{key}": parameter for key, parameter in activation.named_parameters()}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """The same without names, for an optimizer; they want no weight decay."""
        return list(self.scales().values())

    def quantized(self) -> dict[str, Quantized]:
        """Every matrix quantized as it is now, without gradient.

        Returns:
            Values, codes and scales by path, of the matrix as ``(out, in)``.
        """
        return {path: self.quantized_matrix(path) for path in self.weights}

    @torch.no_grad()
    def quantized_matrix(self, path: str) -> Quantized:
        """One matrix quantized as it is now, without gradient.

        Args:
            path: of its module.

        Returns:
            Values, codes and scales of the matrix as ``(out, in)``.
        """
        return self.weights[path].quantize(self.parameter(path).detach())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Take the ranges that are static, or the start of those that are learned, from what a few batches give.

        The model runs in evaluation mode with quantized weights and activations as they are. What is padding by the
        batch's ``attention_mask`` does not count.

        Args:
            batches: what the model is called with; ``labels`` are left out.

        Raises:
            LmcompressError: there is no batch, or an activation that no batch reaches or that is nothing but zeros.
        """
        waiting = [a for a in self.activations.values() if a.scheme.range != "dynamic"]
        if not waiting:
            return
        training, settled = self.model.training, False
        self.model.eval()
        for activation in self.activations.values():
            activation.watch()
        try:
            enabled = [activation for activation in self.activations.values() if activation.enabled]
            for activation in enabled:
                activation.enabled = False
            for batch in batches:
                inputs = {key: _moved(value, self.model.device) for key, value in batch.items() if key != "labels"}
                for activation in waiting:
                    activation.look_through(inputs.get("attention_mask"))
                self.model(**inputs)
            settled = True
        finally:
            for activation in enabled:
                activation.enabled = True
            self.model.train(training)
            for activation in waiting:
                activation.settle(discard=not settled)

    def set_enabled(self, enabled: bool, what: Literal["weights", "activations"] | None = None) -> None:
        """Switch quantization on or off; off, the model computes what it did, to the bit.

        Args:
            enabled: whether numbers are quantized.
            what: the weights or the activations alone; ``None``: both.
        """
        kinds: dict[str, Iterable[FakeWeight | FakeActivation]] = {
            "weights": self.weights.values(),
            "activations": self.activations.values(),
        }
        for kind, fakes in kinds.items():
            for fake in fakes if what in (None, kind) else ():
                fake.enabled = enabled

    def set_bits(self, bits: Bits, modules: str = "*") -> None:
        """Go on with other bits of weights, such as on a schedule from many to few.

        What a quantizer has learned belongs to its bits and begins anew, from the weights as they are; the parameters
        stay the same objects, for the sake of an optimizer.

        Args:
            bits: of the weights.
            modules: which, as in a :class:`~lmcompress.quantization.config.Rule`.

        Raises:
            LmcompressError: no matrix has such a name, or a quantizer has no such bits.
        """
        fakes = [fake for fake in self.weights.values() if fake.matches(modules)]
        if not fakes:
            raise LmcompressError(f"no quantized matrix is named {modules!r}{nearest(modules, self.weights)}")
        for fake in fakes:
            quantizer_for(fake.scheme.quantizer, bits)
        for fake in fakes:
            fake.set_bits(bits, self._stored(fake.path))

    def set_activation_bits(self, bits: Literal[8, 4]) -> None:
        """Go on with other bits of activations, over the same ranges.

        Args:
            bits: 8 or 4.

        Raises:
            LmcompressError: neither, or ranges that were chosen for their bits.
        """
        for activation in self.activations.values():
            activation.set_bits(bits)

    def set_curvature(self, curvature: Mapping[str, Tensor | None]) -> None:
        """Weigh the errors of ``laq``, such as by the square root of Adam's second moments.

        Args:
            curvature: by path; of the parameter's shape as it is stored, >= 0; ``None`` weighs all weights alike.

        Raises:
            LmcompressError: a path that is not quantized, another quantizer, or another shape.
        """
        for path in curvature:
            if path not in self.weights:
                raise LmcompressError(f"no quantized matrix has the path {path!r}{nearest(path, self.weights)}")
        for path, values in curvature.items():
            self.weights[path].set_curvature(values, self._stored(path))

    def parameter(self, path: str) -> nn.Parameter:
        """The full-precision weight behind a path, which training changes.

        Args:
            path: of a quantized matrix.

        Returns:
            The parameter, as it is stored.

        Raises:
            LmcompressError: no such path.
        """
        if path not in self.weights:
            raise LmcompressError(f"no quantized matrix has the path {path!r}{nearest(path, self.weights)}")
        return cast(nn.Parameter, self._stored(path))

    def remove(self) -> None:
        """Take quantization away: the model is as it was, with the weights that it has now. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        release_attention(self.model)
        for module in self.model.modules():
            if isinstance(module, _Faked):
                module.__class__ = _stock(type(module))
                module.__dict__.pop(_FAKE)
        self._forget()

    def finish(self) -> None:
        """Pack the model in place: its weights become codes, and its config says so; nothing is fake any more.

        Raises:
            LmcompressError: a range that was not calibrated, or weights or scales that are NaN or infinite; the model
                is fake-quantized still.
        """
        settled = {name: activation.final() for name, activation in self.activations.items()}
        roles = next(iter(self._attention.values())).roles if self._attention else {}
        attention = AttentionEncoding(**{role: fake.final()[0] for role, fake in roles.items()}) if roles else None
        self.remove()
        try:
            pack_model(self.model, _Parts(self, settled), attention)
        except BaseException:
            self._put()
            raise
        if attention is None:
            return
        quantize_attention(self.model, self._attention, attention)
        for module, fakes in self._attention.items():
            places = dict(cast(nn.Module, attention_quantizers(module)).named_buffers())
            for role, fake in fakes.roles.items():
                scale, zero_point = settled[fake.name][1] or (None, None)
                for place, value in ((f"{role}_scale", scale), (f"{role}_zero_point", zero_point)):
                    if value is not None:
                        places[place].copy_(value)

    def __enter__(self) -> FakeQuantized:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _check(self) -> None:
        if any(isinstance(module, _Faked) for module in self.model.modules()):
            raise LmcompressError("the model is fake-quantized already; remove() of that FakeQuantized takes it away")
        for planned in self.plan.matrices:
            for path in (planned.path, *planned.tied):
                module = self._modules.get(path)
                if module is None or stored_weight(module) is None:
                    raise LmcompressError(
                        f"the plan must be of this model, got one with a matrix {path}, which is not here"
                        f"{nearest(path, self._modules)}"
                    )

    def _fake_weight(self, planned: Planned) -> FakeWeight:
        module = self._modules[planned.path]
        return FakeWeight(planned, self._stored(planned.path), transposed=is_conv1d(module))

    def _plan_inputs(self) -> None:
        alike: dict[tuple[int | None, ActivationScheme], list[Planned]] = {}
        for planned in self.plan.matrices:
            if planned.inputs is None:
                continue
            if reads_alike(planned.part):
                alike.setdefault((planned.block, planned.inputs), []).append(planned)
            else:
                # of the embeddings it is the head that reads an activation
                reader = planned.tied if isinstance(self._modules[planned.path], nn.Embedding) else (planned.path,)
                self.inputs[planned.path] = self._read(reader, planned.inputs)
        for (_, scheme), group in alike.items():
            activation = self._read([planned.path for planned in group], scheme)
            self.inputs |= {planned.path: activation for planned in group}

    def _read(self, paths: Sequence[str], scheme: ActivationScheme) -> FakeActivation:
        activation = FakeActivation(f"{paths[0]}.input", scheme, readers=len(paths))
        self.activations[activation.name] = activation
        self._readers += [(self._modules[path], activation) for path in paths]
        return activation

    def _plan_attention(self) -> dict[nn.Module, _AttentionFakes]:
        if self.plan.attention is None:
            return {}
        paths = {id(module): path for path, module in self._modules.items()}
        fakes: dict[nn.Module, _AttentionFakes] = {}
        for block in anatomy_of(self.model).blocks:
            if not block.num_heads:
                continue
            module = block.get("attention")
            roles: dict[Role, FakeActivation] = {}
            for role in ROLES:
                scheme = self.plan.attention.resolved(one_sided=role == "probabilities")
                roles[role] = FakeActivation(f"{paths[id(module)]}.{role}", scheme, heads=True)
                self.activations[roles[role].name] = roles[role]
            fakes[module] = _AttentionFakes(roles)
        return fakes

    def _put(self) -> None:
        if self._attention:
            attach(self.model, self._attention)
        for planned in self.plan.matrices:
            for path in (planned.path, *planned.tied):
                module = self._modules[path]
                # past nn.Module's own way: what is learned is no parameter of the model
                module.__dict__[_FAKE] = self.weights[planned.path]
                module.__class__ = cast(Any, _faked_class)(type(module))
        for module, activation in self._readers:
            self._handles.append(module.register_forward_pre_hook(activation.before))
        for root in {id(m): m for m in (self.model, self.model.base_model)}.values():
            self._handles.append(root.register_forward_pre_hook(self._begin))

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Before every forward pass: what was kept with a gradient has had its backward pass."""
        if torch.is_grad_enabled():
            self._forget()

    def _forget(self) -> None:
        for weight in self.weights.values():
            weight.forget()
        for activation in self.activations.values():
            activation.forget()

    def _stored(self, path: str) -> Tensor:
        weight = stored_weight(self._modules[path])
        assert weight is not None
        return weight


class _Parts(Mapping[str, Packable]):
    """What is packed, quantized one after another when it is asked for: all at once would be the model three times."""

    def __init__(
        self, faked: FakeQuantized, settled: Mapping[str, tuple[ActivationEncoding, InputRange | None]]
    ) -> None:
        self._faked = faked
        self._inputs = {path: settled[activation.name] for path, activation in faked.inputs.items()}

    def __getitem__(self, path: str) -> Packable:
        inputs, input_range = self._inputs.get(path, (None, None))
        return Packable(self._faked.quantized_matrix(path), inputs, input_range)

    def __iter__(self) -> Iterator[str]:
        return iter(self._faked.weights)

    def __len__(self) -> int:
        return len(self._faked.weights)


def _half(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def _key(path: str) -> str:
    # names of submodules have no dots
    return path.replace(".", "/")


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
