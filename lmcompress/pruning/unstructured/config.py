"""What sparsity is asked to do, as validated data: used by recipes and by the Python API alike."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmcompress.pruning.unstructured.criteria import CRITERIA, Scope
from lmcompress.pruning.unstructured.patterns import NOfM, Pattern, Unstructured
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot, Phase


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Surgery(Phase):
    """Cut and splice: weights are trained behind the mask, and come back when they have grown (Guo et al. 2016).

    With ``quality``, thresholds are those of the paper: μ + quality · σ of the magnitudes of each matrix when surgery
    begins, and then fixed. With ``sparsity`` they follow the weights, so that the share that is gone rises to it along
    the ramp, and is exact in the end.
    """

    kind: Literal["surgery"] = "surgery"
    end: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which the mask is final; the rest is recovery.")
    ] = 0.6
    margin: Annotated[
        float,
        Field(
            ge=0, lt=1, description="Weights go below 1 - margin times the threshold, and come back above 1 + margin."
        ),
    ] = 0.1
    gamma: Annotated[
        float, Field(ge=0, description="At step t the mask is looked at with probability (1 + gamma t)^-power.")
    ] = 1e-4
    power: Annotated[float, Field(ge=0, description="See gamma.")] = 1.0
    every: Annotated[
        int,
        Field(ge=1, description="Optimizer steps between two looks; with sparsity, each of them ranks all weights."),
    ] = 1
    ramp: Annotated[
        Literal["cubic", "linear"] | None,
        Field(description="With sparsity: how the share rises within the phase; null: the whole of it from the start."),
    ] = "cubic"


Schedule = Annotated[
    OneShot | Iterative | Gradual | Surgery | HardThresholding,
    Field(discriminator="kind"),
]


def _share(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"sparsity must be in [0, 1), got {value}; at 1 nothing of a matrix would be left: what is to go whole is "
            "for structured pruning"
        )
    return value


class SparsityRule(_Part):
    """What some matrices get in place of the default; of two rules that name a matrix the later one counts."""

    modules: Annotated[
        str,
        Field(
            min_length=1,
            description="Names of parts (query, key, value, qkv, attention_out, ffn_in, ffn_out, embeddings, head) or "
            "paths such as h.0.mlp.c_fc or pooler.dense; * and ? stand for any.",
        ),
    ]
    sparsity: Annotated[
        float | None,
        Field(description="Share of the weights that goes, ranked by themselves; without quality, null: none goes."),
    ] = None
    quality: Annotated[float | None, Field(description="As in the configuration, for these matrices.")] = None

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
    """Which single weights become zero, how many, by what criterion and when."""

    sparsity: Annotated[
        float | None, Field(description="Share of the weights of the matrices that goes, in [0, 1).")
    ] = None
    quality: Annotated[
        float | None,
        Field(
            description="In place of sparsity: the threshold of each matrix in standard deviations of its weights (Han "
            "et al.); with the schedule surgery the c of μ + c·σ, of either sign."
        ),
    ] = None
    pattern: Annotated[Pattern, Field(description="Where zeros may lie; n_of_m says how many there are, too.")] = (
        Unstructured()
    )
    criterion: Annotated[
        str,
        Field(
            description="What scores weights: magnitude, obd (exact second order, for classifiers of few classes), "
            "fisher, taylor, movement, wanda, sparsegpt or random."
        ),
    ] = "magnitude"
    scope: Annotated[
        Scope | None,
        Field(
            description="Within what weights are compared: global (all matrices without a rule of their own), layer, "
            "or row (of one output); default: what suits the criterion."
        ),
    ] = None
    rules: Annotated[tuple[SparsityRule, ...], Field(description="For some matrices in place of the above.")] = ()
    schedule: Schedule = OneShot()
    train_removed: Annotated[
        bool | None,
        Field(
            description="Whether weights that are gone are trained behind the mask until it is final, so that they may "
            "come back; default: with the schedule surgery and the criterion movement."
        ),
    ] = None
    keep_zeros: Annotated[
        bool, Field(description="Whether weights that are exactly 0 before stay so, such as those of a stage before.")
    ] = False
    compensation: Annotated[
        bool,
        Field(
            description="Whether what is left of each row takes over, in closed form, what removed weights did to the "
            "output on calibration data (SparseGPT); one_shot and iterative only."
        ),
    ] = False
    damping: Annotated[float, Field(gt=0, description="Of compensation: share of the mean added to the diagonal.")] = (
        0.01
    )
    calibration_rows: Annotated[
        int, Field(ge=1, description="Rows of the training data for scores that need data, where no batches are given.")
    ] = 256
    calibration_batch_size: Annotated[int, Field(ge=1, description="Rows of one batch of them.")] = 32
    seed: Annotated[int, Field(ge=0, description="Of calibration rows, random scores, and when surgery looks.")] = 0

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        return _share(value)

    @model_validator(mode="after")
    def _fits_together(self) -> SparsityConfig:
        kind, by_quality = (
            self.schedule.kind,
            self.quality is not None or any(r.quality is not None for r in self.rules),
        )
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known are {', '.join(sorted(CRITERIA))}")
        if self.sparsity is not None and self.quality is not None:
            raise ValueError(f"either sparsity or quality must be given, got {self.sparsity} and {self.quality}")
        if isinstance(self.pattern, NOfM):
            if self.sparsity is not None or by_quality or any(rule.sparsity is not None for rule in self.rules):
                raise ValueError(
                    f"the pattern {self.pattern.n}:{self.pattern.m} says how many weights stay: leave sparsity and "
                    "quality out; a rule without them leaves its matrices dense"
                )
        elif self.sparsity is None and self.quality is None and not any(_asks(rule) for rule in self.rules):
            raise ValueError("sparsity, quality or a rule with one of them must say how much is to go, got none")
        if by_quality and (self.criterion != "magnitude" or not isinstance(self.pattern, Unstructured)):
            raise ValueError(
                f"quality is a threshold of single magnitudes, got criterion {self.criterion} and pattern "
                f"{self.pattern.kind}: say how much by sparsity"
            )
        if by_quality and (kind == "iht" or self.scope not in (None, "layer")):
            raise ValueError("quality is a threshold of each matrix, it fits neither iht nor another scope than layer")
        given = [q for q in (self.quality, *(rule.quality for rule in self.rules)) if q is not None]
        if kind != "surgery" and any(not q > 0 for q in given):
            raise ValueError(f"quality must be > 0 but with the schedule surgery, got {min(given)}")
        if kind == "surgery" and self.criterion != "magnitude":
            raise ValueError(f"the schedule surgery goes by magnitude, got criterion {self.criterion!r}")
        if kind == "iht" and self.criterion == "movement":
            raise ValueError(
                "iht scores the weights as they are when a cycle begins, movement is a sum over all steps before: use "
                "magnitude, wanda, fisher or taylor"
            )
        if kind == "surgery" and (not isinstance(self.pattern, Unstructured) or self.scope == "row"):
            raise ValueError("surgery looks at single weights of a matrix or of all: use no pattern, nor scope row")
        if kind == "surgery" and self.train_removed is False:
            raise ValueError("surgery trains what is removed, or nothing could come back: leave train_removed out")
        if self.train_removed and self.criterion not in ("magnitude", "movement", "random"):
            raise ValueError(
                f"train_removed goes with magnitude, movement or random, got {self.criterion!r}, which asks the masked "
                "model of weights that it does not have"
            )
        if kind == "iht" and self.train_removed:
            raise ValueError("iht restarts what comes back from 0: leave train_removed out")
        if self.scope == "row" and not isinstance(self.pattern, Unstructured):
            raise ValueError(f"scope row needs single weights, got the pattern {self.pattern.kind}")
        if self.compensation and (kind not in ("one_shot", "iterative") or self.removed_is_trained):
            raise ValueError(
                f"compensation is for weights that are gone for good: one_shot or iterative, got {kind}"
                f"{' with train_removed' if self.removed_is_trained else ''}"
            )
        if self.criterion == "sparsegpt" and not self.compensation:
            raise ValueError("the criterion sparsegpt chooses while it compensates: set compensation to true")
        if self.compensation and by_quality:
            raise ValueError("compensation needs sparsity or a pattern, got quality")
        return self

    @property
    def removed_is_trained(self) -> bool:
        """Whether weights that are gone are trained behind the mask, with the default filled in."""
        if self.train_removed is None:
            return self.schedule.kind == "surgery" or self.criterion == "movement"
        return self.train_removed

    @property
    def needs_data(self) -> bool:
        """Whether rows of the training data are looked at apart from training."""
        by_data = CRITERIA[self.criterion].needs not in ("weights", "nothing")
        # movement is what training itself shows
        return self.compensation or (by_data and self.criterion != "movement")

    @property
    def trains(self) -> bool:
        """Whether the schedule needs a training run; one_shot and iterative do not."""
        return self.schedule.kind not in ("one_shot", "iterative")


def _asks(rule: SparsityRule) -> bool:
    return rule.sparsity is not None or rule.quality is not None
