"""The schema of a recipe: one model, one task, a few stages, all validated before anything runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lmcompress.errors import LmcompressError, nearest
from lmcompress.export import ExportConfig
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.parts.base import StagePart
from lmcompress.recipes.specs import (
    BASE_MODEL,
    Augmentation,
    EvaluationSpec,
    FromScratch,
    SchemaPart,
    TaskSpec,
)
from lmcompress.recipes.training import Training

CONTROL_SUFFIX = "-control"

EXPORTS = "exports"
"""Folder of a run that holds the exports of its stages."""

_RESERVED = (BASE_MODEL, "checkpoints", EXPORTS, "plots", "stores")

_SUFFIXES = (".json", ".yaml", ".md", ".html")
"""Of the files that a run writes beside its stages."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Stage(SchemaPart):
    """One training run: the model it starts from, the methods applied to it, and its training.

    Besides those below it has a field for each of :data:`~lmcompress.recipes.parts.PARTS`.
    """

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    name: Annotated[str, Field(description="Name of the stage and its folder: letters, digits, . _ -")]
    start: Annotated[str, Field(description="Name of an earlier stage, or model: the recipe's own.")] = BASE_MODEL
    training: Annotated[
        Training, Field(description="Fields of transformers.TrainingArguments; max_steps: 0 trains nothing.")
    ] = Training()
    augmentation: Annotated[Augmentation | None, Field(description="Augmentation of the training texts.")] = None
    save: Annotated[
        Literal["native", "vanilla", "self_loading"],
        Field(
            description="Format of the checkpoint: native: loads where lmcompress is installed; vanilla: stock "
            "Transformers loads it; self_loading: trust_remote_code."
        ),
    ] = "native"
    storage: Annotated[
        Literal["plain", "auto", "zstd", "huffman"],
        Field(
            description="auto, zstd and huffman store the weights as bit-exact entropy-coded streams; smaller if "
            "they are pruned, clustered or quantized."
        ),
    ] = "plain"
    export: Annotated[
        tuple[ExportConfig, ...],
        Field(
            max_length=8,
            description="Exports of the model to exports/<stage>/<to>: to: onnx, openvino, compressed-tensors or "
            "gguf, and the options of lmcompress export.",
        ),
    ] = ()
    control: Annotated[
        bool,
        Field(
            description="Whether to also train the same student without a teacher, from the same start, for the same "
            "steps, and compressed in the same way."
        ),
    ] = False

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith((CONTROL_SUFFIX, *_SUFFIXES)):
            raise ValueError(
                f"must be letters, digits, '.', '_' and '-', not one of {', '.join(_RESERVED)}, and not end in "
                f"{', '.join(map(repr, (CONTROL_SUFFIX, *_SUFFIXES)))}, got {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _control_of_a_student(self) -> Stage:
        if self.control and self.distillation is None:
            raise ValueError("control: true needs distillation: it trains the same student without it")
        return self

    @model_validator(mode="after")
    def _replaces_by_a_teacher(self) -> Stage:
        if self.augmentation is not None and self.augmentation.replaces and self.distillation is None:
            raise ValueError(
                "augmentation by replace needs distillation: the words come from the first teacher's embeddings; leave "
                "replace out, or name a teacher"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Stage:
        for part, spec in self.parts():
            part.check(self, spec)
        if not self.trains and self.augmentation is not None:
            raise ValueError("max_steps: 0 trains nothing, so augmentation has no use; leave it out")
        return self

    @model_validator(mode="after")
    def _exports_each_once(self) -> Stage:
        targets = [config.to for config in self.export]
        if again := sorted({to for to in targets if targets.count(to) > 1}):
            raise ValueError(f"export names {', '.join(again)} more than once; each has one folder")
        return self

    @model_validator(mode="after")
    def _streams_are_native(self) -> Stage:
        if self.storage != "plain" and self.save != "native":
            raise ValueError(f"save: {self.save} is not possible with storage: {self.storage}; streams need lmcompress")
        return self

    def parts(self) -> list[tuple[StagePart[Any], Any]]:
        """The methods of the stage, in the order in which they change its model, each with its field."""
        return [(part, spec) for part in PARTS if (spec := getattr(self, part.key)) is not None]

    @property
    def trains(self) -> bool:
        """Whether the stage takes optimizer steps."""
        return self.training.max_steps != 0


class Recipe(SchemaPart):
    """A model, a task, a few stages, and the final measurements."""

    name: Annotated[str, Field(description="Name in reports; also the default folder, runs/<name>.")]
    description: Annotated[str, Field(description="Summary in a sentence or two.")] = ""
    paper: Annotated[str | None, Field(description="Source of the method: authors, year, link.")] = None
    model: Annotated[
        str | FromScratch,
        Field(description="Path or name on the Hub of a pretrained model, or sizes of one with random weights."),
    ]
    task: Annotated[TaskSpec, Field(description="Task of the models, and its data.")]
    stages: Annotated[
        tuple[Stage, ...], Field(min_length=1, max_length=64, description="Stages, in the order in which they run.")
    ]
    evaluation: Annotated[EvaluationSpec, Field(description="What is measured at the end.")] = EvaluationSpec()
    seed: Annotated[
        int, Field(ge=0, lt=1 << 32, description="Seed of weights, order of rows and dropout, in every stage.")
    ] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        Field(
            description="Type of the weights, in training and in the saved models; auto: that of the model's "
            "checkpoint. In 16 bits small steps are lost: for speed choose training.bf16 instead."
        ),
    ] = "float32"
    output: Annotated[str | None, Field(description="Folder of the run; default: runs/<name>.")] = None

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"must be letters, digits, '.', '_' and '-', got {name!r}")
        return name

    @property
    def metrics(self) -> tuple[str, ...] | None:
        """The metrics that were chosen, the main one first; None: those of the task."""
        return self.evaluation.metrics or self.task.metrics

    @model_validator(mode="after")
    def _metrics_once(self) -> Recipe:
        if self.evaluation.metrics and self.task.metrics and self.evaluation.metrics != self.task.metrics:
            raise ValueError("task.metrics and evaluation.metrics say different things: leave one of them out")
        return self

    @model_validator(mode="after")
    def _stages_refer_to_earlier_ones(self) -> Recipe:
        earlier: list[str] = []
        later = {stage.name for stage in self.stages}
        for number, stage in enumerate(self.stages):
            at: tuple[str | int, ...] = ("stages", number)
            if stage.name in earlier:
                raise _misreference(f"two stages are called {stage.name!r}", *at, "name")
            if stage.start not in (BASE_MODEL, *earlier):
                raise _misreference(
                    f"{stage.start!r} is no earlier stage{nearest(stage.start, [BASE_MODEL, *earlier])}", *at, "start"
                )
            for index, teacher in enumerate(stage.distillation.teachers if stage.distillation else ()):
                if teacher in later:
                    message = f"{teacher!r} is no earlier stage: a teacher must be trained before its student"
                    raise _misreference(message, *at, "distillation", "teachers", index)
            earlier.append(stage.name)
            later.discard(stage.name)
        return self


