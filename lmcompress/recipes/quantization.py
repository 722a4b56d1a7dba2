"""What a stage's quantization needs beside the trainer: checks before training, sizes to expect, words for a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lmcompress.families import weight_view
from lmcompress.families.weights import modules_by_path
from lmcompress.numerics.packing import container_for, packed_bytes
from lmcompress.quantization.checks import check_trainable
from lmcompress.quantization.config import QuantizationConfig
from lmcompress.quantization.planning import Plan, plan
from lmcompress.quantization.ptq import Method, check_post_training
from lmcompress.recipes.schema import StageQuantization

NO_VANILLA = "its weights are packed codes, which stock Transformers has no modules for"
"""Why no quantized model loads without lmcompress."""


@dataclass(frozen=True)
class QuantizationPlan:
    """What a stage's quantization will do.

    Attributes:
        config: of the method.
        method: how it is rounded without training, or None where the stage trains.
        plan: which matrix gets what.
        bytes_estimate: of all weights, those that stay dense in float32.
    """

    config: QuantizationConfig
    method: Method | None
    plan: Plan
    bytes_estimate: int


def plan_quantization(
    spec: StageQuantization, model: PreTrainedModel, seed: int, *, trains: bool, prunes: bool
) -> QuantizationPlan:
    """Check a stage's quantization against the model it is for.

    Args:
        spec: of the stage.
        model: in the shapes that it will have, on any device; not changed.
        seed: of the recipe.
        trains: whether the stage takes steps.
        prunes: whether it prunes too.

    Returns:
        The plan.

    Raises:
        LmcompressError: nothing to quantize, a rule that names nothing, quantizers that need training or have not these
            bits, or what cannot be done while the model is cut.
    """
    config = spec.config(seed, trains=trains)
    planned = plan(model, config)
    method: Method | None = None if trains else spec.method or "rtn"
    if method is None:
        check_trainable(planned, config, cut_later=prunes)
    else:
        check_post_training(model, planned, method)
    return QuantizationPlan(config, method, planned, _bytes(model, planned))


def quantization_notes(name: str, report: Mapping[str, Any] | None) -> list[str]:
    """What a reader of a table must know of how one of its models was quantized.

    Args:
        name: of the model.
        report: what quantization did, as JSON types; None if it did nothing.
    """
    if report is None:
        return []
    bits, count = report["bits_per_weight"], len(report["matrices"])
    inputs = {row["inputs"] for row in report["matrices"]} - {None}
    products = f", inputs of products {'/'.join(map(str, sorted(inputs)))} bits" if inputs else ", inputs not quantized"
    return [f"{name}: {count} matrices in {bits:.2f} bits a weight, scales included ({report['method']}){products}"]


def _bytes(model: PreTrainedModel, planned: Plan) -> int:
    modules = modules_by_path(model)
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    for one in planned.matrices:
        shape = tuple(weight_view(modules[one.path]).shape)
        found = one.weights.model_copy(update={"granularity": "tensor"}).rounded(torch.tensor([[1.0, -1.0]]))
        scales = torch.Size(one.weights.grouping().scale_shape(shape)).numel()
        per_scale = 4 if found.zero_points is None else 5
        total += packed_bytes(shape, container_for(found.grid)) + per_scale * scales - 4 * shape[0] * shape[1]
    return total
