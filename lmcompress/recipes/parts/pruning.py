"""Structured pruning in recipes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from lmcompress.checkpoint.saving import outputs_of
from lmcompress.checkpoint.schema import Structure
from lmcompress.checkpoint.structure import recorded_structure, shape_skeleton
from lmcompress.data import TaskKind
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import FlopCost, ModelSizes
from lmcompress.pruning.structured.goals import feasible
from lmcompress.pruning.structured.latency import LatencyTable, measure_latency
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.stock import stock_verdict
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.targets import Target
from lmcompress.pruning.structured.units import Units
from lmcompress.recipes.fingerprints import digest
from lmcompress.recipes.materials import Materials, drawn_batches, gate_batches
from lmcompress.recipes.parts.base import Planning, Running, StagePart, needs_training
from lmcompress.recipes.specs import SchemaPart

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage

TABLE_FILE = "latency.json"
"""File of a run's measured times, if its recipe does not name one."""


class LatencySpec(SchemaPart):
    """The batch of a latency target, and the file of its table of measured times."""

    batch_size: Annotated[int, Field(ge=1, description="Batch size to measure latency at.")] = 32
    length: Annotated[
        int | None, Field(ge=1, description="Length of a row in tokens; default: the task's max_length, at most 128.")
    ] = None
    table: Annotated[
        str | None,
        Field(
            description="JSON file of measured times; default: latency.json in the run's folder. Missing entries "
            "are measured before training and added to it."
        ),
    ] = None


class StagePruning(PruningConfig):
    """The parts that the stage prunes, the target, and the schedule."""

    latency: Annotated[LatencySpec | None, Field(description="For targets latency_share and latency_ms.")] = None

    @model_validator(mode="after")
    def _latency_of_a_latency_target(self) -> StagePruning:
        if self.latency is not None and not self.target.kind.startswith("latency"):
            raise ValueError(f"latency is for targets latency_share and latency_ms, got target: {self.target.kind}")
        return self

    def config(self, seed: int) -> PruningConfig:
        """The configuration of the method, without fields that only recipes have.

        Args:
            seed: the recipe's, unless the stage has its own.
        """
        own = {name: getattr(self, name) for name in PruningConfig.model_fields if name in self.model_fields_set}
        return PruningConfig(**{"seed": seed} | own)


@dataclass(frozen=True)
class PruningPlan:
    """The result of a stage's pruning, as far as it is known before there are scores.

    Attributes:
        config: configuration of the method.
        before: shapes of the unpruned model.
        expected: shapes that meet the target; the distribution over blocks depends on scores, unless the target is a
            shape. None if a latency target has no table yet.
        exact: whether the result will have exactly these shapes.
        obstacle: why stock Transformers will not load the result, or None.
        cost: the latency table of a latency target.
        note: what could not be checked, or None.
    """

    config: PruningConfig
    before: Structure
    expected: Structure | None
    exact: bool
    obstacle: str | None
    cost: LatencyTable | None
    note: str | None


class PruningPart(StagePart[StagePruning]):
    """Heads, neurons, layers or hidden dimensions are pruned, during training or without it."""

    key = "pruning"
    schema = Annotated[
        StagePruning | None,
        Field(description="Structured pruning of the model, during training or, with max_steps: 0, without."),
    ]
    applied = "structured pruning"
    role = "pruned"
    verb = "masked, cut"
    shrinks = True

    def check(self, stage: Stage, spec: StagePruning) -> None:
        needs_training(stage, spec)

    def plan(self, spec: StagePruning, work: Planning) -> PruningPlan:
        planned = plan_pruning(spec, work.model, work.materials, work.steps, folder=work.folder, measure=work.measure)
        work.obstacle, work.exact = planned.obstacle, planned.exact
        if planned.expected is not None:
            work.model = expected_model(work.model, planned.expected)
        return planned

    def contents(self, spec: StagePruning, planned: PruningPlan) -> dict[str, str | None]:
        return {} if planned.cost is None else {"the latency table": digest(planned.cost.model_dump(mode="json"))}

    def words(self, planned: PruningPlan) -> list[str]:
        return [f"prunes {pruning_in_words(planned.config)}", *([] if planned.note is None else [planned.note])]

    def method(self, spec: StagePruning, work: Running) -> StructuredPruning:
        planned: PruningPlan = work.plans[self.key]
        return StructuredPruning(planned.config, cost=planned.cost)

    def apply(self, spec: StagePruning, work: Running) -> PruningReport:
        planned: PruningPlan = work.plans[self.key]
        work.to_gpu()
        return prune(
            work.model,
            planned.config,
            calibration_batches(work.materials, planned.config),
            cost=planned.cost,
            before_cut=lambda gated: work.masked.extend(outputs_of(gated, gate_batches(work.materials))),
        )

    def notes(self, report: Mapping[str, Any]) -> list[str]:
        gone = f"{report['removed']:.1%} of {report['unit']} pruned, {report['asked']:.1%} requested"
        stock = (
            "loads with stock transformers"
            if report["stock"]["loads"]
            else f"needs lmcompress: {report['stock']['reason']}"
        )
        blocks = enumerate(report["after"]["blocks"])
        empty = [index for index, block in blocks if not block["heads"] or not block["ffn"]]
        without = f"; blocks {', '.join(map(str, empty))} have no heads or no neurons left" if empty else ""
        return [f"{gone}{without}; {stock}"]


