"""What a recipe says beside its stages' methods: the model, the task, augmentation, and what is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmcompress.data import TaskKind
from lmcompress.errors import nearest
from lmcompress.families import FAMILIES

BASE_MODEL = "model"
"""What a stage's ``start`` is called when it is the recipe's own model."""


class SchemaPart(BaseModel):
    """A mapping of a recipe: unknown keys are refused, and nothing is changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenizerSpec(SchemaPart):
    """A small tokenizer, trained on the training texts."""

    kind: Annotated[
        Literal["wordpiece", "bytelevel_bpe"],
        Field(description="wordpiece: lower-casing, as BERT's; bytelevel_bpe: as GPT-2's."),
    ]
    vocab_size: Annotated[int, Field(ge=16, le=1 << 20, description="The most entries, special tokens included.")]


class FromScratch(SchemaPart):
    """A model with random weights, for runs that start from nothing."""

    family: Annotated[str, Field(description="Model family: bert, roberta, distilbert, electra or gpt2.")]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 16, description="Width of the hidden states.")]
    layers: Annotated[int, Field(ge=1, le=256, description="Number of Transformer blocks.")]
    num_heads: Annotated[
        int, Field(ge=1, le=256, description="Attention heads of each block; must divide hidden_size.")
    ]
    intermediate_size: Annotated[
        int | None,
        Field(ge=1, le=1 << 18, description="Width of the feed-forward networks; default: four times hidden_size."),
    ] = None
    positions: Annotated[int, Field(ge=2, le=1 << 20, description="The longest input, in tokens.")] = 512
    tokenizer: Annotated[TokenizerSpec, Field(description="The tokenizer that is trained for it.")]
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
    """What the models are trained for, and where the rows are."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            description="glue/<task>, embedded/<name>, a folder or file, a Hub data set (owner/name:configuration), "
            "or, with data, a name of your own.",
        ),
    ]
    data: Annotated[
        str | None, Field(description="Folder or file with the rows; for GLUE the folder that holds glue/<task>/.")
    ] = None
    text_columns: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, max_length=2, description="One column or two; default: the usual names."),
    ] = None
    label_column: Annotated[str | None, Field(description="Default: the usual names are looked for.")] = None
    kind: Annotated[TaskKind | None, Field(description="Default: the labels' type tells.")] = None
    splits: Annotated[
        dict[str, str] | None, Field(description="train, validation, test: what the source calls them.")
    ] = None
    max_length: Annotated[
        int, Field(ge=2, description="Tokens of a row; longer texts are cut. For causal_lm the size of a packed block.")
    ] = 128
    limit: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of rows of each split, to try things out; for causal_lm, of packed blocks.",
        ),
    ] = None


class Augmentation(SchemaPart):
    """New training texts made from the old ones; the teacher says what they mean."""

    operations: Annotated[
        tuple[Literal["mask", "delete", "replace", "n_gram", "short_disorder", "long_disorder"], ...],
        Field(
            min_length=1,
            description="One is drawn for each new text. replace: by words that the first teacher's embeddings have "
            "near, so it needs distillation.",
        ),
    ]
    copies: Annotated[int, Field(ge=1, le=100, description="New rows for each row.")] = 1
    probability: Annotated[
        float | None, Field(ge=0, le=1, description="Of each word to be changed; default: that of the operation.")
    ] = None

    @property
    def replaces(self) -> bool:
        """Whether words give way to near ones."""
        return "replace" in self.operations


class EvaluationSpec(SchemaPart):
    """What is measured at the end, for all stages alike."""

    splits: Annotated[
        tuple[str, ...], Field(min_length=1, description="Splits that quality is measured on, the main one first.")
    ] = ("validation",)
    metrics: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, description="Metrics of quality, the main one first; default: those of the task."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="Rows of a batch when quality is measured.")] = 64
    latency_batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...],
        Field(description="Batch sizes that latency is measured at; empty: it is not measured."),
    ] = (1, 32)
    sequence_length: Annotated[
        int | None,
        Field(
            ge=1, description="Tokens of a row when latency is measured; default: the task's max_length, at most 128."
        ),
    ] = None
    repeats: Annotated[int, Field(ge=3, description="Timed calls of each model.")] = 20
    stride: Annotated[
        int | None, Field(ge=1, description="Perplexity: tokens between windows; default: windows do not overlap.")
    ] = None
