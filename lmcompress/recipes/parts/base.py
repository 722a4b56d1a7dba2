"""The interface of a method to recipes: one object with its schema, plan, run and report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.method import Method
from lmcompress.recipes.materials import Materials

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Recipe, Stage

S = TypeVar("S")
C = TypeVar("C", bound=BaseModel)


@dataclass
class Work:
    """A stage in progress: its model and rows, which parts change one after another.

    Attributes:
        recipe: the whole recipe.
        stage: this stage of it.
        folder: folder of the run.
        materials: rows and tokenizer of the stage's model.
        model: on ``meta`` in a plan, with weights in a run.
        staged: the materials of earlier stages, and of this one once its vocabulary is known, by name.
        teacher_tokenizer: tokenizer of its teachers, if it differs from the student's.
        plans: plan of each part, by its key.
    """

    recipe: Recipe
    stage: Stage
    folder: Path
    materials: Materials
    model: PreTrainedModel
    staged: Mapping[str, Materials]
    teacher_tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False)
    plans: dict[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass
class Planning(Work):
    """A stage in a plan.

    Attributes:
        models: models of earlier stages and external teachers, on ``meta``, by name.
        measure: whether latency tables that targets need may be measured now.
        unknown_ranks: whether the model has ranks that depend on values.
        steps: number of optimizer steps.
        obstacle: why stock Transformers could not load the result, or None.
        exact: whether the result will have exactly the planned shapes.
        bytes_estimate: bytes of the weights, if that is not 4 bytes for each parameter.
    """

    models: dict[str, PreTrainedModel]
    measure: bool
    unknown_ranks: bool
    steps: int = field(default=0, init=False)
    obstacle: str | None = field(default=None, init=False)
    exact: bool = field(default=True, init=False)
    bytes_estimate: int | None = field(default=None, init=False)


@dataclass
class Running(Work):
    """A stage in a run.

    Attributes:
        console: console for output.
        train: tokenized training rows, once available.
        collate: their collator.
        masked: outputs of the masked model for the batches of the round-trip check, if the last operation was
            a cut.
    """

    console: Console
    train: Any = field(default=None, init=False)
    collate: Any = field(default=None, init=False)
    masked: list[Tensor] = field(default_factory=list, init=False)

    def to_gpu(self) -> None:
        """Move the model to the first GPU, if there is one."""
        if torch.cuda.is_available():
            self.model.to("cuda")


class StagePart(Generic[S]):
    """A compression method as recipes see it; a subclass overrides what differs from a no-op.

    Attributes:
        key: field of the stage, and key of the report in ``stage.json`` and ``results.json``.
        schema: ``Annotated[type, Field(description=...)]`` of that field.
        applied: its name in a checkpoint's provenance.
        reports: whether it leaves a report.
        role: role of a model made by it without a teacher; of several parts the last one's is used.
        verb: its effect on the model before saving, for the line of progress.
        begins: whether its :class:`~lmcompress.method.Method` comes before those of other parts, because it uses the
            shapes of matrices before pruning.
        codes: whether the resulting weights are codes: no stage can start from them, and an input on the edge of a
            step may be rounded the other way once the model is cut.
        shrinks: whether it makes a model smaller while or after it is trained.
    """

    key: ClassVar[str]
    schema: ClassVar[Any]
    applied: ClassVar[str]
    reports: ClassVar[bool] = True
    role: ClassVar[str | None] = None
    verb: ClassVar[str | None] = None
    begins: ClassVar[bool] = False
    codes: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False

    def check(self, stage: Stage, spec: S) -> None:
        """Refuse combinations that do not go together in a stage.

        Args:
            stage: the stage as written.
            spec: its field of this part.

        Raises:
            ValueError: If the two do not go together; the message says what to do.
        """

    def prepare(self, spec: S, work: Work) -> Any:
        """Change the model that the stage starts from, before training: on ``meta`` and with weights alike.

        Args:
            spec: the stage's field of this part.
            work: its ``model`` and ``materials`` may be changed or replaced.

        Returns:
            What :meth:`plan` returns, or in a run the report.

        Raises:
            LmcompressError: If the model cannot be changed that way.
        """

    def plan(self, spec: S, work: Planning) -> Any:
        """Check everything known before training, and leave the model in its resulting shapes.

        Args:
            spec: the stage's field of this part.
            work: with its number of steps; ``model``, ``obstacle``, ``exact`` and ``bytes_estimate`` may be changed.

        Returns:
            Data for the run, or None.

        Raises:
            LmcompressError: If it cannot be done.
        """

    def reads(self, spec: S) -> Collection[str]:
        """Names of the splits whose rows decide what the model becomes, beside ``train``.

        Args:
            spec: the stage's field of this part.
        """
        return ()

    def contents(self, spec: S, planned: Any) -> dict[str, str | None]:
        """Digests of what the model depends on outside the recipe, its rows and its models, by what they are of.

        Args:
            spec: the stage's field of this part.
            planned: result of :meth:`prepare` or :meth:`plan`.
        """
        return {}

    def cautions(self, spec: S, work: Planning) -> Iterable[str]:
        """What its owner should know before the stage is trained, in sentences; also notes of the report.

        Args:
            spec: the stage's field of this part.
            work: with the results of :meth:`prepare` and :meth:`plan`.
        """
        return ()

    def words(self, planned: Any) -> list[str]:
        """A plan in sentences, for ``--dry-run``.

        Args:
            planned: result of :meth:`prepare` or :meth:`plan`.
        """
        return []

    def method(self, spec: S, work: Running) -> Method | None:
        """The method for training; None for a part that only prepares.

        Args:
            spec: the stage's field of this part.
            work: with the training rows.
        """
        return None

    def apply(self, spec: S, work: Running) -> Any:
        """Apply it without training, in place.

        Args:
            spec: the stage's field of this part.
            work: with the model.

        Returns:
            The report, with ``to_dict()``; None for a part that only prepares.
        """

    def notes(self, report: Any) -> list[str]:
        """Notes on how the model was made, for readers of the table.

        Args:
            report: report of the part, as JSON types.
        """
        return []

    def columns(self, report: Any) -> dict[str, str]:
        """Cells of the model's row in the table of results, by the title of the column.

        Args:
            report: report of the part, as JSON types.
        """
        return {}


def seeded(config: C, seed: int) -> C:
    """A stage's configuration with the recipe's seed, unless it has its own.

    Args:
        config: a configuration with a field ``seed``.
        seed: seed of the recipe.
    """
    return config if "seed" in config.model_fields_set else config.model_copy(update={"seed": seed})


def needs_training(stage: Stage, method: Any) -> None:
    """Refuse a schedule that needs training in a stage without.

    Args:
        stage: any stage.
        method: configuration with ``trains`` and ``schedule``.

    Raises:
        ValueError: If the stage takes no steps and the schedule needs some.
    """
    if method.trains and not stage.trains:
        raise ValueError(
            f"the schedule {method.schedule.kind} needs training, got max_steps: 0; choose one_shot or iterative, or "
            "train some steps"
        )
