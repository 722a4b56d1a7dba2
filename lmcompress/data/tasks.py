"""A task, and a task with its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from datasets import Dataset

from lmcompress.errors import LmcompressError, nearest


class TaskKind(str, Enum):
    """The prediction target: one class, a number, several classes, a class per word, a span, the next token, or a
    text."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    MULTI_LABEL = "multi_label"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"
    CAUSAL_LM = "causal_lm"
    SUMMARIZATION = "summarization"
    TRANSLATION = "translation"

    def __str__(self) -> str:
        return self.value

    @property
    def per_token(self) -> bool:
        """Whether the head has one output for each token."""
        return self in (TaskKind.TOKEN_CLASSIFICATION, TaskKind.QUESTION_ANSWERING, TaskKind.CAUSAL_LM)

    @property
    def generates(self) -> bool:
        """Whether the target is a text that an encoder–decoder writes."""
        return self in (TaskKind.SUMMARIZATION, TaskKind.TRANSLATION)


PROBLEM_TYPES: Mapping[TaskKind, str] = {
    TaskKind.CLASSIFICATION: "single_label_classification",
    TaskKind.REGRESSION: "regression",
    TaskKind.MULTI_LABEL: "multi_label_classification",
}
"""``problem_type`` of a Transformers config, for the kinds that have one."""

_AUTO_CLASSES: Mapping[str, str] = {
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_lm": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
}


def auto_class_name(kind: str) -> str:
    """The import name of the ``AutoModelFor...`` class of a kind of task.

    Args:
        kind: value of a :class:`TaskKind`.

    Example:
        >>> auto_class_name("translation")
        'AutoModelForSeq2SeqLM'
    """
    return _AUTO_CLASSES.get(kind, "AutoModelForSequenceClassification")


DEFAULT_METRICS: Mapping[TaskKind, tuple[str, ...]] = {
    TaskKind.CLASSIFICATION: ("accuracy",),
    TaskKind.REGRESSION: ("pearson", "spearmanr"),
    TaskKind.MULTI_LABEL: ("f1_micro",),
    TaskKind.TOKEN_CLASSIFICATION: ("accuracy",),
    TaskKind.QUESTION_ANSWERING: ("f1", "exact_match"),
    TaskKind.CAUSAL_LM: ("perplexity",),
    TaskKind.SUMMARIZATION: ("rouge1", "rouge2", "rougeL"),
    TaskKind.TRANSLATION: ("bleu", "chrf"),
}
"""Default metrics of each kind."""

_TEXT_COLUMNS: Mapping[TaskKind, tuple[int, ...]] = {
    TaskKind.TOKEN_CLASSIFICATION: (1,),
    TaskKind.QUESTION_ANSWERING: (2,),
    TaskKind.CAUSAL_LM: (1,),
    TaskKind.SUMMARIZATION: (1,),
    TaskKind.TRANSLATION: (1,),
}


def task_kind(name: str) -> TaskKind:
    """The kind with this name.

    Args:
        name: one of the values of :class:`TaskKind`.

    Returns:
        the kind.

    Raises:
        LmcompressError: If the kind does not exist.

    Example:
        >>> str(task_kind("regression"))
        'regression'
    """
    try:
        return TaskKind(name)
    except ValueError:
        raise LmcompressError(f"unknown kind of task {str(name)!r}{nearest(str(name), map(str, TaskKind))}") from None


