"""The rows of a recipe's task and its tokenizer, shared by all stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmcompress.data import (
    Collator,
    Operation,
    Task,
    TaskData,
    TaskKind,
    Windows,
    augment,
    collator,
    delete_tokens,
    load_task,
    long_disorder,
    mask_tokens,
    n_gram_sample,
    replace_tokens,
    short_disorder,
    tokenize,
    train_tokenizer,
    windows,
)
from lmcompress.data.loading import limit_rows
from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.recipes.class_weights import class_weights
from lmcompress.recipes.lookup import found
from lmcompress.recipes.metrics import with_metrics
from lmcompress.recipes.specs import Augmentation, FromScratch, TaskSpec

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Recipe

_OPERATIONS: dict[str, Callable[..., list[str]]] = {
    "mask": mask_tokens,
    "delete": delete_tokens,
    "replace": replace_tokens,
    "n_gram": n_gram_sample,
    "short_disorder": short_disorder,
    "long_disorder": long_disorder,
}


@dataclass
class Materials:
    """The data shared by all stages of a run.

    Attributes:
        recipe: the recipe.
        data: the task's rows, untokenized.
        tokenizer: tokenizer of the recipe's model and all its students.
        corpus: the same rows without the task's limit: what a vocabulary is chosen from.
    """

    recipe: Recipe
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    corpus: TaskData
    _tokenized: dict[str, TaskData] = field(default_factory=dict)
    _windows: dict[str, Windows] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task."""
        return self.data.task

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Materials:
        """The same rows for models with another tokenizer.

        Args:
            tokenizer: a tokenizer such as one with a pruned vocabulary.
        """
        return Materials(self.recipe, self.data, tokenizer, self.corpus)

    def of(self, recipe: Recipe, notes: Sequence[str] = ()) -> Materials:
        """The same rows for another recipe.

        Args:
            recipe: with the same model and task, possibly of another length.
            notes: further notes for readers of the numbers.
        """
        return Materials(recipe, replace(self.data, notes=(*self.data.notes, *notes)), self.tokenizer, self.corpus)

    def rows(
        self,
        augmentation: Augmentation | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        neighbours: Mapping[str, Sequence[str]] | None = None,
    ) -> TaskData:
        """The rows as model inputs.

        Args:
            augmentation: augmentation of the training texts.
            teacher_tokenizer: its inputs are added if it differs from the student's.
            neighbours: similar words, for ``replace``.
        """
        # a tokenizer with a pruned vocabulary keeps its name
        other = None if teacher_tokenizer is None else (teacher_tokenizer.name_or_path, len(teacher_tokenizer))
        words = None if neighbours is None else hash(tuple((word, *near) for word, near in neighbours.items()))
        key = repr((augmentation, other, words))
        if key not in self._tokenized:
            data = self.data
            if augmentation is not None:
                data = _augmented(data, augmentation, neighbours, self.recipe.seed)
            spec = self.recipe.task
            with _progress_bars_of_datasets_off():
                tokenized = tokenize(
                    data,
                    self.tokenizer,
                    max_length=spec.max_length,
                    overlap=spec.overlap,
                    teacher_tokenizer=teacher_tokenizer,
                    packing=spec.packing,
                )
            # of a text's blocks the first ones, which perplexity is measured on as well; rows are limited before
            blocks = in_blocks(self.task)
            self._tokenized[key] = limit_rows(tokenized, self.recipe.task.limit, first=True) if blocks else tokenized
        return self._tokenized[key]

    def windows(self, split: str) -> Windows:
        """The windows of a split of question answering.

        Args:
            split: name of the split.
        """
        if split not in self._windows:
            spec, rows = self.recipe.task, self.data.splits()[split]
            self._windows[split] = windows(
                self.task, rows, self.tokenizer, max_length=spec.max_length, overlap=spec.overlap
            )
        return self._windows[split]

    def collator(self, teacher_tokenizer: PreTrainedTokenizerBase | None = None) -> Collator:
        """The collator of :meth:`rows`.

        Args:
            teacher_tokenizer: as for :meth:`rows`.
        """
        return collator(self.task, self.tokenizer, teacher_tokenizer)


def gather(recipe: Recipe) -> Materials:
    """Load and check the rows, and load or train the tokenizer.

    Args:
        recipe: any recipe.

    Raises:
        LmcompressError: If rows, columns, labels or class weights do not match the recipe, or the tokenizer does not
            exist.
    """
    with _progress_bars_of_datasets_off():
        corpus = with_metrics(read_task(recipe.task), recipe.metrics)
    data = limited(corpus, recipe.task)
    if not data.train.num_rows:
        raise LmcompressError(f"{data.task.name} has no rows to train on; {'; '.join(data.notes)}")
    for split in recipe.evaluation.splits:
        check_split(data, split)
    class_weights(data, recipe.task.class_weights)
    return Materials(recipe, data, _tokenizer(recipe.model, corpus), corpus)


