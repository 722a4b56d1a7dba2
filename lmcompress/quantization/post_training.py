"""Quantization without training: rounding, GPTQ or AWQ, block by block, on what quantized blocks before it give."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hessian import exact, output_error
from lmcompress.activations.running import evaluating, with_progress
from lmcompress.activations.walking import Batch, Take, Walk, calibration_batches, without_padding
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.errors import LmcompressError, nearest
from lmcompress.evaluation import weight_bytes
from lmcompress.families import Block, anatomy_of, weight_view
from lmcompress.model import CompressedModel
from lmcompress.nn.packed import Packed
from lmcompress.nn.quantized_attention import ROLES
from lmcompress.numerics.packing import container_for, packed_bytes
from lmcompress.numerics.quantizers import Quantized
from lmcompress.quantization.awq import awq_scales, multiply_columns, scalings, why_unscaled
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, WeightScheme
from lmcompress.quantization.fake import FakeActivation, FakeQuantized
from lmcompress.quantization.gptq import Rounding, gptq
from lmcompress.quantization.planning import EMBEDDINGS, Plan, Planned, plan, relative_path
from lmcompress.quantization.report import QuantizationReport, QuantizedMatrix

Method = Literal["rtn", "gptq", "awq"]
"""Round to nearest; GPTQ's error compensation; AWQ's scaling of inputs, then rounding."""

POST_TRAINING = QuantizationConfig(
    weights=WeightScheme(quantizer="mse", granularity="row"),
    embeddings=WeightScheme(quantizer="mse", granularity="row"),
    attention=False,
)
"""8 bits by row, inputs of 8 bits: what needs no training to keep its quality."""

_STAGES = (("query", "key", "value", "qkv"), ("attention_out",), ("ffn_in",), ("ffn_out",))
_WITHOUT_TRAINING = "mse, minmax, percentile, asymmetric_mse, asymmetric_minmax, laq, twn, tbt or binary"

Look = Callable[[Mapping[nn.Module, Take], "Callable[[Tensor], None] | None"], None]


def quantize(
    model: PreTrainedModel | CompressedModel,
    config: QuantizationConfig = POST_TRAINING,
    batches: Iterable[Batch] | None = None,
    *,
    method: Method = "rtn",
    damping: float = 0.01,
    order: bool = True,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model without training it, and pack it.

    Blocks are done in turn. Of each, query, key and value come first, then what they feed, and every matrix is rounded
    for the inputs that it will really have: those that quantized matrices and activations before it give. Static ranges
    of activations are taken from the same inputs. Padding counts in neither.

    Word embeddings are rounded to nearest whatever the method: each word's row is read by itself, so that there is
    nothing by which another weight could make an error good.

    Args:
        model: of a known family, stock or cut; packed in place. Whatever is refused leaves it as it was.
        config: what is quantized to what. Quantizers and ranges that are learned need training and are refused.
        batches: calibration data, some hundred sequences: what the model is called with, labels are left out. With
            ``rtn`` they are needed for static ranges alone; with them the report has errors of outputs.
        method: ``rtn`` rounds to nearest; ``gptq`` lets weights make good what rounding others did
            (:func:`~lmcompress.quantization.gptq.gptq`); ``awq`` gives inputs that matter finer steps where the family
            allows (:func:`~lmcompress.quantization.awq.scalings`) and rounds the others to nearest.
        damping: of ``gptq``.
        order: of ``gptq``: whether to begin with the inputs that are greatest.
        progress: shows a bar, on a terminal.

    Returns:
        What was done, with the error of each matrix.

    Raises:
        LmcompressError: an unknown method, something learned, a model that is packed or quantized already, calibration
            data that are missing, empty or all padding, weights or activations that are NaN or infinite, nothing that
            the method could do, or what :func:`~lmcompress.quantization.planning.plan` refuses.
    """
    started = time.perf_counter()
    inner = model.model if isinstance(model, CompressedModel) else model
    if method not in get_args(Method):
        raise LmcompressError(f"unknown method {method!r}{nearest(method, get_args(Method))}")
    _refuse_quantized(inner)
    planned = plan(inner, config)
    check_post_training(inner, planned, method)
    data = _data(inner, planned, batches, method)
    before = weight_bytes(inner).total
    fake = FakeQuantized(inner, planned)
    run = _Run(inner, fake, data, method, damping, order)
    try:
        fake.set_enabled(False)
        with evaluating(inner):
            run.all(progress)
        fake.finish()
    except BaseException:
        fake.remove()
        run.undo()
        raise
    return QuantizationReport(
        method=method,
        config=config.model_dump(mode="json"),
        matrices=[run.rows[matrix.path] for matrix in planned.matrices],
        dense=dict(planned.dense),
        bytes_before=before,
        bytes_after=weight_bytes(inner).total,
        hidden_error=run.hidden_error,
        tokens=run.tokens,
        attention=None if planned.attention is None else planned.attention.bits,
        seconds=time.perf_counter() - started,
    )