@dataclass(frozen=True)
class Task:
    """A task for a model: its input columns, its target, and its metrics.

    Attributes:
        name: name in reports, and key of the task in multi-task training.
        kind: kind of target; a string is converted to a :class:`TaskKind`.
        text_columns: one text, or two for a pair. For ``token_classification``, one column of lists of words; for
            ``question_answering``, question and context.
        label_column: None for ``causal_lm`` only; of ``summarization`` and ``translation``, the texts to write.
        label_names: the name of class ``i`` at ``i``; None for kinds whose labels are no classes.
        metrics: names of metrics, the main one first; empty means the defaults of the kind.
        chat: whether the text column holds conversations, of which only the assistant's answers are predicted; for
            ``causal_lm`` only.

    Raises:
        LmcompressError: If the fields do not fit together.

    Example:
        >>> task = Task("tone", "classification", ("text",), "label", ("bad", "good"))
        >>> task.num_labels, task.problem_type, task.metrics
        (2, 'single_label_classification', ('accuracy',))
    """

    name: str
    kind: TaskKind
    text_columns: tuple[str, ...]
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        kind = task_kind(self.kind)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "metrics", tuple(self.metrics) or DEFAULT_METRICS[kind])
        counts = _TEXT_COLUMNS.get(kind, (1, 2))
        if len(self.text_columns) not in counts:
            wanted = " or ".join(map(str, counts))
            raise LmcompressError(f"a {kind} task must have {wanted} text columns, got {list(self.text_columns)}")
        if (self.label_column is None) != (kind is TaskKind.CAUSAL_LM):
            raise LmcompressError(
                f"label_column must be {'None' if kind is TaskKind.CAUSAL_LM else 'named'} for a {kind} task, "
                f"got {self.label_column!r}"
            )
        if self.chat and kind is not TaskKind.CAUSAL_LM:
            raise LmcompressError(f"chat is for the kind {TaskKind.CAUSAL_LM}, got {kind}")
        without = (TaskKind.REGRESSION, TaskKind.QUESTION_ANSWERING, TaskKind.CAUSAL_LM)
        names_needed = kind not in without and not kind.generates
        if (self.label_names is not None) != names_needed:
            raise LmcompressError(
                f"label_names must be {'given' if names_needed else 'None'} for a {kind} task, got {self.label_names}"
            )
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise LmcompressError(f"label_names must differ from one another, got {list(self.label_names)}")

    @property
    def num_labels(self) -> int:
        """Width of the model's head: 1 for ``regression``, 2 for ``question_answering`` (start and end), 0 for
        ``causal_lm`` and kinds whose target is a text, else the number of classes."""
        if self.kind in (TaskKind.REGRESSION, TaskKind.QUESTION_ANSWERING):
            return 1 if self.kind is TaskKind.REGRESSION else 2
        return len(self.label_names or ())

    @property
    def problem_type(self) -> str | None:
        """``problem_type`` for a Transformers config, None for the kinds that have one output for each token."""
        return PROBLEM_TYPES.get(self.kind)

    @property
    def id2label(self) -> dict[int, str]:
        """Class index to name, for a Transformers config; empty if there are no classes."""
        return dict(enumerate(self.label_names or ()))

    @property
    def label2id(self) -> dict[str, int]:
        """Class name to index."""
        return {name: index for index, name in self.id2label.items()}


@dataclass(frozen=True)
class TaskData:
    """A task and its rows, checked: texts are strings, labels are numbers in range.

    Attributes:
        task: the task.
        train: training rows; empty for a task that is only evaluated (GLUE's AX).
        validation: rows for model selection.
        test: rows for the final measurement; may lack labels, as ``notes`` then states.
        extra_validations: further validation sets by name, such as ``validation_mismatched``.
        notes: facts needed to interpret the numbers: subsets, rows held out, truncated texts.
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    extra_validations: Mapping[str, Dataset] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def splits(self) -> dict[str, Dataset]:
        """All splits by name: ``train``, ``validation``, then ``test`` if there is one, then the extra ones."""
        named = {"train": self.train, "validation": self.validation}
        if self.test is not None:
            named["test"] = self.test
        return {**named, **self.extra_validations}

    def map_splits(self, function: Callable[[str, Dataset], Dataset]) -> TaskData:
        """The same task with every split replaced by ``function(name, split)``."""
        changed = {name: function(name, split) for name, split in self.splits().items()}
        return replace(
            self,
            train=changed.pop("train"),
            validation=changed.pop("validation"),
            test=changed.pop("test", None),
            extra_validations=changed,
        )
