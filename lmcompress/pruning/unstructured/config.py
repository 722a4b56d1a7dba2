"""The configuration of unstructured pruning as validated data, shared by recipes and the Python API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmcompress.errors import LmcompressError
from lmcompress.families.weights import Matrices
from lmcompress.pruning.unstructured.criteria import CRITERIA, Criterion, Scope
from lmcompress.pruning.unstructured.patterns import NOfM, Pattern, Unstructured
from lmcompress.registry import PartField
from lmcompress.schedules import RAMPS, Event, Gradual, HardThresholding, Iterative, OneShot, Phase, Ramp


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Surgery(Phase):
    """Cut and splice: weights are trained behind the mask, and reactivated when they have grown (Guo et al. 2016).

    With ``quality``, thresholds are the paper's: μ + quality · σ of the magnitudes of each matrix when surgery
    begins, and fixed from then on. With ``sparsity`` they follow the weights, so that the pruned share rises to it
    along the ramp, and is exact at the end.
    """

    kind: Literal["surgery"] = "surgery"
    end: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which the mask is final; the rest is recovery.")
    ] = 0.6
    margin: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Weights are pruned below 1 - margin times the threshold, and reactivated above 1 + margin.",
        ),
    ] = 0.1
    gamma: Annotated[
        float, Field(ge=0, description="At step t the mask is updated with probability (1 + gamma t)^-power.")
    ] = 1e-4
    power: Annotated[float, Field(ge=0, description="Exponent of the probability; see gamma.")] = 1.0
    every: Annotated[
        int,
        Field(ge=1, description="Optimizer steps between two updates; with sparsity, each of them ranks all weights."),
    ] = 1
    ramp: Annotated[
        Annotated[str | Ramp, PartField(RAMPS)] | None,
        Field(description="With sparsity: ramp of the share within the phase; null: the full share from the start."),
    ] = "cubic"

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            The beginning, at which a share of 0 is pruned, and the end, which is final.

        Raises:
            LmcompressError: If the phase has no step.
        """
        begin, end = self.steps(max_steps, "surgery")
        return [Event(begin, 0.0), Event(end, 1.0, final=True)]


Schedule = Annotated[
    OneShot | Iterative | Gradual | Surgery | HardThresholding,
    Field(discriminator="kind"),
]


def _share(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"sparsity must be in [0, 1), got {value}; at 1 nothing of a matrix is left: to remove whole units use "
            "structured pruning"
        )
    return value


class SparsityRule(_Part):
    """An override of the defaults for some matrices; of two rules that match a matrix the later one applies."""

    modules: Matrices
    sparsity: Annotated[
        float | None,
        Field(description="Share of these weights to prune, ranked separately; null without quality: none is pruned."),
    ] = None
    quality: Annotated[float | None, Field(description="Threshold for these matrices, as in the configuration.")] = None

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        return _share(value)

    @model_validator(mode="after")
    def _one(self) -> SparsityRule:
        if self.sparsity is not None and self.quality is not None:
            raise ValueError(f"a rule must have sparsity or quality, got both for {self.modules!r}")
        return self