def check_post_training(model: PreTrainedModel, planned: Plan, method: Method) -> None:
    """Refuse what :func:`quantize` would, as far as a plan tells.

    Args:
        model: that the plan is of, on any device.
        planned: what gets what.
        method: as for :func:`quantize`.

    Raises:
        LmcompressError: something learned, or nothing that the method could do.
    """
    _refuse_learned(planned)
    _refuse_idle(model, planned, method)


def rounding_of(scheme: WeightScheme) -> Rounding:
    """Round to nearest as a scheme says, its state made anew of each weight.

    Args:
        scheme: of a quantizer that learns nothing, or whose start is good enough.

    Returns:
        A function of weights ``(out, in)``.
    """
    quantizer, granularity = scheme.function(), scheme.grouping()
    options = {"percentile": scheme.percentile} if scheme.quantizer.endswith("percentile") else {}

    def rounding(weight: Tensor) -> Quantized:
        weight = weight.detach()
        state = None
        if quantizer.initial is not None:
            state = quantizer.initial(weight, bits=scheme.bits, granularity=granularity, **options)
        return quantizer.function(weight, state, bits=scheme.bits, granularity=granularity)

    return rounding


def stored_bytes(quantized: Quantized) -> int:
    """Bytes of codes, scales and zero points once they are packed.

    Args:
        quantized: any.

    Returns:
        Their number.
    """
    zero_points = 0 if quantized.zero_points is None else quantized.zero_points.numel()
    codes = packed_bytes(tuple(quantized.values.shape), container_for(quantized.grid))
    return codes + 4 * quantized.scales.numel() + zero_points


class _Moments:
    """Sums over the inputs of a module."""

    def __init__(self) -> None:
        self.hessian, self.sizes, self.count = torch.zeros(0), torch.zeros(0), 0

    def take(self, x: Tensor, mask: Tensor) -> None:
        rows = without_padding(x, mask).float()
        if not len(rows):
            return
        hessian, sizes = exact(rows.T @ rows), exact(rows.abs().sum(dim=0))
        first = not self.count
        self.hessian = hessian if first else self.hessian + hessian
        self.sizes = sizes if first else self.sizes + sizes
        self.count += len(rows)


