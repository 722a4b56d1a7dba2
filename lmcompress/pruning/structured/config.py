"""The configuration of structured pruning as validated data, shared by recipes and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcompress.pruning.structured.order import Order, Ranking
from lmcompress.pruning.structured.registry import CRITERIA, Criterion, criteria_for
from lmcompress.pruning.structured.targets import Target
from lmcompress.pruning.structured.units import Part
from lmcompress.registry import PartField
from lmcompress.schedules import Event, Gradual, HardThresholding, Iterative, OneShot, Phase

Repair = Literal["none", "bias", "least_squares", "least_squares_in_order"]
DEFAULT_CRITERION = "fisher"
"""The default criterion: it kept the highest quality at every sparsity in ``benchmarks/pruning.py``."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Learned(Phase):
    """A phase in which masks are learned while the target rises."""

    kind: str
    end: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which the mask is final; the rest is recovery.")
    ] = 0.7
    warmup: Annotated[
        float, Field(ge=0, le=1, description="Share of the phase over which the target rises linearly from 0.")
    ] = 0.5

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            One event, the final one.

        Raises:
            LmcompressError: If the phase has no step.
        """
        _, end = self.steps(max_steps, f"the schedule {self.kind}")
        return [Event(end, 1.0, final=True)]


class HardConcrete(Learned):
    """Hard-concrete L0 gates, driven to the target by a Lagrangian (CoFi)."""

    kind: Literal["hard_concrete"] = "hard_concrete"
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of the gates; constant.")] = 0.05
    multiplier_learning_rate: Annotated[
        float, Field(gt=0, description="Learning rate of the Lagrange multipliers, which ascend; constant.")
    ] = 0.05
    drop: Annotated[float, Field(ge=0, lt=1, description="Share of gates that are closed initially.")] = 0.05


class Movement(Learned):
    """Scores learned by movement, with a sigmoid threshold and straight-through gradients (nn_pruning)."""

    kind: Literal["movement"] = "movement"
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of the scores; constant.")] = 0.02
    threshold: Annotated[
        float, Field(gt=0, lt=0.5, description="Final threshold of the sigmoid of a score; rises from 0.")
    ] = 0.1
    penalty: Annotated[float, Field(gt=0, description="Initial weight of the mean sigmoid of the scores.")] = 1.0
    steer: Annotated[bool, Field(description="Whether to adjust the penalty so the mask follows the target.")] = True


class GroupLasso(Learned):
    """A penalty on the norms of heads and neurons, with a proximal step after each optimizer step (SSL)."""

    kind: Literal["group_lasso"] = "group_lasso"
    penalty: Annotated[float, Field(gt=0, description="Initial strength, in units of the learning rate.")] = 1.0
    steer: Annotated[bool, Field(description="Whether to adjust the strength so that zeros follow the target.")] = True


Schedule = Annotated[
    OneShot | Iterative | Gradual | HardThresholding | HardConcrete | Movement | GroupLasso,
    Field(discriminator="kind"),
]


class PruningConfig(_Part):
    """The parts to prune, the target, the criterion and the schedule."""

    target: Target
    parts: Annotated[
        tuple[Part, ...],
        Field(min_length=1, description="Parts that may be pruned: heads, neurons, attention, ffn, layers, hidden."),
    ] = ("heads", "neurons")
    schedule: Schedule = OneShot()
    criterion: Annotated[
        Annotated[str | Criterion, PartField(CRITERIA)] | None,
        Field(
            description="Criterion that scores units: fisher (the default), taylor_gates, l1, random, …, or "
            "module:attribute of a custom Criterion; not with schedules that learn scores or have their own (iht)."
        ),
    ] = None
    scores: Annotated[
        Literal["calibration", "training"],
        Field(
            description="calibration: from extra forward passes over some rows at each pruning; training: from the "
            "gradients of training itself, at nearly no cost (taylor_gates, fisher, movement)."
        ),
    ] = "calibration"
    score_memory: Annotated[
        float,
        Field(gt=0, le=1, description="For scores: training: decay of the running scores at each step."),
    ] = 0.98
    labels: Annotated[
        Literal["given", "self"],
        Field(
            description="Labels for the gradients of calibration: given, or self, sampled from the model's predictions."
        ),
    ] = "given"
    calibration_rows: Annotated[
        int, Field(ge=1, description="Number of training rows for scores and repair, if no batches are given.")
    ] = 256
    calibration_batch_size: Annotated[int, Field(ge=1, description="Batch size of the calibration rows.")] = 32
    ranking: Annotated[
        Ranking,
        Field(
            description="Scope of the comparison: all units (global), those of a block (per_layer), those of one kind "
            "(isomorphic), or all units by score over the mean score of their kind in their block (relative)."
        ),
    ] = "global"
    order: Annotated[Order, Field(description="By score only, or one sub-layer at a time, the costliest first.")] = (
        "score"
    )
    multiple_of: Annotated[
        int,
        Field(
            ge=1,
            description="Group size of neurons and hidden dimensions: counts become multiples of it. round_to is "
            "another name of it.",
        ),
    ] = 1
    uniform: Annotated[
        bool,
        Field(
            description="Whether all blocks keep as many heads and neurons, each its own best ones, so that a stock "
            "config expresses the result (Transformers, vLLM, TGI)."
        ),
    ] = False
    keep_at_least: Annotated[
        dict[Part, Annotated[int, Field(ge=0)]],
        Field(description="Minimum number of units kept: heads and neurons of each block, others of the model."),
    ] = {}
    repair: Annotated[
        Repair,
        Field(
            description="After the last pruning, re-fit output projections in closed form (least_squares; or "
            "sequentially, on the inputs after pruning, least_squares_in_order), or add the mean contribution of "
            "removed units to their biases (bias)."
        ),
    ] = "none"
    seed: Annotated[
        int, Field(ge=0, lt=1 << 32, description="Seed of calibration rows, sampled labels and gate noise.")
    ] = 0

    @model_validator(mode="before")
    @classmethod
    def _round_to(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "round_to" not in values:
            return values
        if "multiple_of" in values:
            raise ValueError("round_to is another name of multiple_of, got both: leave one out")
        return {("multiple_of" if name == "round_to" else name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> PruningConfig:
        kind, units = self.schedule.kind, {"heads", "neurons"}
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts must be named once each, got {', '.join(self.parts)}")
        if self.own_scores:
            if self.criterion is not None:
                name = self.criterion_name
                raise ValueError(f"the schedule {kind} has its own scores: leave criterion out, got {name!r}")
            if self.scores == "training":
                raise ValueError(f"the schedule {kind} has its own scores: leave scores out, got 'training'")
        else:
            self._check_criterion()
        if self.repair != "none" and not units & set(self.parts):
            raise ValueError(
                f"repair re-fits what reads heads and neurons, got parts {', '.join(self.parts)}: leave repair out"
            )
        if self.repair != "none" and kind == "hard_concrete":
            raise ValueError(
                f"repair re-fits hard masks, the schedule hard_concrete has soft gates, got repair: {self.repair}; "
                "leave it out and let the phase end earlier for recovery"
            )
        if self.uniform:
            self._check_uniform()
        if kind in ("iht", "group_lasso") and set(self.parts) - units:
            raise ValueError(
                f"the schedule {kind} knows groups of weights of heads and neurons only, got parts "
                f"{', '.join(self.parts)}: choose hard_concrete or a criterion for the others"
            )
        return self

    def _check_uniform(self) -> None:
        if single := sorted({"attention", "ffn"} & set(self.parts)):
            raise ValueError(
                f"uniform blocks have both sub-layers, got parts with {' and '.join(single)}: leave them out; layers "
                "cuts whole blocks"
            )
        if self.order != "score":
            raise ValueError(f"uniform cuts all blocks at once, got order: {self.order}, which takes them in turn")

    def _check_criterion(self) -> None:
        criterion, name = self.chosen_criterion, self.criterion_name
        if wrong := set(self.parts) - set(criterion.parts):
            raise ValueError(
                f"the criterion {name} does not score {', '.join(sorted(wrong))}; criteria for all of "
                f"{', '.join(self.parts)} are {criteria_for(self.parts)}"
            )
        if criterion.signed and self.labels == "self":
            raise ValueError(
                f"the criterion {name} needs the labels that are given, got labels: self; use taylor_gates or fisher"
            )
        if criterion.signed and self.ranking == "relative":
            raise ValueError(
                f"ranking: relative compares scores with their mean, and those of {name} have both signs: use another "
                "ranking, or taylor_gates or fisher"
            )
        if self.scores == "training":
            if not criterion.sums_in_training:
                known = ", ".join(key for key, other in CRITERIA.items() if other.sums_in_training)
                raise ValueError(
                    f"scores: training needs a criterion of the gradients of gates, such as {known}, got {name!r}; use "
                    "scores: calibration"
                )
            if self.schedule.begin == 0 and self.schedule.kind != "gradual":
                raise ValueError(
                    "scores: training must see some steps before the first pruning, got begin: 0; set begin to 0.1"
                )

    @property
    def chosen_criterion(self) -> Criterion:
        """The criterion as an object, including the default."""
        return CRITERIA.resolve(self.criterion or DEFAULT_CRITERION)

    @property
    def criterion_name(self) -> str:
        """The name of the criterion, including the default."""
        return self.criterion if isinstance(self.criterion, str) else self.chosen_criterion.name

    @property
    def own_scores(self) -> bool:
        """Whether the schedule scores units itself, without a criterion."""
        return isinstance(self.schedule, (HardThresholding, Learned))

    @property
    def needs_data(self) -> bool:
        """Whether scores or repair need calibration data in addition to training."""
        scored = not self.own_scores and self.scores == "calibration" and self.chosen_criterion.needs_data
        return scored or self.repair != "none"

    @property
    def needs_labels(self) -> bool:
        """Whether calibration data must have labels."""
        scored = not self.own_scores and self.scores == "calibration" and self.labels == "given"
        return scored and self.chosen_criterion.by_gradients

    @property
    def trains(self) -> bool:
        """Whether the schedule needs a training run; one_shot and iterative do not."""
        return self.schedule.trains