def plan_pruning(
    spec: StagePruning,
    model: PreTrainedModel,
    materials: Materials,
    steps: int,
    *,
    folder: Path,
    measure: bool,
) -> PruningPlan:
    """Check a stage's pruning against its model.

    Args:
        spec: the stage's field of this part.
        model: the model that it starts from, on any device; not modified.
        materials: rows and task.
        steps: optimizer steps of the stage; 0 for pruning without training.
        folder: folder of the run, for its latency table.
        measure: whether to measure a missing latency table, which may take minutes.

    Returns:
        The plan.

    Raises:
        LmcompressError: If no shape meets the target, there are too few steps for the schedule, the criterion needs
            labels and there are none, or a latency table cannot be measured on this model.
    """
    config = spec.config(materials.recipe.seed)
    if steps:
        config.schedule.events(steps)
    _check_labels(config, materials)
    sizes = ModelSizes.of(model)
    if not config.target.kind.startswith("latency"):
        return _planned(config, model, sizes, feasible(config, sizes), None, None)
    latency = spec.latency or LatencySpec()
    length = latency.length or min(128, materials.recipe.task.max_length)
    file = Path(latency.table) if latency.table else folder / TABLE_FILE
    table = _table(model, file, latency.batch_size, length, measure)
    if table is not None:
        return _planned(config, model, sizes, feasible(config, sizes, table), table, None)
    note = (
        f"no latency table for batch {latency.batch_size} × {length} in {file}: it is measured when the run begins, "
        "before training, and whether the target can be met is known then"
    )
    return _planned(config, model, sizes, _by_operations(config, sizes, latency, length), None, note)


def expected_model(model: PreTrainedModel, expected: Structure) -> PreTrainedModel:
    """A copy of a model in the shapes expected after pruning, for stages that start from it.

    Args:
        model: on any device; not modified.
        expected: shapes that the model can be cut to.
    """
    before = recorded_structure(model)
    sources = [index if block.source is None else block.source for index, block in enumerate(before.blocks)]
    kept = [index if block.source is None else block.source for index, block in enumerate(expected.blocks)]
    # where no block is dropped, both count alike
    after = dict(zip(kept if len(kept) < len(sources) else sources, expected.blocks, strict=True))
    pairs = [(block, after.get(source, block)) for source, block in zip(sources, before.blocks, strict=True)]
    hidden = anatomy_of(model).hidden_size
    mask = Units(
        heads=tuple(torch.arange(block.heads) < new.heads for block, new in pairs),
        neurons=tuple(torch.arange(block.ffn) < new.ffn for block, new in pairs),
        layers=torch.tensor([source in after for source in sources]),
        hidden=torch.arange(hidden) < (expected.hidden or hidden),
    )
    result = copy.deepcopy(model)
    cut(result, mask)
    return result


def calibration_batches(materials: Materials, config: PruningConfig) -> list[Any]:
    """Training rows for scores and repair, sampled in the same way as by the trainer.

    Args:
        materials: materials of the stage.
        config: determines number, batch size and seed.

    Returns:
        Batches on the CPU; none if no data are needed.
    """
    if not config.needs_data:
        return []
    return drawn_batches(materials, config.calibration_rows, config.calibration_batch_size, config.seed)


