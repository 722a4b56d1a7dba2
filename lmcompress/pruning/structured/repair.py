"""Closed-form compensation of pruned units, without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.calibration import CalibrationData
from lmcompress.activations.hooks import Taps
from lmcompress.activations.running import evaluating
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, weight_view
from lmcompress.families.refusal import refuse_unproven
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.units import Part, Units, check_units, unit_shapes
from lmcompress.pruning.unstructured.scoring import Batch


@dataclass(frozen=True)
class Repaired:
    """The effect of a repair on one sub-layer.

    Attributes:
        block: its block, from 0.
        part: ``heads`` (the output projection of attention) or ``neurons`` (the second matrix of the feed-forward
            network).
        error_before: error of the sub-layer's output on the calibration data with the mask applied: squared error over
            the squared norm of the dense sub-layer's output without its bias.
        error_after: the same with the repair.
    """

    block: int
    part: Part
    error_before: float
    error_after: float


def least_squares(
    model: PreTrainedModel, mask: Units, batches: Iterable[Batch], *, damping: float = 1e-4
) -> list[Repaired]:
    r"""Re-fit every output projection that loses inputs, so that the remaining ones compensate the pruned ones.

    For inputs X of the dense model, split into those that are kept (with a column of ones for the bias) and removed,

    .. math:: \min_\Delta \| X_r W_r - X_k \Delta \|^2 + \lambda \|\Delta\|^2, \qquad
        \Delta = (X_k^T X_k + \lambda I)^{-1} X_k^T X_r W_r

    is added to the remaining weights and the bias. The ridge pulls towards the original weights, not towards zero,
    so that on the calibration data no sub-layer is ever worse than without repair. Normal equations are summed over
    batches in float64: memory is that of one ``(width, width)`` matrix per sub-layer. One pass.

    Args:
        model: dense, with the shapes of the mask; modified in place. Columns of pruned units become zero, so that it
            computes the result of :func:`~lmcompress.pruning.structured.surgery.cut` (for whole sub-layers,
            blocks and hidden dimensions, only after that).
        mask: bool, True is kept. ``heads`` and ``neurons`` are repaired; pruned sub-layers and blocks are skipped.
        batches: calibration data; padding is ignored.
        damping: λ as a share of the mean square of the inputs.

    Returns:
        The result for each sub-layer that loses some of its inputs.

    Raises:
        LmcompressError: If the mask has another shape or prunes no head and no neuron, damping is not positive or too
            small for the data, or there are no calibration data.

    Reference:
        Yang, Chen & Sze, CVPR 2017, https://arxiv.org/abs/1611.05128, section 3.3 (there on the support of single
        weights); Kwon et al. 2022, https://arxiv.org/abs/2204.09656, section 4.3 (there a factor for each unit).
    """
    layers = _losing(model, mask)
    _check_damping(damping)
    refuse_unproven(model, "repair")
    moments = [torch.zeros(0)] * len(layers)
    squares = [0.0] * len(layers)

    def take(number: int, x: Tensor) -> None:
        rows = layers[number].with_ones(x)
        moment = rows.T @ rows
        moments[number] = moments[number] + moment if len(moments[number]) else moment

    _look(model, layers, take, batches)
    done = []
    for number, layer in enumerate(layers):
        moment, weight = moments[number], layer.extended_weight()
        kept = layer.with_bias_kept().to(moment.device)
        gone_weight = weight[~kept]
        cross = moment[kept][:, ~kept] @ gone_weight
        before = float((gone_weight * (moment[~kept][:, ~kept] @ gone_weight)).sum())
        columns = weight[: layer.width]
        squares[number] = float((columns * (moment[: layer.width, : layer.width] @ columns)).sum())
        done.append(layer.fit(moment[kept][:, kept], cross, before, squares[number], damping))
    return done


def least_squares_in_order(
    model: PreTrainedModel, mask: Units, batches: Iterable[Batch], *, damping: float = 1e-4
) -> list[Repaired]:
    r"""As :func:`least_squares`, sub-layer by sub-layer, each on its actual inputs after pruning.

    Inputs are those of the pruned model, repaired up to there, and targets are the outputs of the dense one, so that
    each sub-layer also compensates the losses of earlier ones, and those that lose nothing themselves are re-fitted
    too. It needs a copy of the model and two forward passes over the data for each sub-layer, which pays off if
    much is cut.

    Args:
        model: as in :func:`least_squares`; modified in place.
        mask: bool, True is kept; all parts are applied while fitting.
        batches: calibration data, iterated many times: a list, not a generator.
        damping: λ as a share of the mean square of the inputs.

    Returns:
        The result for each sub-layer that has inputs left; errors are relative to the dense model's output, with the
        inputs of the pruned one.

    Raises:
        LmcompressError: As :func:`least_squares`.

    Reference:
        Yang, Chen & Sze, CVPR 2017, https://arxiv.org/abs/1611.05128, section 3; inputs after compression as in
        Kurtic et al. (ZipLM) 2023, https://arxiv.org/abs/2302.04089, section 3.1.
    """
    _losing(model, mask)
    _check_damping(damping)
    refuse_unproven(model, "repair")
    kept_batches = list(batches)
    layers = _sub_layers(model, mask)
    dense = copy.deepcopy(model)
    modules = [anatomy_of(dense).blocks[layer.block].get(layer.name) for layer in layers]
    done = []
    with Gates(model, mask.parts()) as gates, evaluating(model), evaluating(dense):
        gates.set(mask)
        for layer, original in zip(layers, modules, strict=True):
            with Taps(model) as taps, Taps(dense) as dense_taps:
                fit = _InOrder(layer, taps, dense_taps)
                # registered after the gates' hooks, so that gated inputs are seen
                taps.on_input(layer.module, fit.inputs)
                dense_taps.on_output(original, fit.targets)
                for batch in CalibrationData(model, kept_batches):
                    dense_taps.run(batch)
                    taps.run(batch)
            done.append(layer.fit(fit.gram, fit.cross, fit.before, fit.square, damping))
    return done


def compensate_bias(model: PreTrainedModel, mask: Units, batches: Iterable[Batch]) -> list[Repaired]:
    """Add the mean contribution of pruned units to the bias of the projection that read them.

    The cheapest repair: it never makes a sub-layer worse on the calibration data, and cannot overfit them.

    Args:
        model: dense, with the shapes of the mask; modified in place, as by :func:`least_squares`.
        mask: bool, True is kept.
        batches: calibration data; padding is ignored.

    Returns:
        The result for each sub-layer that loses some of its inputs.

    Raises:
        LmcompressError: If the mask has another shape or prunes no head and no neuron, an output projection has no
            bias, or there are no calibration data.

    Reference:
        An et al. (FLAP), 2023, https://arxiv.org/abs/2312.11983, section 3.3.
    """
    layers = _losing(model, mask)
    for layer in layers:
        if layer.module.bias is None:
            raise LmcompressError(
                f"the output projection of {layer.part} in block {layer.block} must have a bias to absorb the mean of "
                "pruned units, it has none; use least_squares"
            )
    sums = [torch.zeros(0)] * len(layers)
    counts, before, squares = [0] * len(layers), [0.0] * len(layers), [0.0] * len(layers)

    def take(number: int, x: Tensor) -> None:
        layer, rows = layers[number], x
        weight = layer.extended_weight()[: layer.width]
        gone = ~layer.kept.to(rows.device)
        lost = rows[:, gone] @ weight[gone]
        sums[number] = sums[number] + lost.sum(dim=0) if counts[number] else lost.sum(dim=0)
        counts[number] += len(rows)
        before[number] += float(lost.square().sum())
        squares[number] += float((rows @ weight).square().sum())

    _look(model, layers, take, batches)
    done = []
    for number, layer in enumerate(layers):
        mean = sums[number] / counts[number]
        after = before[number] - counts[number] * float(mean.square().sum())
        layer.change(torch.zeros(0, len(mean)), mean)
        done.append(layer.report(before[number], after, squares[number]))
    return done


def _look(
    model: PreTrainedModel,
    layers: Sequence[_SubLayer],
    take: Callable[[int, Tensor], None],
    batches: Iterable[Batch],
) -> None:
    """Hand over what each sub-layer reads, by its number: ``(tokens, in)`` float64, without padding."""

    def seen(number: int, x: Tensor) -> None:
        take(number, _exact(taps.tokens(x)))

    with Taps(model) as taps, evaluating(model):
        for number, layer in enumerate(layers):
            taps.on_input(layer.module, partial(seen, number))
        for batch in CalibrationData(model, batches):
            taps.run(batch)


class _SubLayer:
    """An output projection and its remaining inputs."""

    def __init__(self, block: int, part: Part, name: str, module: nn.Module, kept: Tensor) -> None:
        self.block, self.part, self.name, self.module, self.kept = block, part, name, module, kept
        self.width = len(kept)

    def with_ones(self, rows: Tensor) -> Tensor:
        """A column of ones for the bias, if there is one."""
        return rows if self.module.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    def with_bias_kept(self) -> Tensor:
        return self.kept if self.module.bias is None else torch.cat([self.kept, torch.ones(1, dtype=torch.bool)])

    def extended_weight(self) -> Tensor:
        """``(in [+ 1], out)`` float64, the bias last."""
        weight = _exact(weight_view(self.module).detach()).T
        bias = self.module.bias
        return torch.cat([weight, _exact(bias.detach())[None]]) if isinstance(bias, Tensor) else weight

    def fit(self, gram: Tensor, cross: Tensor, before: float, square: float, damping: float) -> Repaired:
        """Solve the normal equations for the change of the remaining weights, and apply it."""
        ridge = damping * float(gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram)).to(gram))
        if int(failed) or not bool(gram.isfinite().all()):
            raise LmcompressError(
                f"inputs of {self.part} in block {self.block} must not be linearly dependent or infinite "
                f"where damping is only {damping}; raise damping, or use more calibration data"
            )
        change = torch.cholesky_solve(cross, factor)
        after = before - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())
        columns = int(self.kept.sum())
        self.change(change[:columns], change[columns] if len(change) > columns else None)
        return self.report(before, after, square)

    @torch.no_grad()
    def change(self, columns: Tensor, bias: Tensor | None) -> None:
        """Add to the remaining columns (None leaves them) and to the bias; zero the pruned ones."""
        weight = weight_view(self.module)
        kept = self.kept.to(weight.device)
        changed = _exact(weight)
        if len(columns):
            changed[:, kept] += columns.T
        changed[:, ~kept] = 0
        weight.copy_(changed)
        if bias is not None:
            parameter = self.module.get_parameter("bias")
            parameter.copy_(_exact(parameter) + bias)

    def report(self, before: float, after: float, square: float) -> Repaired:
        scale = square if square > 0 else 1.0
        # rounding can make it slightly negative
        return Repaired(self.block, self.part, max(0.0, before) / scale, max(0.0, after) / scale)


class _InOrder:
    """Sums over batches for one sub-layer: pruned inputs against dense outputs."""

    def __init__(self, layer: _SubLayer, taps: Taps, dense_taps: Taps) -> None:
        self.layer, self._taps, self._dense_taps = layer, taps, dense_taps
        self.weight = layer.extended_weight()
        self.gram = self.cross = torch.zeros(0)
        self.before = self.square = 0.0
        self._target = torch.zeros(0)

    def targets(self, outputs: Tensor) -> None:
        self._target = _exact(self._dense_taps.tokens(outputs))

    def inputs(self, x: Tensor) -> None:
        rows = self.layer.with_ones(_exact(self._taps.tokens(x)))
        kept = self.layer.with_bias_kept().to(rows.device)
        rows = rows[:, kept]
        missing = self._target - rows @ self.weight[kept]
        gram, cross = rows.T @ rows, rows.T @ missing
        self.gram = self.gram + gram if len(self.gram) else gram
        self.cross = self.cross + cross if len(self.cross) else cross
        self.before += float(missing.square().sum())
        bias = self.weight[self.layer.width :].sum(dim=0)
        self.square += float((self._target - bias).square().sum())


def _sub_layers(model: PreTrainedModel, mask: Units) -> list[_SubLayer]:
    """The remaining output projections that have inputs, in the order in which the model runs them."""
    anatomy = anatomy_of(model)
    check_units(mask, unit_shapes(structure_of(model), anatomy.hidden_size), "a mask")
    for part, _, tensor in mask.items():
        if tensor.dtype != torch.bool:
            raise LmcompressError(
                f"a mask must be bool, got {tensor.dtype} for {part}; compare scores with a threshold"
            )
    found: list[_SubLayer] = []
    for index, block in enumerate(anatomy.blocks):
        if mask.layers is not None and not mask.layers[index]:
            continue
        heads = torch.ones(block.num_heads, dtype=torch.bool) if mask.heads is None else mask.heads[index].cpu()
        neurons = torch.ones(block.ffn_width, dtype=torch.bool) if mask.neurons is None else mask.neurons[index].cpu()
        kinds: list[tuple[Part, str, Tensor | None, Tensor]] = [
            ("heads", "attention_out", mask.attention, heads.repeat_interleave(block.head_width)),
            ("neurons", "ffn_out", mask.ffn, neurons),
        ]
        for part, name, whole, kept in kinds:
            if len(kept) and (whole is None or bool(whole[index])):
                found.append(_SubLayer(index, part, name, block.get(name), kept))
    return found


def _losing(model: PreTrainedModel, mask: Units) -> list[_SubLayer]:
    losing = [layer for layer in _sub_layers(model, mask) if not bool(layer.kept.all())]
    if not losing:
        raise LmcompressError(
            "a mask must prune some heads or neurons of a remaining sub-layer, got none: there is nothing to repair"
        )
    return losing


def _check_damping(damping: float) -> None:
    if not damping > 0:
        raise LmcompressError(f"damping must be > 0, got {damping}; 1e-4 is usual")


def _exact(tensor: Tensor) -> Tensor:
    """A copy in float64, on the CPU if the device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
