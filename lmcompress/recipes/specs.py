"""Parts of a recipe other than its stages' methods: the model, the task, augmentation, and measurements."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmcompress.data import TaskKind
from lmcompress.errors import nearest
from lmcompress.families import FAMILIES

BASE_MODEL = "model"
"""The value of a stage's ``start`` that stands for the recipe's own model."""


class SchemaPart(BaseModel):
    """A mapping of a recipe: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenizerSpec(SchemaPart):
    """A small tokenizer, trained on the training texts."""

    kind: Annotated[
        Literal["wordpiece", "bytelevel_bpe"],
        Field(description="Kind of tokenizer: wordpiece (lower-casing, as in BERT) or bytelevel_bpe (as in GPT-2)."),
    ]
    vocab_size: Annotated[int, Field(ge=16, le=1 << 20, description="Maximum vocabulary size, with special tokens.")]


class FromScratch(SchemaPart):
    """A model with random weights, for training from scratch."""

    family: Annotated[str, Field(description=f"Model family: {', '.join(FAMILIES)}.")]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 16, description="Width of the hidden states.")]
    layers: Annotated[int, Field(ge=1, le=256, description="Number of Transformer blocks.")]
    num_heads: Annotated[
        int, Field(ge=1, le=256, description="Number of attention heads per block; must divide hidden_size.")
    ]
    intermediate_size: Annotated[
        int | None,
        Field(ge=1, le=1 << 18, description="Width of the feed-forward networks; default: four times hidden_size."),
    ] = None
    positions: Annotated[int, Field(ge=2, le=1 << 20, description="Maximum length of an input in tokens.")] = 512
    tokenizer: Annotated[TokenizerSpec, Field(description="The tokenizer to train for it.")]
    config: Annotated[
        dict[str, int | float | str | bool],
        Field(description="Further fields of the family's transformers config, such as hidden_dropout_prob."),
    ] = {}

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"no model family {family!r}{nearest(family, FAMILIES)}")
        return family

    @model_validator(mode="after")
    def _heads_divide(self) -> FromScratch:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size, got {self.num_heads} and {self.hidden_size}")
        return self


class TaskSpec(SchemaPart):
    """The task of the models, and the source of its rows."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            description="glue/<task>, embedded/<name>, a folder or file, a Hub data set (owner/name:configuration), "
            "or, with data, a name of the user's choice.",
        ),
    ]
    data: Annotated[
        str | None, Field(description="Folder or file with the rows; for GLUE the folder that holds glue/<task>/.")
    ] = None
    text_columns: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, max_length=2, description="Text columns, one or two; default: the usual names."),
    ] = None
    label_column: Annotated[str | None, Field(description="Label column; default: the usual names.")] = None
    kind: Annotated[TaskKind | None, Field(description="Kind of task; default: inferred from the labels.")] = None
    splits: Annotated[
        dict[str, str] | None, Field(description="train, validation, test: their names in the source.")
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        Field(
            min_length=1,
            description="Metrics of quality, the main one first; default: those of the task, and f1_macro where its "
            "classes are unbalanced. evaluation.metrics is the same.",
        ),
    ] = None
    class_weights: Annotated[
        Literal["balanced"] | tuple[Annotated[float, Field(ge=0)], ...] | None,
        Field(
            description="Weights of the classes in the loss on the labels: balanced (the rarer, the more), or one for "
            "each, in the order of the labels. They are scaled to a mean of 1 over the training rows."
        ),
    ] = None
    chat: Annotated[
        bool,
        Field(
            description="Whether rows are conversations (messages: a list of role and content), written by the "
            "tokenizer's chat template; only the assistant's answers are learned and measured."
        ),
    ] = False
    packing: Annotated[
        Literal["joined", "apart"],
        Field(
            description="Documents in a block, for causal_lm: joined: a token attends to all before it; apart: to its "
            "own document only, with position ids that begin anew, for families that keep packed documents apart."
        ),
    ] = "joined"
    max_length: Annotated[
        int,
        Field(
            ge=2,
            description="Maximum tokens of a row, by truncation; for causal_lm the block size, for question_answering "
            "the window, by default 384.",
        ),
    ] = 128
    overlap: Annotated[
        int | None,
        Field(
            ge=0,
            description="question_answering: tokens that neighbouring windows of a long context share; default: a "
            "third of max_length at most.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of rows of each split, for quick trials; for causal_lm, of packed blocks. "
            "Vocabularies are chosen from all rows.",
        ),
    ] = None


class Augmentation(SchemaPart):
    """Data augmentation of the training texts; the teacher labels the new ones."""

    operations: Annotated[
        tuple[Literal["mask", "delete", "replace", "n_gram", "short_disorder", "long_disorder"], ...],
        Field(
            min_length=1,
            description="Operations, one drawn for each new text. replace uses words that are near in the first "
            "teacher's embeddings, so it needs distillation.",
        ),
    ]
    copies: Annotated[int, Field(ge=1, le=100, description="Number of new rows for each row.")] = 1
    probability: Annotated[
        float | None, Field(ge=0, le=1, description="Probability of each word to change; default: the operation's.")
    ] = None

    @property
    def replaces(self) -> bool:
        """Whether words are replaced by near ones."""
        return "replace" in self.operations


class EvaluationSpec(SchemaPart):
    """Measurements at the end, the same for all stages."""

    splits: Annotated[
        tuple[str, ...], Field(min_length=1, description="Splits that quality is measured on, the main one first.")
    ] = ("validation",)
    metrics: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, description="Metrics of quality, the main one first; default: task.metrics."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="Batch size when quality is measured.")] = 64
    latency_batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...],
        Field(description="Batch sizes that latency is measured at; empty: it is not measured."),
    ] = (1, 32)
    sequence_length: Annotated[
        int | None,
        Field(
            ge=1, description="Length of inputs when latency is measured; default: the task's max_length, at most 128."
        ),
    ] = None
    repeats: Annotated[int, Field(ge=3, description="Number of timed calls of each model.")] = 20
    num_beams: Annotated[
        int, Field(ge=1, description="Summarization and translation: beams of the search; 1 is greedy.")
    ] = 1
    max_new_tokens: Annotated[
        int, Field(ge=1, description="Summarization and translation: most tokens of a text that is written.")
    ] = 64
    stride: Annotated[
        int | None, Field(ge=1, description="Perplexity: tokens between windows; default: windows do not overlap.")
    ] = None
