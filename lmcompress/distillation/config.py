"""What distillation is asked to do, as validated data: used by recipes and by the Python API alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcompress.distillation.losses import LOGIT_LOSSES, LogitLoss
from lmcompress.distillation.matches import MATCHES, MatchLoss
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES
from lmcompress.registry import PartField

LogitLossPart = Annotated[str | LogitLoss, PartField(LOGIT_LOSSES, "auto")]
MatchPart = Annotated[str | MatchLoss, PartField(MATCHES)]
WeightSchedule = Annotated[str | Callable[[float], float], PartField(WEIGHT_SCHEDULES)]
"""Factor of a weight over training: constant, linear_decay, linear_growth, cosine_decay, or one of your own."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TemperatureSchedule(_Part):
    """Per-example temperatures: flexible label smoothing weighting, or confidence-based."""

    kind: Annotated[
        Literal["constant", "flsw", "cwsm"],
        Field(description="flsw: by the cosine of student and teacher logits; cwsm: by the student's confidence."),
    ] = "constant"
    beta: Annotated[float, Field(ge=0, description="How far temperatures spread.")] = 1.0
    gamma: Annotated[float, Field(gt=0, description="flsw only: exponent of 1 − cosine.")] = 1.0
    minimum: Annotated[float, Field(gt=0, description="Temperatures are clamped from below.")] = 1.0
    maximum: Annotated[float, Field(gt=0, description="Temperatures are clamped from above.")] = 20.0


