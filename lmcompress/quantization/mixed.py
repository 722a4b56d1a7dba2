"""Mixed precision: the effect of quantizing each matrix alone at each bit-width, and bit-widths that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch
from lmcompress.activations.hooks import valid_outputs
from lmcompress.activations.running import evaluating, with_progress
from lmcompress.activations.walking import calibration_batches
from lmcompress.errors import LmcompressError
from lmcompress.families import weight_view
from lmcompress.families.weights import EMBEDDINGS, modules_by_path
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.packing import stored_bytes
from lmcompress.numerics.quantizers.registry import quantizer_for
from lmcompress.quantization.config import QuantizationConfig, Rule
from lmcompress.quantization.fake import FakeQuantized, FakeWeight
from lmcompress.quantization.planning import Planned, plan
from lmcompress.quantization.ptq.quantize import POST_TRAINING

Evaluate = Callable[[PreTrainedModel], float]
"""From a model to one number, lower is better, such as a loss."""


@dataclass(frozen=True)
class BitsRow:
    """One measurement.

    Attributes:
        path: path of the one quantized matrix.
        part: the family's name of it.
        bits: its bit-width.
        harm: its effect on the model: increase of ``evaluate`` over the dense model, or by default
            the mean distance of its outputs from the dense model's.
        size_bytes: bytes of the matrix, packed.
        weights: number of its weights.
    """

    path: str
    part: str
    bits: Bits
    harm: float
    size_bytes: int
    weights: int

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


def bits_sensitivity(
    model: PreTrainedModel,
    config: QuantizationConfig = POST_TRAINING,
    batches: Iterable[Batch] | None = None,
    *,
    bits: Sequence[Bits] = (2, 3, 4, 8),
    evaluate: Evaluate | None = None,
    progress: bool = False,
) -> list[BitsRow]:
    """Quantize one matrix at a time, to each bit-width, round to nearest, and measure the effect on the model.

    Activations are not quantized. The model is restored.

    Args:
        model: a model of a known family, dense.
        config: determines matrices, quantizer and granularity; its bits are ignored.
        batches: for the default measure: the divergence KL(dense ‖ quantized) of the outputs' classes or tokens, mean
            over tokens that are not padding; for a model without logits, or with only one, the squared error over the
            squared norm.
        bits: bit-widths to try.
        evaluate: called with the model once for each row, and once for the dense model; ``batches`` are then
            ignored.
        progress: whether to show a bar, on a terminal.

    Returns:
        A row for each matrix and width, in the order of the model.

    Raises:
        LmcompressError: If neither batches nor ``evaluate`` nor bit-widths are given, a quantizer does not support a
            bit-width, or :func:`~lmcompress.quantization.planning.plan` refuses the config.

    Reference:
        Dong, Yao, Gholami, Mahoney & Keutzer, *HAWQ: Hessian AWare Quantization of Neural Networks with
        Mixed-Precision*, ICCV 2019, https://arxiv.org/abs/1905.03696, who estimate from second derivatives what is
        measured here; Wu, Wang, Zhang, Tian, Vajda & Keutzer, *Mixed Precision Quantization of ConvNets via
        Differentiable Neural Architecture Search*, 2018, https://arxiv.org/abs/1812.00090, for the problem.
    """
    if not bits:
        raise LmcompressError("bits must name at least one width, got none")
    if evaluate is None and batches is None:
        raise LmcompressError("sensitivity needs batches or evaluate as a measure, got neither")
    data = [] if evaluate is not None or batches is None else calibration_batches(model, batches)
    planned = plan(model, config)
    for matrix in planned.matrices:
        for width in bits:
            quantizer_for(matrix.weights.quantizer, width)
    modules = modules_by_path(model)
    rows = []
    with FakeQuantized(model, planned, with_states=False) as fake, evaluating(model):
        fake.set_enabled(False)
        start = 0.0 if evaluate is None else float(evaluate(model))
        for matrix in with_progress(planned.matrices, "sensitivity", enabled=progress):
            own = fake.weights[matrix.path]
            weight = weight_view(modules[matrix.path])
            for width in bits:
                quantized = matrix.weights.model_copy(update={"bits": width}).rounded(weight)
                own.freeze(quantized)
                own.enabled = True
                harm = _divergence(model, own, data) if evaluate is None else float(evaluate(model)) - start
                own.enabled = False
                own.freeze(None)
                rows.append(
                    BitsRow(matrix.path, matrix.part, width, harm, stored_bytes(quantized), quantized.values.numel())
                )
    return rows


def choose_bits(
    harms: Mapping[str, Mapping[Bits, float]], sizes: Mapping[str, Mapping[Bits, int]], budget_bytes: int
) -> dict[str, Bits]:
    r"""A bit-width for each matrix: the lowest sum of harms whose sizes fit the budget.

    .. math:: \min_b \sum_i h_i(b_i) \quad \text{with} \quad \sum_i s_i(b_i) \le B

    Harms are assumed to be additive, each as measured alone. The optimum is found exactly, by integer programming;
    among equally harmless choices, a small one.

    Args:
        harms: by name, then by width.
        sizes: the same names and widths, in bytes.
        budget_bytes: B.

    Returns:
        A bit-width for each name.

    Raises:
        LmcompressError: If there are no names, names or bit-widths differ, a harm is not finite, or even the smallest
            bit-widths exceed the budget.

    Example:
        >>> harms = {"a": {2: 9.0, 8: 0.0}, "b": {2: 1.0, 8: 0.0}}
        >>> choose_bits(harms, {"a": {2: 2, 8: 8}, "b": {2: 2, 8: 8}}, 10)
        {'a': 8, 'b': 2}
    """
    if not harms or {k: set(v) for k, v in harms.items()} != {k: set(v) for k, v in sizes.items()}:
        raise LmcompressError(
            f"harms and sizes must be of the same matrices and widths, at least one, got {len(harms)} and {len(sizes)}"
        )
    choices = [(name, width) for name, widths in harms.items() for width in widths]
    harm = np.array([harms[name][width] for name, width in choices], dtype=float)
    size = np.array([sizes[name][width] for name, width in choices], dtype=float)
    if not np.isfinite(harm).all():
        name, width = choices[int(np.flatnonzero(~np.isfinite(harm))[0])]
        raise LmcompressError(f"harms must be finite, got {harms[name][width]} for {name} at {width} bits")
    least = sum(min(widths.values()) for widths in sizes.values())
    if least > budget_bytes:
        raise LmcompressError(
            f"the budget must hold the smallest widths, {least} bytes, got {budget_bytes}; allow more bytes, or fewer "
            "bits"
        )
    one_each = np.array([[float(name == other) for other, _ in choices] for name in harms])
    # scales of harms and bytes differ widely; the weight of bytes is tiny, and only matters between equal harms
    spread = max(float(np.ptp(harm)), np.finfo(float).tiny)
    found = milp(
        (harm - harm.min()) / spread + 1e-9 * size / size.sum(),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget_bytes, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise LmcompressError(f"no choice of widths was found within {budget_bytes} bytes: {found.message}")
    return {name: width for (name, width), taken in zip(choices, found.x, strict=True) if taken > 0.5}


def mixed_precision(
    model: PreTrainedModel,
    config: QuantizationConfig,
    rows: Sequence[BitsRow],
    *,
    bits_per_weight: float | None = None,
    budget_bytes: int | None = None,
) -> QuantizationConfig:
    """The config with a rule for each matrix, whose bit-width is chosen by measured harm under a budget.

    Args:
        model: the model that was measured.
        config: the config it was measured with.
        rows: from :func:`bits_sensitivity`.
        bits_per_weight: the budget as a mean over the quantized matrices, scales included; or
        budget_bytes: the budget as bytes of the quantized matrices, scales included. One of the two.

    Returns:
        A config for :func:`~lmcompress.quantization.quantize`, or for training.

    Raises:
        LmcompressError: If there is no budget or two, rows are of other matrices, or :func:`choose_bits` finds no
            choice.
    """
    if (bits_per_weight is None) == (budget_bytes is None):
        raise LmcompressError(
            f"one of bits_per_weight and budget_bytes must be given, got {bits_per_weight} and {budget_bytes}"
        )
    planned = plan(model, config)
    paths = {matrix.path for matrix in planned.matrices}
    if paths != {row.path for row in rows}:
        raise LmcompressError(
            f"rows must be of the matrices that this config quantizes, {len(paths)}, got {len({r.path for r in rows})} "
            "others; measure with the same model and config"
        )
    harms: dict[str, dict[Bits, float]] = {}
    sizes: dict[str, dict[Bits, int]] = {}
    weights = {row.path: row.weights for row in rows}
    for row in rows:
        harms.setdefault(row.path, {})[row.bits] = row.harm
        sizes.setdefault(row.path, {})[row.bits] = row.size_bytes
    if bits_per_weight is not None:
        budget_bytes = int(bits_per_weight * sum(weights.values()) / 8)
    assert budget_bytes is not None
    chosen = choose_bits(harms, sizes, budget_bytes)
    rules = tuple(_rule(matrix, chosen[matrix.path]) for matrix in planned.matrices)
    return QuantizationConfig(**{**dict(config), "rules": (*config.rules, *rules)})


def _rule(matrix: Planned, bits: Bits) -> Rule:
    weights = matrix.weights.model_copy(update={"bits": bits})
    # the embeddings' matrix is read by a head, which has rules of its own
    activations = "default" if matrix.part == EMBEDDINGS else matrix.inputs
    return Rule(modules=matrix.path, weights=weights, activations=activations)


def _divergence(model: PreTrainedModel, own: FakeWeight, data: Sequence[Mapping[str, Tensor]]) -> float:
    """The distance of the outputs from the dense model's, which is run again each time: storing them takes memory."""
    total, count = 0.0, 0.0
    for batch in data:
        own.enabled = False
        dense, classes = _outputs(model, batch)
        own.enabled = True
        here, weight = _distance(dense, _outputs(model, batch)[0], classes)
        total, count = total + here, count + weight
    return total / count if count else 0.0


def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """Logits, or the last hidden state, of tokens that are not padding; and whether they are logits of classes."""
    answer = model(**batch)
    classes = "logits" in answer and answer["logits"].shape[-1] > 1
    first: Tensor = answer["logits"] if "logits" in answer else answer[0]
    mask = valid_outputs(model, batch)
    return first[mask] if first.dim() == 3 and first.shape[:2] == mask.shape else first, classes


def _distance(dense: Tensor, other: Tensor, classes: bool) -> tuple[float, float]:
    """A sum and its divisor."""
    if not classes:
        return float((other.double() - dense.double()).square().sum()), float(dense.double().square().sum())
    log_p, log_q = (F.log_softmax(logits.float(), dim=-1) for logits in (dense, other))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return float(divergence.double().sum()), float(divergence.numel())
