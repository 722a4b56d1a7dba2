"""What a method is to recipes: one object with all that a stage, its plan, its run and its report must know of it."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A stage in the making: its model and rows, which parts change one after another.

    Attributes:
        recipe: the whole.
        stage: this stage of it.
        folder: of the run.
        materials: rows and tokenizer of the stage's model.
        model: on ``meta`` in a plan, with weights in a run.
        staged: the materials of earlier stages, and of this one once its vocabulary is known, by name.
        teacher_tokenizer: of its teachers, where it is another than the student's.
        plans: what each part has planned, by its key.
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
    """The same in a plan.

    Attributes:
        models: of earlier stages and of teachers from outside, on ``meta``, by name.
        measure: whether latency tables that targets need may be measured now.
        unknown_ranks: whether the model has ranks that only values tell.
        steps: optimizer steps.
        obstacle: why stock Transformers could not load the result, or None.
        exact: whether the result will have just the planned shapes.
        bytes_estimate: of the weights, where that is not 4 bytes for each parameter.
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
    """The same in a run.

    Attributes:
        console: where lines go.
        train: tokenized training rows, once they are made.
        collate: what makes batches of them.
        masked: outputs of the masked model for the batches of the round-trip check, if the last thing that was done
            is that it was cut.
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
    """A method of compression as recipes see it; a subclass says what is different from nothing.

    Attributes:
        key: field of the stage, and key of the report in ``stage.json`` and ``results.json``.
        schema: ``Annotated[type, Field(description=...)]`` of that field.
        applied: what a checkpoint's provenance calls it.
        reports: whether it leaves a report.
        role: what a model is called that was made by it, without a teacher; of several parts the last one's counts.
        verb: what it does to the model before that is saved, for the line that says so.
        begins: whether its :class:`~lmcompress.method.Method` comes before those of other parts, because it knows
            matrices by the shapes before pruning.
        fitted: what the last step of training fits to the last weights, so that an earlier checkpoint will not do.
        codes: whether the weights that it leaves are codes: no stage can start from them, and an input on the edge of a
            step may be rounded the other way once the model is cut.
    """

    key: ClassVar[str]
    schema: ClassVar[Any]
    applied: ClassVar[str]
    reports: ClassVar[bool] = True
    role: ClassVar[str | None] = None
    verb: ClassVar[str | None] = None
    begins: ClassVar[bool] = False
    fitted: ClassVar[str | None] = None
    codes: ClassVar[bool] = False

    def check(self, stage: Stage, spec: S) -> None:
        """Refuse what does not go with the rest of a stage.

        Args:
            stage: as it was written.
            spec: its field of this part.

        Raises:
            ValueError: If the two do not go together; the message says what to do.
        """

    def prepare(self, spec: S, work: Work) -> Any:
        """Change the model that the stage starts from, before anything is trained: on ``meta`` and with weights alike.

        Args:
            spec: of the stage.
            work: its ``model`` and ``materials`` may be changed or replaced.

        Returns:
            What :meth:`plan` returns, or in a run the report.

        Raises:
            LmcompressError: If the model cannot be changed so.
        """

    def plan(self, spec: S, work: Planning) -> Any:
        """Check all that can be known before training, and leave the model in the shapes that it will have.

        Args:
            spec: of the stage.
            work: with its number of steps; ``model``, ``obstacle``, ``exact`` and ``bytes_estimate`` may be changed.

        Returns:
            What a run needs to know; None where that is nothing.

        Raises:
            LmcompressError: If it cannot be done.
        """

    def words(self, planned: Any) -> list[str]:
        """A plan in sentences, for ``--dry-run``.

        Args:
            planned: of :meth:`prepare` or :meth:`plan`.
        """
        return []

    def method(self, spec: S, work: Running) -> Method | None:
        """What takes part in training; None for a part that only prepares.

        Args:
            spec: of the stage.
            work: with the rows that are trained on.
        """
        return None

    def apply(self, spec: S, work: Running) -> Any:
        """Do it without training, in place.

        Args:
            spec: of the stage.
            work: with the model.

        Returns:
            The report, with ``to_dict()``; None for a part that only prepares.
        """

    def notes(self, report: Any) -> list[str]:
        """What a reader of the table must know of how the model was made.

        Args:
            report: what the part did, as JSON types.
        """
        return []

    def columns(self, report: Any) -> dict[str, str]:
        """Cells of the model's row in the table of results, by the title of the column.

        Args:
            report: what the part did, as JSON types.
        """
        return {}


def seeded(config: C, seed: int) -> C:
    """A stage's configuration with the recipe's seed, unless it has its own.

    Args:
        config: with a field ``seed``.
        seed: of the recipe.
    """
    return config if "seed" in config.model_fields_set else config.model_copy(update={"seed": seed})


def needs_training(stage: Stage, method: Any) -> None:
    """Refuse a schedule that needs training in a stage without.

    Args:
        stage: any.
        method: configuration with ``trains`` and ``schedule``.

    Raises:
        ValueError: If the stage takes no steps and the schedule needs some.
    """
    if method.trains and not stage.trains:
        raise ValueError(
            f"the schedule {method.schedule.kind} needs training, got max_steps: 0; choose one_shot or iterative, or "
            "train some steps"
        )