class _Run:
    """One model on its way through post-training quantization."""

    def __init__(
        self,
        model: PreTrainedModel,
        fake: FakeQuantized,
        data: Sequence[Mapping[str, Tensor]] | None,
        method: Method,
        damping: float,
        order: bool,
    ) -> None:
        self.rows: dict[str, QuantizedMatrix] = {}
        self.hidden_error: float | None = None
        self.tokens = 0
        self._model, self._fake, self._method = model, fake, method
        self._damping, self._order = damping, order
        self._walk = None if data is None else Walk(model, data)
        self._modules = {relative_path(model, name): module for name, module in model.named_modules()}
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._changed: list[tuple[nn.Parameter, Tensor]] = []
        self._scaled: set[str] = set()
        self._notes: dict[str, str] = {}

    def undo(self) -> None:
        """Give back the weights that scaling has changed."""
        for parameter, values in reversed(self._changed):
            parameter.data = values

    def all(self, progress: bool) -> None:
        """Settle every matrix and every range."""
        matrices = self._fake.plan.matrices
        walk = self._walk
        dense = [] if walk is None else walk.last_hidden()
        for planned in matrices:
            if planned.part == EMBEDDINGS:
                self._settle(planned, None)
        self._outside([p for p in matrices if p.part == "embedding_projection"])
        if walk is not None:
            walk.start()
        blocks = anatomy_of(self._model).blocks
        for index in with_progress(range(len(blocks)), "quantize", enabled=progress):
            self._block(index, blocks[index])
        if walk is not None:
            self._compare(dense, walk.hidden())
        self._outside([p for p in matrices if p.block is None and p.part not in (EMBEDDINGS, "embedding_projection")])
        for planned in matrices:
            if planned.part == EMBEDDINGS and walk is not None and planned.path in self._fake.inputs:
                heads = [self._modules[path] for path in planned.tied]
                self._calibrate([self._fake.inputs[planned.path]], heads, walk.look_outside)

    def _block(self, index: int, block: Block) -> None:
        walk = self._walk
        parts = {p.part: p for p in self._fake.plan.matrices if p.block == index}
        look = None if walk is None else partial(walk.look, index)
        if self._method == "awq" and look is not None:
            self._scale(block, parts, look)
        for number, stage in enumerate(_STAGES):
            if number == 1 and look is not None:
                self._attention(block, look)
            self._stage([parts[part] for part in stage if part in parts], look)
        if walk is not None:
            walk.step(index)

    def _outside(self, matrices: Sequence[Planned]) -> None:
        # one by one: they need not read the same
        for planned in matrices:
            self._stage([planned], None if self._walk is None else self._walk.look_outside)

    def _stage(self, matrices: Sequence[Planned], look: Look | None) -> None:
        """Matrices that do not wait for one another: their ranges, then their codes."""
        if not matrices:
            return
        if look is None:
            for planned in matrices:
                self._settle(planned, None)
            return
        modules = {planned.path: self._modules[planned.path] for planned in matrices}
        inputs = {path: self._fake.inputs.get(path) for path in modules}
        self._calibrate([a for a in set(inputs.values()) if a is not None], list(modules.values()), look)
        # query, key and value read the same, unless rules quantize it differently
        moments = {activation: _Moments() for activation in inputs.values()}
        first = {activation: path for path, activation in reversed(inputs.items())}
        takes = {m: moments[inputs[p]].take if first[inputs[p]] == p else _ignore for p, m in modules.items()}
        look(takes, None)
        for planned in matrices:
            self._settle(planned, moments[inputs[planned.path]])

    def _calibrate(self, activations: Sequence[FakeActivation], readers: Sequence[nn.Module], look: Look) -> None:
        """Settle ranges that are static, and quantize these activations from now on."""
        waiting = [activation for activation in activations if activation.scheme.range != "dynamic"]
        if waiting:
            for activation in waiting:
                activation.watch()

            def masked(mask: Tensor) -> None:
                for activation in waiting:
                    activation.look_through(mask)

            look({module: _ignore for module in readers}, masked)
            for activation in waiting:
                activation.settle()
        for activation in activations:
            activation.enabled = True

    def _attention(self, block: Block, look: Look) -> None:
        path = self._paths[id(block.get("attention"))]
        names = [f"{path}.{role}" for role in ROLES]
        found = [self._fake.activations[name] for name in names if name in self._fake.activations]
        if found:
            self._calibrate(found, [block.get("attention_out")], look)

    def _scale(self, block: Block, parts: Mapping[str, Planned], look: Look) -> None:
        """AWQ: scale inputs where it is exact; statistics are those of the block before it is quantized."""
        found = [scaling for scaling in scalings(block, self._change) if parts.keys() & set(scaling.parts)]
        moments = [_Moments() for _ in found]
        if found:
            takes = zip(found, moments, strict=True)
            look({block.get(scaling.parts[0]): own.take for scaling, own in takes}, None)
        for scaling, own in zip(found, moments, strict=True):
            chosen = [parts[part] for part in scaling.parts if part in parts]
            if not own.count:
                continue
            scales = awq_scales(
                [weight_view(self._modules[planned.path]) for planned in chosen],
                (own.sizes / own.count).float(),
                own.hessian,
                [rounding_of(planned.weights) for planned in chosen],
            )
            if bool((scales == 1).all()):
                self._notes |= {planned.path: "no scale is better than none" for planned in chosen}
                continue
            for part in scaling.parts:
                multiply_columns(block.get(part), scales, self._change)
            scaling.divide(scales)
            self._scaled |= {planned.path for planned in chosen}
        for part, reason in why_unscaled(block).items():
            if part in parts:
                self._notes[parts[part].path] = reason

    def _change(self, parameter: nn.Parameter, values: Tensor) -> None:
        self._changed.append((parameter, parameter.data))
        parameter.data = values.to(parameter.dtype).contiguous()

    def _settle(self, planned: Planned, moments: _Moments | None) -> None:
        """Find the codes of one matrix, and let the model compute with them from now on."""
        weight = weight_view(self._modules[planned.path]).detach()
        known = moments is not None and moments.count > 0
        method = "awq" if planned.path in self._scaled else "rtn"
        try:
            if self._method == "gptq" and moments is not None and known:
                method = "gptq"
                quantized = gptq(
                    weight,
                    moments.hessian.to(weight.device),
                    rounding_of(planned.weights),
                    damping=self._damping,
                    order=self._order,
                )
            else:
                quantized = rounding_of(planned.weights)(weight)
        except LmcompressError as error:
            raise LmcompressError(f"{planned.path}: {error}") from error
        fake = self._fake.weights[planned.path]
        fake.settle(quantized)
        fake.enabled = True
        if self._method == "gptq" and method == "rtn":
            self._notes[planned.path] = (
                "each row is read by itself" if planned.part == EMBEDDINGS else "no calibration data reached it"
            )
        hessian = moments.hessian if moments is not None and known else None
        self.rows[planned.path] = self._row(planned, quantized, weight, hessian, method)

    def _row(
        self, planned: Planned, quantized: Quantized, weight: Tensor, hessian: Tensor | None, method: str
    ) -> QuantizedMatrix:
        scheme = planned.weights
        static = planned.inputs is not None and planned.inputs.range != "dynamic"
        return QuantizedMatrix(
            path=planned.path,
            part=planned.part,
            quantizer=scheme.quantizer,
            bits=scheme.bits,
            granularity=scheme.granularity,
            method=method,
            error=_relative_error(weight, quantized.values, hessian),
            measured="weights" if hessian is None else "output",
            weights=weight.numel(),
            bytes_before=weight.numel() * weight.element_size(),
            bytes_after=stored_bytes(quantized) + (0 if not static else 4 if planned.inputs.symmetric else 5),  # type: ignore[union-attr]
            inputs=None if planned.inputs is None else planned.inputs.bits,
            note=self._notes.get(planned.path, ""),
        )

    def _compare(self, dense: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        error = sum(float((exact(a) - exact(b)).square().sum()) for a, b in zip(dense, hidden, strict=True))
        norm = sum(float(exact(a).square().sum()) for a in dense)
        self.tokens = sum(len(a) for a in dense)
        self.hidden_error = error / norm if norm > 0 else 0.0


def _ignore(x: Tensor, mask: Tensor) -> None:
    """For modules that are waited for, and no more."""


def _relative_error(weight: Tensor, values: Tensor, hessian: Tensor | None) -> float:
    if hessian is None:
        error, norm = (weight.float() - values).square().sum(), weight.float().square().sum()
    else:
        error = output_error(weight, values, hessian).sum()
        norm = output_error(weight, torch.zeros_like(values), hessian).sum()
    return float(error / norm) if float(norm) > 0 else 0.0


def _refuse_quantized(model: PreTrainedModel) -> None:
    if any(isinstance(module, Packed) for module in model.modules()):
        raise LmcompressError(
            "the model must be dense to be quantized, it is packed already: quantize the model that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives, or better the one that was packed"
        )
    if getattr(model.config, "quantization_config", None) is not None and recorded_compression(model.config) is None:
        raise LmcompressError(
            "the model must be dense to be quantized, it is quantized by another library: load it without "
            "quantization_config"
        )


def _refuse_learned(planned: Plan) -> None:
    for matrix in planned.matrices:
        if matrix.weights.function().learned:
            raise LmcompressError(
                f"the quantizer of {matrix.path} must not be one that learns, got {matrix.weights.quantizer!r}, whose "
                f"scale is only good once it is trained: use {_WITHOUT_TRAINING}, or train with QuantizationTrainer"
            )
    schemes: list[tuple[str, ActivationScheme | None]] = [(m.path, m.inputs) for m in planned.matrices]
    for name, scheme in [*schemes, ("attention", planned.attention)]:
        if scheme is not None and scheme.range == "learned":
            raise LmcompressError(
                f"activation ranges of {name} must be dynamic or static without training, got learned; static ones are "
                "calibrated"
            )


def _refuse_idle(model: PreTrainedModel, planned: Plan, method: Method) -> None:
    if method == "rtn":
        return
    others = [matrix for matrix in planned.matrices if matrix.part != EMBEDDINGS]
    if not others:
        raise LmcompressError(
            f"{method} must have matrices beside the embeddings to work on, got none: give the config weights, or use "
            "method='rtn'"
        )
    if method == "awq":
        blocks = anatomy_of(model).blocks
        parts = {(m.block, m.part) for m in others}
        able = {(i, part) for i, b in enumerate(blocks) for s in scalings(b, _unchanged) for part in s.parts}
        if not parts & able:
            possible = sorted({part for _, part in able})
            raise LmcompressError(
                f"awq must have a matrix whose input can be scaled exactly, got none: in a {type(model).__name__} that "
                f"is {', '.join(possible) or 'no part'}; use method='gptq'"
            )


def _unchanged(parameter: nn.Parameter, values: Tensor) -> None:
    """For those who only ask what could be scaled."""


def _data(
    model: PreTrainedModel, planned: Plan, batches: Iterable[Batch] | None, method: Method
) -> list[dict[str, Tensor]] | None:
    if batches is not None:
        return calibration_batches(model, batches)
    static = [m.path for m in planned.matrices if m.inputs is not None and m.inputs.range == "static"]
    static += ["attention"] if planned.attention is not None and planned.attention.range == "static" else []
    if method != "rtn" or static:
        needs = f"method {method!r}" if method != "rtn" else f"the static range of {static[0]}"
        raise LmcompressError(
            f"{needs} must have calibration data, got batches=None: give it some hundred sequences, or use "
            "method='rtn' with dynamic ranges"
        )
    return None
