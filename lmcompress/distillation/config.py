"""The configuration of distillation as validated data, shared by recipes and the Python API."""

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
StackLayer = Annotated[str, Field(pattern=r"^(encoder|decoder)\.-?[0-9]+$")]
"""A layer of one of two stacks, counted from 1 or, if negative, from its end."""
WeightSchedule = Annotated[str | Callable[[float], float], PartField(WEIGHT_SCHEDULES)]
"""Factor of a weight over training: constant, linear_decay, linear_growth, cosine_decay, or a custom function."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TemperatureSchedule(_Part):
    """Per-example temperatures: flexible label smoothing weighting, or confidence-based."""

    kind: Annotated[
        Literal["constant", "flsw", "cwsm"],
        Field(description="flsw: by the cosine of student and teacher logits; cwsm: by the student's confidence."),
    ] = "constant"
    beta: Annotated[float, Field(ge=0, description="Spread of the temperatures.")] = 1.0
    gamma: Annotated[float, Field(gt=0, description="flsw only: exponent of 1 − cosine.")] = 1.0
    minimum: Annotated[float, Field(gt=0, description="Lower bound of the temperatures.")] = 1.0
    maximum: Annotated[float, Field(gt=0, description="Upper bound of the temperatures.")] = 20.0


class Match(_Part):
    """One comparison of a student's feature with a teacher's."""

    loss: Annotated[
        MatchPart,
        Field(
            description="Name of a match: hidden_mse, hidden_cosine, pkd, gram, nst, attention_mse, …; or "
            "module:attribute of a custom one."
        ),
    ]
    student: Annotated[
        int | StackLayer | tuple[int | StackLayer, ...] | Literal["nearest"],
        Field(
            description="Student layer; hidden states: 0 = embeddings, i = block i; others from 1; -1 is the last; "
            "of a model with an encoder and a decoder, encoder.i or decoder.i. "
            "nearest, for hidden states: at every step the block with the nearest states, in order over all such "
            "matches, among those that pruning has kept."
        ),
    ]
    teacher: Annotated[
        int | StackLayer | tuple[int | StackLayer, ...], Field(description="Teacher layer, counted the same way.")
    ]
    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    projection: Annotated[
        Literal["none", "auto", "linear", "relu", "tanh"],
        Field(description="Projection of the student; auto: linear if the widths differ, none if they agree."),
    ] = "auto"
    projection_learning_rate: Annotated[
        float | None, Field(gt=0, description="Learning rate of the projection; default: that of the model.")
    ] = None
    projection_optimizer: Annotated[
        dict[str, Any],
        Field(
            description="Further options of the projection's optimizer group, such as weight_decay; default: 0 of it."
        ),
    ] = {}
    on: Annotated[
        Literal["scores", "probabilities"] | None,
        Field(description="For attention matches, which require it: before or after the softmax."),
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, if there are several.")] = 0
    options: Annotated[
        dict[str, Any], Field(description="Further arguments of the match, such as relation_heads.")
    ] = {}


class EmdMatch(_Part):
    """Many-to-many match of hidden states by the earth mover's distance (BERT-EMD)."""

    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    which: Annotated[int, Field(ge=0, description="Number of the teacher, if there are several.")] = 0
    projection_learning_rate: Annotated[float | None, Field(gt=0)] = None


