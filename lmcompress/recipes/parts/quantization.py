"""Quantization in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import weight_count
from lmcompress.errors import argument
from lmcompress.families import weight_view
from lmcompress.families.weights import modules_by_path
from lmcompress.numerics.packing import container_for, packed_bytes
from lmcompress.quantization.checks import check_trainable
from lmcompress.quantization.config import QuantizationConfig, WeightScheme
from lmcompress.quantization.method import Quantization
from lmcompress.quantization.planning import Plan, plan
from lmcompress.quantization.ptq import POST_TRAINING, check_post_training, quantize
from lmcompress.quantization.ptq import Method as PostTraining
from lmcompress.quantization.report import QuantizationReport
from lmcompress.recipes.materials import drawn_batches
from lmcompress.recipes.parts.base import Planning, Running, StagePart

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage

NO_VANILLA = "its weights are packed codes, which stock Transformers has no modules for"
"""Why no quantized model loads without lmcompress."""


class StageQuantization(QuantizationConfig):
    """The quantization of the stage's weights and activations: during training, or after it."""

    method: Annotated[
        PostTraining | None,
        Field(
            description="For stages with max_steps: 0: rtn rounds to nearest, gptq compensates rounding errors, awq "
            "scales important inputs; default: rtn. Stages that train learn instead."
        ),
    ] = None

    def config(self, seed: int, *, trains: bool) -> QuantizationConfig:
        """The configuration of the method, without fields that only recipes have.

        Args:
            seed: the recipe's, unless the stage has its own.
            trains: whether the stage takes steps; if not, omitted fields get defaults that need no training.
        """
        own = {name: getattr(self, name) for name in QuantizationConfig.model_fields if name in self.model_fields_set}
        if trains:
            return QuantizationConfig(**{"seed": seed} | own)
        given = {name: getattr(POST_TRAINING, name) for name in ("weights", "embeddings", "attention")}
        for name in ("weights", "embeddings"):
            scheme, default = own.get(name), given[name]
            if isinstance(scheme, WeightScheme) and default is not None:
                own[name] = WeightScheme(**default.model_dump() | scheme.model_dump(exclude_unset=True))
        return QuantizationConfig(**{"seed": seed} | given | own)


@dataclass(frozen=True)
class QuantizationPlan:
    """The result of a stage's quantization, as planned.

    Attributes:
        config: configuration of the method.
        method: rounding method without training, or None if the stage trains.
        plan: quantization of each matrix.
        bytes_estimate: bytes of all weights, dense ones in float32.
    """

    config: QuantizationConfig
    method: PostTraining | None
    plan: Plan
    bytes_estimate: int


class QuantizationPart(StagePart[StageQuantization]):
    """Weights and activations are quantized, during training or without it."""

    key = "quantization"
    schema = Annotated[
        StageQuantization | None,
        Field(
            description="Quantization of weights and activations, during training or, with "
            "max_steps: 0, without; what is pruned in the same stage is cut first."
        ),
    ]
    applied = "quantization"
    role = "quantized"
    verb = "packed"
    shrinks = True
    codes = True

    def check(self, stage: Stage, spec: StageQuantization) -> None:
        if stage.trains and spec.method is not None:
            raise ValueError(
                f"quantization.method {spec.method} is for stages without training; set max_steps: 0, or "
                "leave it out: while a stage trains, its weights learn to be codes"
            )
        if stage.save == "vanilla":
            raise ValueError(
                f"{argument('save', 'vanilla')} is not possible with quantization: stock Transformers has no modules "
                "for packed weights; save it as native, or as self_loading, whose loader unpacks them"
            )
        quantizes_attention = spec.config(0, trains=stage.trains).attention_scheme() is not None
        if stage.save == "self_loading" and quantizes_attention:
            raise ValueError(
                f"{argument('save', 'self_loading')} is not possible with quantized attention, which its loader does "
                "not know; leave attention out of the quantization, or save it as native"
            )
        if stage.trains and stage.pruning is not None and stage.pruning.schedule.kind == "hard_concrete":
            raise ValueError(
                "the schedule hard_concrete multiplies weights by gates in the end, after which they are codes no "
                "longer: prune in an earlier stage than the one that quantizes, or choose another schedule"
            )

    def plan(self, spec: StageQuantization, work: Planning) -> QuantizationPlan:
        config = spec.config(work.recipe.seed, trains=work.stage.trains)
        planned = plan(work.model, config)
        method: PostTraining | None = None if work.stage.trains else spec.method or "rtn"
        if method is None:
            check_trainable(planned, config, cut_later="pruning" in work.plans)
        else:
            check_post_training(work.model, planned, method)
        work.obstacle, work.bytes_estimate = NO_VANILLA, _bytes(work.model, planned)
        return QuantizationPlan(config, method, planned, work.bytes_estimate)

    def words(self, planned: QuantizationPlan) -> list[str]:
        matrices, inputs = planned.plan.matrices, planned.config.activations
        bits = [
            "/".join(dict.fromkeys(str(one.weights.bits) for one in matrices if (one.part == "embeddings") == embedded))
            for embedded in (False, True)
        ]
        how = "in training" if planned.method is None else planned.method
        return [
            f"quantizes weights {bits[0] or 'dense'}, embeddings {bits[1] or 'dense'}, activations "
            f"{'float' if inputs is None else inputs.bits} ({how}): {len(matrices)} matrices"
        ]

    def method(self, spec: StageQuantization, work: Running) -> Quantization:
        return Quantization(work.plans[self.key].config)

    def apply(self, spec: StageQuantization, work: Running) -> QuantizationReport:
        planned: QuantizationPlan = work.plans[self.key]
        work.to_gpu()
        config = planned.config
        batches = drawn_batches(work.materials, config.calibration_rows, config.calibration_batch_size, config.seed)
        return quantize(work.model, config, batches, method=planned.method or "rtn", progress=False)

    def notes(self, report: Mapping[str, Any]) -> list[str]:
        bits, count = report["bits_per_weight"], len(report["matrices"])
        inputs = sorted(map(str, {row["inputs"] for row in report["matrices"]} - {None}))
        of_inputs = f"inputs of matmuls {'/'.join(inputs)} bits" if inputs else "inputs not quantized"
        return [f"{count} matrices in {bits:.2f} bits a weight, scales included ({report['method']}), {of_inputs}"]

    def columns(self, report: Mapping[str, Any]) -> dict[str, str]:
        return {"bits a weight": f"{report['bits_per_weight']:.2f}"}


def _bytes(model: PreTrainedModel, planned: Plan) -> int:
    modules = modules_by_path(model)
    total = 4 * weight_count(model)
    for one in planned.matrices:
        shape = tuple(weight_view(modules[one.path]).shape)
        found = one.weights.model_copy(update={"granularity": "tensor"}).rounded(torch.tensor([[1.0, -1.0]]))
        scales = torch.Size(one.weights.grouping().scale_shape(shape)).numel()
        per_scale = 4 if found.zero_points is None else 5
        total += packed_bytes(shape, container_for(found.grid)) + per_scale * scales - 4 * shape[0] * shape[1]
    return total