class SparsityConfig(_Part):
    """The share, the criterion and the schedule by which single weights are pruned."""

    sparsity: Annotated[
        float | None, Field(description="Share of the weights of the matrices to prune, in [0, 1).")
    ] = None
    quality: Annotated[
        float | None,
        Field(
            description="Instead of sparsity: the threshold of each matrix in standard deviations of its weights (Han "
            "et al.); with the schedule surgery the c of μ + c·σ, of either sign."
        ),
    ] = None
    pattern: Annotated[Pattern, Field(description="Pattern of the zeros; n_of_m also determines their number.")] = (
        Unstructured()
    )
    criterion: Annotated[
        str | Criterion,
        PartField(CRITERIA),
        Field(
            description="Criterion that scores weights: magnitude, obd (exact second order, for classifiers with few "
            "classes), fisher, taylor, movement, wanda, sparsegpt, random; or module:attribute of a custom Criterion."
        ),
    ] = "magnitude"
    scope: Annotated[
        Scope | None,
        Field(
            description="Scope of the comparison: global (all matrices without a rule of their own), layer, "
            "or row (of one output); default: the criterion's own."
        ),
    ] = None
    rules: Annotated[tuple[SparsityRule, ...], Field(description="Overrides for some matrices.")] = ()
    schedule: Schedule = OneShot()
    train_removed: Annotated[
        bool | None,
        Field(
            description="Whether pruned weights are trained behind the mask until it is final, so that they may be "
            "reactivated; default: with the schedule surgery and the criterion movement."
        ),
    ] = None
    keep_zeros: Annotated[
        bool, Field(description="Whether weights that are already exactly 0 stay 0, such as those of an earlier stage.")
    ] = False
    compensation: Annotated[
        bool,
        Field(
            description="Whether the remaining weights of each row compensate, in closed form, the effect of removed "
            "ones on the output on calibration data (SparseGPT); one_shot and iterative only."
        ),
    ] = False
    damping: Annotated[float, Field(gt=0, description="For compensation: share of the mean added to the diagonal.")] = (
        0.01
    )
    calibration_rows: Annotated[
        int, Field(ge=1, description="Number of training rows for scores that need data, if no batches are given.")
    ] = 256
    calibration_batch_size: Annotated[int, Field(ge=1, description="Rows of one batch of them.")] = 32
    seed: Annotated[
        int, Field(ge=0, lt=1 << 32, description="Seed of calibration rows, random scores and surgery steps.")
    ] = 0

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        return _share(value)

    @model_validator(mode="after")
    def _fits_together(self) -> SparsityConfig:
        self._check_amount()
        self._check_schedule()
        criterion, name = self.chosen_criterion, self.criterion_name
        if self.train_removed and criterion.needs_data and not criterion.in_training:
            raise ValueError(
                f"train_removed goes with magnitude, movement or random, got {name!r}, which needs "
                "weights that the masked model does not have"
            )
        if self.scope == "row" and not isinstance(self.pattern, Unstructured):
            raise ValueError(f"scope row needs single weights, got the pattern {self.pattern.kind}")
        if self.compensation and (self.schedule.trains or self.removed_is_trained):
            raise ValueError(
                "compensation is for weights that are pruned for good: one_shot or iterative, got "
                f"{self.schedule.kind}{' with train_removed' if self.removed_is_trained else ''}"
            )
        if criterion.needs == "moments" and not self.compensation:
            raise ValueError(f"the criterion {name} chooses while it compensates: set compensation to true")
        return self

    def _check_amount(self) -> None:
        """The share is given once, in a way that fits the criterion and the pattern."""
        given = [q for q in (self.quality, *(rule.quality for rule in self.rules)) if q is not None]
        if self.sparsity is not None and self.quality is not None:
            raise ValueError(f"either sparsity or quality must be given, got {self.sparsity} and {self.quality}")
        if isinstance(self.pattern, NOfM):
            if self.sparsity is not None or given or any(rule.sparsity is not None for rule in self.rules):
                raise ValueError(
                    f"the pattern {self.pattern.n}:{self.pattern.m} determines how many weights are kept: leave "
                    "sparsity and quality out; a rule without them leaves its matrices dense"
                )
        elif self.sparsity is None and not given and not any(rule.sparsity is not None for rule in self.rules):
            raise ValueError("sparsity, quality or a rule with one of them must give the share to prune, got none")
        if not given:
            return
        if not self._by_magnitude or not isinstance(self.pattern, Unstructured):
            raise ValueError(
                f"quality is a threshold of single magnitudes, got criterion {self.criterion_name} and pattern "
                f"{self.pattern.kind}: give the share by sparsity"
            )
        if self.schedule.kind == "iht" or self.scope not in (None, "layer"):
            raise ValueError("quality is a threshold of each matrix, it fits neither iht nor another scope than layer")
        if self.schedule.kind != "surgery" and any(not q > 0 for q in given):
            raise ValueError(f"quality must be > 0 except with the schedule surgery, got {min(given)}")
        if self.compensation:
            raise ValueError("compensation needs sparsity or a pattern, got quality")

    def _check_schedule(self) -> None:
        """Combinations that surgery and hard thresholding exclude."""
        if self.schedule.kind == "surgery":
            if not self._by_magnitude:
                raise ValueError(f"the schedule surgery ranks by magnitude, got criterion {self.criterion_name!r}")
            if not isinstance(self.pattern, Unstructured) or self.scope == "row":
                raise ValueError("surgery ranks single weights of a matrix or of all: use no pattern, nor scope row")
            if self.train_removed is False:
                raise ValueError(
                    "surgery trains pruned weights, or nothing could be reactivated: leave train_removed out"
                )
        if self.schedule.kind == "iht":
            if self.chosen_criterion.in_training:
                raise ValueError(
                    f"iht scores the weights at the start of a cycle, {self.criterion_name} is a sum over all "
                    "earlier steps: use magnitude, wanda, fisher or taylor"
                )
            if self.train_removed:
                raise ValueError("iht restarts reactivated weights from 0: leave train_removed out")

    @property
    def _by_magnitude(self) -> bool:
        return self.chosen_criterion is CRITERIA["magnitude"]

    @property
    def chosen_criterion(self) -> Criterion:
        """The criterion as an object."""
        return CRITERIA.resolve(self.criterion)

    @property
    def criterion_name(self) -> str:
        """Name of the criterion."""
        return self.criterion if isinstance(self.criterion, str) else self.criterion.name

    @property
    def removed_is_trained(self) -> bool:
        """Whether pruned weights are trained behind the mask, including the default."""
        if self.train_removed is None:
            return self.schedule.kind == "surgery" or self.chosen_criterion.in_training
        return self.train_removed

    @property
    def needs_data(self) -> bool:
        """Whether training rows are read in addition to training."""
        # a sum over training comes from training itself
        return self.compensation or (self.chosen_criterion.needs_data and not self.chosen_criterion.in_training)

    @property
    def trains(self) -> bool:
        """Whether the schedule needs a training run; one_shot and iterative do not."""
        return self.schedule.trains

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Raises:
            LmcompressError: If there are too few steps for the schedule, or for a criterion that is a sum over them.
        """
        found = self.schedule.events(max_steps)
        if self.chosen_criterion.in_training and next(event for event in found if event.share).step == 0:
            raise LmcompressError(
                f"the criterion {self.criterion_name} must see some steps before weights are pruned, got a schedule "
                "that begins with the first; let it begin later, such as begin: 0.1"
            )
        return found