class Contrast(_Part):
    """Contrastive distillation: each token of the student is pulled towards its teacher's, away from other tokens'."""

    level: Annotated[
        Literal["token", "sequence"],
        Field(description="Units of the contrast: tokens of a sequence, or whole sequences of a micro-batch."),
    ] = "token"
    weight: Annotated[float, Field(ge=0, description="Weight of the term in the loss.")] = 0.1
    weight_schedule: WeightSchedule = "constant"
    temperature: Annotated[
        float, Field(gt=0, description="Divisor of the cosines; low values weight the nearest negatives only.")
    ] = 0.1
    student: Annotated[
        int | StackLayer | Literal["output"],
        Field(
            description="Student layer of hidden states, as in matches; output: the input of the head, after the final "
            "norm if there is one."
        ),
    ] = "output"
    teacher: Annotated[
        int | StackLayer | Literal["output"], Field(description="Teacher layer, counted the same way.")
    ] = "output"
    negatives: Annotated[
        Literal["teacher", "student", "vocabulary"],
        Field(
            description="Source of the negatives: other tokens of the sequence, in the teacher or in the student, or "
            "tokens of the whole vocabulary, from the memory."
        ),
    ] = "teacher"
    num_negatives: Annotated[
        int | None, Field(ge=1, description="Number of random negatives; default: all others of the sequence.")
    ] = None
    exclude_same_id: Annotated[
        bool, Field(description="Whether other occurrences of the same token are excluded from the negatives.")
    ] = True
    memory: Annotated[
        Literal["vocabulary", "none"],
        Field(
            description="vocabulary: the student's states are smoothed over time, one slot for each token id (4 bytes "
            "x vocabulary x width, in training checkpoints too); none: they are used as they are."
        ),
    ] = "vocabulary"
    momentum: Annotated[float, Field(ge=0, lt=1, description="Share of the memory in a smoothed state.")] = 0.5
    projection: Annotated[
        Literal["auto", "none", "linear"] | Annotated[int, Field(ge=1)],
        Field(
            description="Projection; auto: of the student, linear, if widths differ; linear: always; a number: both "
            "sides, to that width."
        ),
    ] = "auto"
    projection_learning_rate: Annotated[
        float | None, Field(gt=0, description="Learning rate of the projections; default: that of the model.")
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, if there are several.")] = 0

    def feature(self, side: Literal["student", "teacher"]) -> tuple[str, int | str]:
        """The feature to capture on one side.

        Args:
            side: student or teacher.

        Returns:
            A kind of feature and its layer, which may be negative, or named by its stack.
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


class OnPolicy(_Part):
    """Optimizer steps on texts that the student itself writes, and its teacher judges (GKD)."""

    fraction: Annotated[
        float, Field(ge=0, le=1, description="Share of the optimizer steps that are on the student's own texts.")
    ] = 0.5
    max_new_tokens: Annotated[int, Field(ge=1, description="Maximum tokens that the student writes for a row.")] = 64
    temperature: Annotated[float, Field(gt=0, description="Temperature of its sampling.")] = 1.0
    prompt_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Length of the prompt in rows without one, which are running text; a conversation's is all "
            "before its last answer.",
        ),
    ] = 32
    seed: Annotated[int | None, Field(ge=0, description="Seed of choices and samples; default: the run's.")] = None


class DistillationConfig(_Part):
    """The objective by which a student is fitted to its teachers.

    The loss is ``label_weight`` × the loss on the labels + ``weight`` × the loss on the logits + the matches and the
    contrast, each a mean over the whole optimizer step.
    """

    loss: Annotated[
        LogitLossPart,
        Field(
            description="Loss on the logits: kl, ce, reverse_kl, jsd, mse, uld, or module:attribute of a custom one. "
            "auto: KL for classes and tokens, mean squared error for regression, Bernoulli KL for multi-label."
        ),
    ] = "auto"
    temperature: Annotated[float, Field(gt=0, description="Temperature of teacher and student; usually 1 to 8.")] = 4.0
    temperature_schedule: TemperatureSchedule = TemperatureSchedule()
    scale_by_temperature: Annotated[
        bool,
        Field(description="Whether to multiply by temperature², so that the gradient's scale is independent of it."),
    ] = True
    weight: Annotated[float, Field(ge=0, description="Weight of the loss on the logits.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    label_weight: Annotated[
        float, Field(ge=0, description="Weight of the loss on the labels; 0: labels are not used.")
    ] = 1.0
    label_weight_schedule: WeightSchedule = "constant"
    probability_shift: Annotated[
        bool, Field(description="Whether to swap the label's logit with the largest where the teacher is wrong.")
    ] = False
    beta: Annotated[float, Field(gt=0, lt=1, description="jsd only: share of the teacher in the mixture.")] = 0.5
    teacher_weights: Annotated[
        tuple[float, ...] | None,
        Field(min_length=1, description="Weights of the logits of several teachers; default: equal."),
    ] = None
    shared_tokens: Annotated[
        Literal["with_rest", "renormalized"] | None,
        Field(
            description="For a teacher with another tokenizer: compare the logits of the tokens that both "
            "vocabularies share; with_rest: all others are one class more; renormalized: they do not count. Default: "
            "both have one vocabulary, or loss uld needs none."
        ),
    ] = None
    on_policy: OnPolicy | None = None
    token_scaling: Annotated[
        float | None,
        Field(
            gt=0,
            description="For heads with a label per token: weight the loss on logits by a softmax, over the sequence, "
            "of the teacher's cross-entropy divided by this (TSLD; the authors: 10). Default: equal weights.",
        ),
    ] = None
    matches: tuple[Match, ...] = ()
    emd: EmdMatch | None = None
    contrast: Contrast | None = None
    homogeneity: Annotated[
        bool,
        Field(
            description="Whether to log the mean cosine of the tokens of a sequence, in student and teacher; a "
            "contrast always does."
        ),
    ] = False
    vocab_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="Heads over the vocabulary: number of tokens of the tokenizer that student and teachers share. "
            "Where their tables have been padded to other sizes, the logits behind it are left out. Default: the sizes "
            "must agree (recipes: taken from the tokenizer).",
        ),
    ] = None
    chunk_tokens: Annotated[
        int, Field(ge=1, description="Causal models: rows of the (tokens, vocabulary) matrix in memory at a time.")
    ] = 512
    max_projection_norm: Annotated[
        float | None, Field(gt=0, description="Max gradient norm of the projections; default: the model's.")
    ] = None

    @model_validator(mode="after")
    def _something_to_do(self) -> DistillationConfig:
        others = self.matches or self.emd is not None or self.contrast is not None
        if self.weight == 0 and self.label_weight == 0 and not others:
            raise ValueError("weight, label_weight and matches are all zero: there is nothing to train on")
        if self.teacher_weights is not None and (min(self.teacher_weights) < 0 or sum(self.teacher_weights) <= 0):
            raise ValueError(f"teacher_weights must be >= 0 and not all 0, got {self.teacher_weights}")
        self._check_shared_tokens()
        if self.on_policy is not None and self.on_policy.fraction > 0 and self.weight == 0:
            raise ValueError(
                "on_policy needs a weight > 0: what the student writes has no labels, only its teacher's logits"
            )
        schedule = self.temperature_schedule
        if schedule.kind != "constant" and not schedule.minimum <= self.temperature <= schedule.maximum:
            raise ValueError(
                f"temperature must lie between temperature_schedule.minimum {schedule.minimum} and maximum "
                f"{schedule.maximum}, got {self.temperature}"
            )
        return self

    def _check_shared_tokens(self) -> None:
        if self.shared_tokens is None:
            return
        if self.loss == "uld" or (isinstance(self.loss, LogitLoss) and self.loss.across):
            raise ValueError("loss uld compares whole vocabularies: leave shared_tokens out, or choose another loss")
        if self.weight == 0:
            raise ValueError("shared_tokens is of the loss on the logits, whose weight is 0: leave it out")