class Match(_Part):
    """One comparison of a student's feature with a teacher's."""

    loss: Annotated[
        MatchPart,
        Field(
            description="Name of a match: hidden_mse, hidden_cosine, pkd, gram, nst, attention_mse, …; or "
            "module:attribute of one of your own."
        ),
    ]
    student: Annotated[
        int | tuple[int, ...] | Literal["nearest"],
        Field(
            description="Student layer; hidden states: 0 = embeddings, i = block i; others from 1; -1 is the last. "
            "nearest, for hidden states: in every step the block whose states are nearest, in order over all such "
            "matches, among those that pruning has left."
        ),
    ]
    teacher: Annotated[int | tuple[int, ...], Field(description="Teacher layer, counted likewise.")]
    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    projection: Annotated[
        Literal["none", "auto", "linear", "relu", "tanh"],
        Field(description="On the student's side; auto: linear where the widths differ, none where they agree."),
    ] = "auto"
    projection_learning_rate: Annotated[
        float | None, Field(gt=0, description="Learning rate of the projection; default: that of the model.")
    ] = None
    on: Annotated[
        Literal["scores", "probabilities"] | None,
        Field(description="Attention matches only, and needed there: before or after the softmax."),
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, where there are several.")] = 0
    options: Annotated[
        dict[str, Any], Field(description="Further arguments of the match, such as relation_heads.")
    ] = {}


class EmdMatch(_Part):
    """Many-to-many match of hidden states by the earth mover's distance (BERT-EMD)."""

    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    which: Annotated[int, Field(ge=0, description="Number of the teacher, where there are several.")] = 0
    projection_learning_rate: Annotated[float | None, Field(gt=0)] = None


class Contrast(_Part):
    """Contrastive distillation: every token of the student is to be nearer to its teacher's than other tokens are."""

    level: Annotated[
        Literal["token", "sequence"],
        Field(description="What is contrasted: tokens of a sequence, or whole sequences of a micro-batch."),
    ] = "token"
    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 0.1
    weight_schedule: WeightSchedule = "constant"
    temperature: Annotated[
        float, Field(gt=0, description="Cosines are divided by it; low ones look at the nearest negatives only.")
    ] = 0.1
    student: Annotated[
        int | Literal["output"],
        Field(
            description="Student layer of hidden states, as in matches; output: what the head is given, after the last "
            "norm where there is one."
        ),
    ] = "output"
    teacher: Annotated[int | Literal["output"], Field(description="Teacher layer, counted likewise.")] = "output"
    negatives: Annotated[
        Literal["teacher", "student", "vocabulary"],
        Field(
            description="Where they come from: other tokens of the sequence, in the teacher or in the student, or "
            "tokens of the whole vocabulary, from the memory."
        ),
    ] = "teacher"
    num_negatives: Annotated[
        int | None, Field(ge=1, description="How many, chosen at random; default: all others of the sequence.")
    ] = None
    exclude_same_id: Annotated[
        bool, Field(description="Another occurrence of the same token in the sequence is no negative.")
    ] = True
    memory: Annotated[
        Literal["vocabulary", "none"],
        Field(
            description="vocabulary: the student's states are smoothed over time, one slot for each token id (4 bytes "
            "x vocabulary x width, in training checkpoints too); none: they are taken as they are."
        ),
    ] = "vocabulary"
    momentum: Annotated[float, Field(ge=0, lt=1, description="Share of the memory in a smoothed state.")] = 0.5
    projection: Annotated[
        Literal["auto", "none", "linear"] | Annotated[int, Field(ge=1)],
        Field(
            description="auto: the student's side, linear, where the widths differ; linear: always; a number: both "
            "sides, to that width."
        ),
    ] = "auto"
    projection_learning_rate: Annotated[
        float | None, Field(gt=0, description="Learning rate of the projections; default: that of the model.")
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, where there are several.")] = 0

    def feature(self, side: Literal["student", "teacher"]) -> tuple[str, int]:
        """What is captured of a model.

        Args:
            side: of which.

        Returns:
            A kind of feature and its layer, which may be negative.
        """
        layer = self.student if side == "student" else self.teacher
        return ("output", -1) if layer == "output" else ("hidden", layer)

    @model_validator(mode="after")
    def _fits(self) -> Contrast:
        if self.level == "sequence":
            if self.negatives != "teacher" or self.num_negatives is not None:
                raise ValueError(
                    "with level sequence the negatives are all other sequences of the micro-batch in the teacher: "
                    "leave out negatives and num_negatives"
                )
        elif self.negatives == "vocabulary" and (self.memory == "none" or self.num_negatives is None):
            raise ValueError(
                "negatives vocabulary are drawn from the memory: they need memory vocabulary and a num_negatives, got "
                f"memory {self.memory} and num_negatives {self.num_negatives}"
            )
        return self


class DistillationConfig(_Part):
    """How a student is fitted to its teachers.

    The loss is ``label_weight`` × the loss on the labels + ``weight`` × the loss on the logits + the matches and the
    contrast, each a mean over the whole optimizer step.
    """

    loss: Annotated[
        LogitLossPart,
        Field(
            description="Loss on the logits: kl, ce, reverse_kl, jsd, mse, or module:attribute of one of your own. "
            "auto: KL for classes and tokens, mean squared error for regression, Bernoulli KL for multi-label."
        ),
    ] = "auto"
    temperature: Annotated[float, Field(gt=0, description="Softens teacher and student alike; usually 1 to 8.")] = 4.0
    temperature_schedule: TemperatureSchedule = TemperatureSchedule()
    scale_by_temperature: Annotated[
        bool,
        Field(description="Multiply by temperature², so that the gradient's scale does not depend on it (Hinton)."),
    ] = True
    weight: Annotated[float, Field(ge=0, description="Weight of the loss on the logits.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    label_weight: Annotated[
        float, Field(ge=0, description="Weight of the loss on the labels; 0: labels are not used.")
    ] = 1.0
    label_weight_schedule: WeightSchedule = "constant"
    probability_shift: Annotated[
        bool, Field(description="Where the teacher is wrong, swap the logit of the label with the greatest.")
    ] = False
    beta: Annotated[float, Field(gt=0, lt=1, description="jsd only: share of the teacher in the mixture.")] = 0.5
    teacher_weights: Annotated[
        tuple[float, ...] | None,
        Field(min_length=1, description="With several teachers: how their logits are averaged; default: evenly."),
    ] = None
    token_scaling: Annotated[
        float | None,
        Field(
            gt=0,
            description="Heads with a label per token: weigh the loss on the logits by a softmax, over the sequence, "
            "of the teacher's cross-entropy divided by this (TSLD; the authors: 10). Default: all tokens alike.",
        ),
    ] = None
    matches: tuple[Match, ...] = ()
    emd: EmdMatch | None = None
    contrast: Contrast | None = None
    homogeneity: Annotated[
        bool,
        Field(
            description="Log how alike the tokens of a sequence are, as a mean cosine, in student and teacher; a "
            "contrast always does."
        ),
    ] = False
    chunk_tokens: Annotated[
        int, Field(ge=1, description="Causal models: rows of the (tokens, vocabulary) matrix in memory at a time.")
    ] = 512
    max_projection_norm: Annotated[
        float | None, Field(gt=0, description="Gradient norm to which projections are clipped; default: as the model.")
    ] = None

    @model_validator(mode="after")
    def _something_to_do(self) -> DistillationConfig:
        others = self.matches or self.emd is not None or self.contrast is not None
        if self.weight == 0 and self.label_weight == 0 and not others:
            raise ValueError("weight, label_weight and matches are all zero: there is nothing to train on")
        if self.teacher_weights is not None and (min(self.teacher_weights) < 0 or sum(self.teacher_weights) <= 0):
            raise ValueError(f"teacher_weights must be >= 0 and not all 0, got {self.teacher_weights}")
        schedule = self.temperature_schedule
        if schedule.kind != "constant" and not schedule.minimum <= self.temperature <= schedule.maximum:
            raise ValueError(
                f"temperature must lie between temperature_schedule.minimum {schedule.minimum} and maximum "
                f"{schedule.maximum}, got {self.temperature}"
            )
        return self
