"""Post-training quantization block by block: every matrix is rounded for inputs from already quantized blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hessian import exact, output_error
from lmcompress.activations.hooks import valid_tokens
from lmcompress.activations.running import with_progress
from lmcompress.activations.walking import Take, Walk, without_padding
from lmcompress.errors import LmcompressError
from lmcompress.families import STAGES, Block, outline_of, weight_view
from lmcompress.families.coupled import stage_of
from lmcompress.families.weights import EMBEDDINGS, modules_by_path
from lmcompress.nn.quantized_attention import ROLES
from lmcompress.numerics.errors import relative_error
from lmcompress.quantization.fake import FakeActivation, FakeQuantized, calibrating
from lmcompress.quantization.planning import Planned
from lmcompress.quantization.ptq.awq import awq_scales, multiply_columns, scalings, why_unscaled
from lmcompress.quantization.ptq.checks import Method
from lmcompress.quantization.ptq.gptq import gptq
from lmcompress.quantization.report import QuantizedMatrix, matrix_row

MEASURED_TOKENS = 4096
"""Tokens after which no further batch is compared: the error of the last hidden state has two digits by then."""

Look = Callable[[Mapping[nn.Module, Take]], None]


class InputMoments:
    """Sums over the inputs of a module.

    Attributes:
        hessian: ``(in, in)``, Σ x xᵀ.
        sizes: ``(in,)``, Σ abs(x).
        count: number of tokens.
    """

    def __init__(self) -> None:
        self.hessian, self.sizes, self.count = torch.zeros(0), torch.zeros(0), 0

    def take(self, x: Tensor, mask: Tensor) -> None:
        """Add the inputs of one batch.

        Args:
            x: ``(rows, length, in)``, or ``(rows, in)``.
            mask: ``(rows, length)`` bool, true for tokens that are not padding.
        """
        rows = without_padding(x, mask).float()
        if not len(rows):
            return
        hessian, sizes = exact(rows.T @ rows), exact(rows.abs().sum(dim=0))
        first = not self.count
        self.hessian = hessian if first else self.hessian + hessian
        self.sizes = sizes if first else self.sizes + sizes
        self.count += len(rows)


def measured_batches(data: Sequence[Mapping[str, Tensor]]) -> int:
    """Number of batches, from the first, on which the error of the last hidden state is measured.

    Args:
        data: from :func:`~lmcompress.activations.walking.calibration_batches`.

    Returns:
        The fewest that have :data:`MEASURED_TOKENS` tokens without padding; all if they have fewer.
    """
    tokens = 0
    for number, batch in enumerate(data):
        if tokens >= MEASURED_TOKENS:
            return number
        tokens += int(valid_tokens(batch).sum())
    return len(data)


class PostTrainingRun:
    """Post-training quantization of one model, block by block.

    Args:
        model: in evaluation mode.
        fake: its quantizers, all disabled; they are enabled as codes and ranges are found.
        data: from :func:`~lmcompress.activations.walking.calibration_batches`, or None.
        method: rounding method.
        damping: for ``gptq``.
        order: for ``gptq``.
        output_errors: whether to measure the error of each matrix at its outputs, whatever the method.

    Attributes:
        rows: result for each matrix, by path.
        hidden_error: error of the last block's output on the first :func:`measured_batches`; None without data.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fake: FakeQuantized,
        data: Sequence[Mapping[str, Tensor]] | None,
        method: Method,
        damping: float,
        order: bool,
        output_errors: bool,
    ) -> None:
        self.rows: dict[str, QuantizedMatrix] = {}
        self.hidden_error: float | None = None
        self._model, self._fake, self._method = model, fake, method
        self._damping, self._order = damping, order
        self._outputs = output_errors or method == "gptq"
        self._walk = None if data is None else Walk(model, data)
        self._measured = 0 if data is None else measured_batches(data)
        self._modules = modules_by_path(model)
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._changed: list[tuple[nn.Parameter, Tensor]] = []
        self._scaled: set[str] = set()
        self._notes: dict[str, str] = {}

    def undo(self) -> None:
        """Restore the weights that scaling has changed."""
        for parameter, values in reversed(self._changed):
            parameter.data = values

    def all(self, progress: bool) -> None:
        """Find the codes of every matrix, and every range.

        Args:
            progress: whether to show a bar, on a terminal.
        """
        matrices = self._fake.plan.matrices
        walk = self._walk
        dense = [] if walk is None else walk.last_hidden(self._measured)
        for planned in matrices:
            if planned.part == EMBEDDINGS:
                self._round(planned, None)
        self._outside([p for p in matrices if p.part == "embedding_projection"])
        if walk is not None:
            walk.start()
        blocks = outline_of(self._model).blocks
        for index in with_progress(range(len(blocks)), "quantize", enabled=progress):
            self._block(index, blocks[index])
        if walk is not None:
            self._compare(dense, walk.hidden()[: self._measured])
        self._outside([p for p in matrices if p.block is None and p.part not in (EMBEDDINGS, "embedding_projection")])
        for planned in matrices:
            if planned.part == EMBEDDINGS and walk is not None and planned.path in self._fake.inputs:
                heads = [self._modules[path] for path in self._fake.readers(planned)]
                self._calibrate([self._fake.inputs[planned.path]], heads, walk.look_outside)

    def _block(self, index: int, block: Block) -> None:
        walk = self._walk
        parts = {p.part: p for p in self._fake.plan.matrices if p.block == index}
        look = None if walk is None else partial(walk.look, index)
        if self._method == "awq" and look is not None:
            self._scale(block, parts, look)
        for stage in STAGES:
            if look is not None and stage in (("attention_out",), ("cross_out",)):
                self._attention(block, stage[0], look)
            self._stage([parts[part] for part in stage if part in parts], look)
        for planned in self._fake.plan.matrices:
            # in a block that nobody has described: each by itself, in the order of its modules
            if planned.block == index and stage_of(planned.part) is None:
                self._stage([planned], look)
        if walk is not None:
            walk.step(index)

    def _outside(self, matrices: Sequence[Planned]) -> None:
        # one by one: their inputs may differ
        for planned in matrices:
            self._stage([planned], None if self._walk is None else self._walk.look_outside)

    def _stage(self, matrices: Sequence[Planned], look: Look | None) -> None:
        """Independent matrices: their ranges, then their codes."""
        if not matrices:
            return
        if look is None:
            for planned in matrices:
                self._round(planned, None)
            return
        modules = {planned.path: self._modules[planned.path] for planned in matrices}
        inputs = {path: self._fake.inputs.get(path) for path in modules}
        self._calibrate([a for a in set(inputs.values()) if a is not None], list(modules.values()), look)
        if not self._outputs:
            for planned in matrices:
                self._round(planned, None)
            return
        # query, key and value have the same input, unless rules quantize it differently
        moments = {activation: InputMoments() for activation in inputs.values()}
        first = {activation: path for path, activation in reversed(inputs.items())}
        takes = {m: moments[inputs[p]].take if first[inputs[p]] == p else _ignore for p, m in modules.items()}
        look(takes)
        for planned in matrices:
            self._round(planned, moments[inputs[planned.path]])

    def _calibrate(self, activations: Sequence[FakeActivation], readers: Sequence[nn.Module], look: Look) -> None:
        """Fix static ranges, and quantize these activations from now on."""
        waiting = [activation for activation in activations if activation.scheme.range != "dynamic"]
        if waiting:
            with calibrating(waiting):
                look({module: _ignore for module in readers})
        for activation in activations:
            activation.enabled = True

    def _attention(self, block: Block, out: str, look: Look) -> None:
        """The ranges within the attention whose output a matrix reads."""
        part = "attention" if out == "attention_out" else "cross_attention"
        if not block.family.attention or not block.has(out):
            return
        path = self._paths[id(block.get(part))]
        names = [f"{path}.{role}" for role in ROLES]
        found = [self._fake.activations[name] for name in names if name in self._fake.activations]
        if found:
            self._calibrate(found, [block.get(out)], look)

    def _scale(self, block: Block, parts: Mapping[str, Planned], look: Look) -> None:
        """AWQ: scale inputs where it is exact, by statistics of the block before it is quantized."""
        found = [scaling for scaling in scalings(block, self._change) if parts.keys() & set(scaling.parts)]
        moments = [InputMoments() for _ in found]
        if found:
            takes = zip(found, moments, strict=True)
            look({block.get(scaling.parts[0]): own.take for scaling, own in takes})
        for scaling, own in zip(found, moments, strict=True):
            chosen = [parts[part] for part in scaling.parts if part in parts]
            if not own.count:
                continue
            scales = awq_scales(
                [weight_view(self._modules[planned.path]) for planned in chosen],
                (own.sizes / own.count).float(),
                own.hessian,
                [planned.weights.rounded for planned in chosen],
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

    def _round(self, planned: Planned, moments: InputMoments | None) -> None:
        """Find the codes of one matrix, and use them in the model from now on."""
        weight = weight_view(self._modules[planned.path]).detach()
        known = moments is not None and moments.count > 0
        method = "awq" if planned.path in self._scaled else "rtn"
        try:
            if self._method == "gptq" and moments is not None and known:
                method = "gptq"
                quantized = gptq(
                    weight,
                    moments.hessian.to(weight.device),
                    planned.weights.rounded,
                    damping=self._damping,
                    order=self._order,
                )
            else:
                quantized = planned.weights.rounded(weight)
        except LmcompressError as error:
            raise LmcompressError(f"{planned.path}: {error}") from error
        fake = self._fake.weights[planned.path]
        fake.freeze(quantized)
        fake.enabled = True
        if self._method == "gptq" and method == "rtn":
            self._notes[planned.path] = (
                "each row is read by itself" if planned.part == EMBEDDINGS else "no calibration data reached it"
            )
        hessian = moments.hessian if moments is not None and known else None
        self.rows[planned.path] = matrix_row(
            planned,
            quantized,
            method=method,
            error=_error(weight, quantized.values, hessian),
            measured="weights" if hessian is None else "output",
            note=self._notes.get(planned.path, ""),
        )

    def _compare(self, dense: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        error = sum(float((exact(a) - exact(b)).square().sum()) for a, b in zip(dense, hidden, strict=True))
        norm = sum(float(exact(a).square().sum()) for a in dense)
        self.hidden_error = error / norm if norm > 0 else 0.0


def _error(weight: Tensor, values: Tensor, hessian: Tensor | None) -> float:
    if hessian is None:
        return relative_error(weight, values)
    norm = float(output_error(weight, torch.zeros_like(values), hessian).sum())
    return float(output_error(weight, values, hessian).sum()) / norm if norm > 0 else 0.0


def _ignore(x: Tensor, mask: Tensor) -> None:
    """Does nothing, for modules whose inputs only need to be reached."""
