"""Vocabulary pruning in recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from datasets import Dataset
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.data import Task, TaskKind
from lmcompress.errors import LmcompressError
from lmcompress.pruning.vocabulary.embeddings import prune_vocabulary
from lmcompress.pruning.vocabulary.report import VocabularyReport
from lmcompress.pruning.vocabulary.unseen import unseen_rows
from lmcompress.recipes.materials import Materials
from lmcompress.recipes.parts.base import Planning, StagePart, Work
from lmcompress.recipes.specs import SchemaPart


class VocabularySpec(SchemaPart):
    """Embeddings of tokens that the task never reads are removed, and the tokenizer is rewritten to match."""

    min_count: Annotated[int, Field(ge=1, description="Minimum number of occurrences of a token that is kept.")] = 1
    max_size: Annotated[int | None, Field(ge=1, description="Maximum number of tokens, the most frequent.")] = None
    keep: Annotated[
        tuple[str, ...], Field(description="Tokens to keep in any case, in the tokenizer's spelling: ##ing, Ġcat.")
    ] = ()
    keep_characters: Annotated[
        bool, Field(description="Whether to keep all single characters, so that unseen words can be spelled.")
    ] = True
    splits: Annotated[
        tuple[str, ...], Field(min_length=1, description="Splits of the task whose texts are counted.")
    ] = ("train",)


class VocabularyPart(StagePart[VocabularySpec]):
    """Embeddings of tokens that the task does not use are removed before anything else."""

    key = "vocabulary"
    schema = Annotated[
        VocabularySpec | None,
        Field(description="Prune the vocabulary first: for this stage and for those that start from it."),
    ]
    applied = "vocabulary pruning"

    def prepare(self, spec: VocabularySpec, work: Work) -> VocabularyReport:
        tokenizer, report = prune_stage_vocabulary(work.model, work.materials, spec)
        work.materials = work.materials.with_tokenizer(tokenizer)
        return report

    def reads(self, spec: VocabularySpec) -> tuple[str, ...]:
        return spec.splits

    def cautions(self, spec: VocabularySpec, work: Planning) -> list[str]:
        planned: VocabularyReport = work.plans[self.key]
        return [
            f"{work.stage.name}: {found.changed:,} of {found.rows:,} {split} rows ({found.changed / found.rows:.1%}) "
            f"are split into other tokens by the smaller vocabulary, {found.unknown:,} of them with unknown ones; it "
            f"was chosen from {', '.join(spec.splits)} (vocabulary.splits, min_count)"
            for split, found in planned.unseen.items()
            if found.changed
        ]

    def words(self, planned: VocabularyReport) -> list[str]:
        return [
            f"vocabulary {planned.rows_before:,} → {planned.rows_after:,} tokens, "
            f"{planned.bytes_saved / 1e6:.1f} MB less; {planned.texts_changed:,} of {planned.texts:,} texts are split "
            "differently",
            *(
                f"{found.changed:,} of {found.rows:,} {split} rows are split differently, {found.unknown:,} with more "
                "unknown tokens"
                for split, found in planned.unseen.items()
            ),
        ]


def prune_stage_vocabulary(
    model: PreTrainedModel, materials: Materials, spec: VocabularySpec
) -> tuple[PreTrainedTokenizerBase, VocabularyReport]:
    """Reduce a model's vocabulary to the tokens that the task's texts use.

    Args:
        model: modified in place; on ``meta`` only its shapes are.
        materials: with the model's current tokenizer.
        spec: the stage's field of this part.

    Returns:
        The new tokenizer, and the report.

    Raises:
        LmcompressError: If a split does not exist, or
            :func:`~lmcompress.pruning.vocabulary.embeddings.prune_vocabulary` refuses.
    """
    if materials.task.chat:
        raise LmcompressError(
            "vocabulary is chosen from texts, the rows are conversations (chat): prune it in a recipe whose task is "
            "their texts"
        )
    splits = materials.corpus.splits()
    for name in spec.splits:
        if name not in splits:
            raise LmcompressError(f"vocabulary.splits names {name!r}; {materials.task.name} has: {', '.join(splits)}")
    texts = [text for name in spec.splits for column in _columns(splits[name], materials.task) for text in column]
    tokenizer, report = prune_vocabulary(
        model,
        materials.tokenizer,
        texts,
        min_count=spec.min_count,
        keep=spec.keep,
        max_size=spec.max_size,
        keep_characters=spec.keep_characters,
    )
    others = {name: rows for name, rows in splits.items() if name not in spec.splits and rows.num_rows}
    unseen = {
        name: unseen_rows(materials.tokenizer, tokenizer, report.old_ids, _columns(rows, materials.task))
        for name, rows in others.items()
    }
    return tokenizer, replace(report, unseen=unseen)


def _columns(rows: Dataset, task: Task) -> list[list[str]]:
    """The texts of all rows, a list for each column."""
    words = task.kind is TaskKind.TOKEN_CLASSIFICATION
    return [[" ".join(text) if words else text for text in rows[column]] for column in task.text_columns]