def pruning_in_words(config: Any) -> str:
    """A pruning configuration, in a line.

    Args:
        config: :class:`~lmcompress.pruning.structured.config.PruningConfig`.

    Example:
        >>> from lmcompress.pruning.structured.config import PruningConfig
        >>> pruning_in_words(PruningConfig(target={"sparsity": 0.5}))
        'heads and neurons to sparsity 0.5, one_shot by fisher, ranking global'
    """
    target = config.target.model_dump(exclude_none=True)[config.target.kind]
    amount = ", ".join(f"{key} {value}" for key, value in target.items()) if isinstance(target, dict) else target
    own_scores = config.schedule.kind in ("iht", "hard_concrete", "movement", "group_lasso")
    by = "" if own_scores else f" by {config.criterion_name}"
    repair = "" if config.repair == "none" else f", repair {config.repair}"
    parts = " and ".join(filter(None, [", ".join(config.parts[:-1]), config.parts[-1]]))
    alike = ", uniform" if config.uniform else ""
    way = f"{config.schedule.kind}{by}, ranking {config.ranking}"
    return f"{parts} to {config.target.kind} {amount}, {way}{alike}{repair}"


def _planned(
    config: PruningConfig,
    model: PreTrainedModel,
    sizes: ModelSizes,
    expected: Structure | None,
    cost: LatencyTable | None,
    note: str | None,
) -> PruningPlan:
    before = recorded_structure(model)
    # scores decide unless the target is a shape; and a shape may be met by other layers
    exact = config.target.shape is not None
    shapes = expected or sizes.structure
    return PruningPlan(
        config=config,
        before=before,
        expected=expected,
        exact=exact,
        obstacle=_obstacle(config, shapes, model),
        cost=cost,
        note=note,
    )


def _obstacle(config: PruningConfig, expected: Structure, model: PreTrainedModel) -> str | None:
    reason = stock_verdict(expected, model.config).reason
    if config.target.shape is not None or config.uniform:
        return reason
    # counts of single blocks are not known yet: they depend on the parts and the ranking
    parts = set(config.parts)
    even = config.ranking == "per_layer" and config.order == "score"
    if parts & {"heads", "attention"}:
        return (
            "pruned attention has no stock config: every block needs all heads there. Prune neurons and layers only to "
            "stay within one"
        )
    if "ffn" in parts or ("neurons" in parts and not even):
        return (
            f"with ranking: {config.ranking} the FFN widths will differ from block to block. ranking: per_layer, or a "
            "target that is a shape, keeps them even"
        )
    if config.schedule.kind == "group_lasso" and config.multiple_of == 1:
        return "group lasso also cuts what is exactly zero, so that FFN widths will differ from block to block"
    if "hidden" in parts:
        return (
            "the hidden size must stay a multiple of the size of a head, with all heads. Give the target as a shape "
            "with hidden and heads to stay within a stock config"
        )
    return reason


def _check_labels(config: PruningConfig, materials: Materials) -> None:
    if not config.needs_labels or materials.task.kind is TaskKind.CAUSAL_LM:
        return
    column = materials.task.label_column
    if column not in materials.data.train.column_names:
        raise LmcompressError(
            f"the criterion {config.criterion_name} needs labels, and the training rows of {materials.task.name} have "
            "none; set labels: self, or choose a criterion without gradients (l1, wanda, activation_entropy)"
        )


def _table(model: PreTrainedModel, file: Path, batch_size: int, length: int, measure: bool) -> LatencyTable | None:
    on_gpu = torch.cuda.is_available()
    # times are looked up by device; without a GPU a model on meta is as good as one with weights
    timed = _with_random_weights(model, "cuda") if on_gpu else model
    found = LatencyTable.find(file, timed, batch_size=batch_size, length=length)
    if found is not None or not measure:
        return found
    table = measure_latency(
        timed if on_gpu else _with_random_weights(model, "cpu"), batch_size=batch_size, length=length
    )
    table.save(file)
    return table


def _with_random_weights(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A model of the same shapes: only its speed matters, not its output."""
    with torch.device(device):
        fresh = type(model)(copy.deepcopy(model.config)).eval()
        shape_skeleton(fresh, recorded_structure(model))
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.dim() > 1:
                # reshaped parameters have no values yet, and denormal ones would be slow
                parameter.normal_(0.0, 0.02)
    return fresh


def _by_operations(config: PruningConfig, sizes: ModelSizes, latency: LatencySpec, length: int) -> Structure | None:
    """An estimate for a share of the latency: the same share of the FLOPs."""
    share = config.target.latency_share
    if share is None:
        return None
    guess = config.model_copy(update={"target": Target(flops_share=share)})
    try:
        return feasible(guess, sizes, FlopCost(sizes, latency.batch_size, length))
    except LmcompressError:
        # FLOPs are not time: the table decides
        return None