def read_task(task: TaskSpec, data: Any = None) -> TaskData:
    """All rows that a recipe's task names, checked; without its limit.

    Args:
        task: task of the recipe.
        data: rows to use instead.
    """
    return load_task(
        task.name,
        data=task.data if data is None else data,
        text_columns=task.text_columns,
        label_column=task.label_column,
        kind=None if task.kind is None else task.kind.value,
        splits=task.splits,
        chat=task.chat,
    )


def limited(data: TaskData, task: TaskSpec) -> TaskData:
    """The rows that a run uses; all texts for a language model, which is limited in blocks.

    Args:
        data: from :func:`read_task`.
        task: with its limit.
    """
    return data if in_blocks(data.task) else limit_rows(data, task.limit)


def in_blocks(task: Task) -> bool:
    """Whether the rows of a task are blocks of running text.

    Args:
        task: any task.
    """
    return task.kind is TaskKind.CAUSAL_LM and not task.chat


def check_split(data: TaskData, split: str) -> None:
    """Refuse a split that quality cannot be measured on.

    Args:
        data: data of the task.
        split: name of the split.

    Raises:
        LmcompressError: If the split does not exist, or has no labels.
    """
    where = argument("evaluation.splits")
    if split not in data.splits():
        raise LmcompressError(f"{where}: no split {split!r} in {data.task.name}{nearest(split, data.splits())}")
    label = data.task.label_column
    if label is not None and label not in data.splits()[split].column_names:
        raise LmcompressError(
            f"{where}: split {split!r} of {data.task.name} has no labels: it can be predicted, not scored"
        )


def load_tokenizer(path: str | Path, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model.

    Args:
        path: folder, or name on the Hub.
        task: determines whether words need a space before them.

    Raises:
        LmcompressError: If there is none, or only one of special tokens.
    """
    words = {"add_prefix_space": True} if task.kind is TaskKind.TOKEN_CLASSIFICATION else {}
    with found(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **words)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # what Transformers makes where no file of one is there: every word is unknown to it
        raise LmcompressError(f"{path} holds no tokenizer; save that of the model there (tokenizer.save_pretrained)")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_of(data: TaskData, split: str) -> str:
    """A split of a causal task as one text, for perplexity.

    Args:
        data: untokenized.
        split: name of the split.
    """
    return "\n\n".join(data.splits()[split][data.task.text_columns[0]])


def gate_batches(materials: Materials, *, count: int = 2, rows: int = 8) -> list[Any]:
    """Real inputs for the round-trip check: the first validation rows.

    Args:
        materials: materials of the run.
        count: number of batches.
        rows: rows per batch.
    """
    data = materials.rows().validation
    together = materials.collator()
    spans = [range(i * rows, min((i + 1) * rows, data.num_rows)) for i in range(count)]
    return [together([data[i] for i in span]) for span in spans if len(span)]


def drawn_batches(materials: Materials, rows: int, batch_size: int, seed: int) -> list[Any]:
    """Batches of training rows, sampled in the same way as by the trainer's methods.

    Args:
        materials: materials of the stage.
        rows: number of rows; all if there are fewer.
        batch_size: rows of one batch.
        seed: seed of the choice.

    Returns:
        Batches on the CPU.
    """
    data, collate = materials.rows().train, materials.collator()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(data.num_rows, generator=generator)[:rows].tolist()
    spans = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return [collate([data[i] for i in span]) for span in spans]


def _tokenizer(model: str | FromScratch, data: TaskData) -> PreTrainedTokenizerBase:
    if isinstance(model, str):
        return load_tokenizer(model, data.task)
    if data.task.chat:
        raise LmcompressError(
            f"{argument('task.chat', 'True')} needs a pretrained model whose tokenizer has a chat template, got a "
            "model from scratch"
        )
    texts = (text for column in data.task.text_columns for text in data.train[column])
    if data.task.kind is TaskKind.TOKEN_CLASSIFICATION:
        texts = (" ".join(words) for words in texts)
    tokenizer = train_tokenizer(texts, kind=model.tokenizer.kind, vocab_size=model.tokenizer.vocab_size)
    tokenizer.model_max_length = model.positions
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _augmented(
    data: TaskData, augmentation: Augmentation, neighbours: Mapping[str, Sequence[str]] | None, seed: int
) -> TaskData:
    if data.task.chat:
        raise LmcompressError("augmentation changes texts, the rows are conversations (chat); leave it out")
    operations: list[Operation] = []
    for name in augmentation.operations:
        given: dict[str, Any] = {"neighbours": neighbours} if name == "replace" else {}
        if augmentation.probability is not None and name != "n_gram":
            given["p"] = augmentation.probability
        operations.append(partial(_OPERATIONS[name], **given))
    rows = augment(data.train, data.task.text_columns, operations, copies=augmentation.copies, seed=seed)
    return replace(data, train=rows)


@contextmanager
def _progress_bars_of_datasets_off() -> Iterator[None]:
    was_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