def register_part(part: StagePart[Any]) -> None:
    """Register a method with recipes: :class:`Stage` gets a field for it, and it is applied last.

    Args:
        part: the part, with an unused ``key``.

    Raises:
        LmcompressError: If the stage already has a field of that name.
    """
    if part.key in Stage.model_fields:
        raise LmcompressError(f"a stage has a field {part.key!r} already; give the part another key")
    PARTS.append(part)
    _rebuild()


def unregister_part(key: str) -> None:
    """Unregister a method, such as at the end of a test.

    Args:
        key: key of the part.
    """
    PARTS[:] = [part for part in PARTS if part.key != key]
    del Stage.model_fields[key]
    _rebuild()


def _rebuild() -> None:
    """Give :class:`Stage` a field for each part, between its start and its training."""
    fields = dict(Stage.model_fields)
    methods = {part.key: FieldInfo.from_annotated_attribute(part.schema, None) for part in PARTS}
    head = {name: fields.pop(name) for name in ("name", "start")}
    Stage.model_fields.clear()
    Stage.model_fields.update({**head, **methods, **{name: f for name, f in fields.items() if name not in methods}})
    Stage.model_rebuild(force=True)
    Recipe.model_rebuild(force=True)


def _misreference(message: str, *path: str | int) -> PydanticCustomError:
    return PydanticCustomError("reference", "{message}", {"message": message, "path": path})


def with_controls(recipe: Recipe) -> list[tuple[Stage, Stage | None]]:
    """The stages to run: the recipe's, each followed by its control if it asks for one.

    Args:
        recipe: the recipe as written.

    Returns:
        pairs of a stage and, for a control, the stage it is the control of.
    """
    stages: list[tuple[Stage, Stage | None]] = []
    for stage in recipe.stages:
        stages.append((stage, None))
        if stage.control:
            # the suffix is reserved, so the name is free; model_copy does not validate again
            update = {"name": stage.name + CONTROL_SUFFIX, "distillation": None, "control": False, "export": ()}
            stages.append((stage.model_copy(update=update), stage))
    return stages


_rebuild()
