"""The plan of a recipe: the model each stage will train, checked as far as possible before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from lmcompress.checkpoint.layers import layers_of
from lmcompress.data import TaskKind
from lmcompress.data.augmentation import whole_words
from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation import parameter_count
from lmcompress.model import CompressedModel
from lmcompress.recipes.building import base_model, check_packing, is_stage
from lmcompress.recipes.checks import check_run, check_trained_for, check_vocabulary
from lmcompress.recipes.lengths import fitted_lengths
from lmcompress.recipes.materials import Materials, gather
from lmcompress.recipes.parts.base import Planning
from lmcompress.recipes.schema import Recipe, Stage, with_controls


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        stage: the stage in the recipe; a control's is derived.
        role: teacher of another stage, student, control, what was done to it without a teacher, or a model by itself.
        start: source of its weights.
        teachers: stages or models it learns from.
        shape: blocks, heads and widths in words; expected ones if it is pruned.
        parameters: number of the model's parameters; the expected number if it is pruned.
        bytes_estimate: bytes of its weights, packed if they are quantized, else in float32.
        train_rows: rows or blocks trained on, augmentation included.
        steps: number of optimizer steps.
        vanilla_obstacle: why stock Transformers could not load it, or None.
        plans: plan of each of its methods, by the key of its :class:`~lmcompress.recipes.parts.StagePart`:
            expanded layer maps, expected shapes, quantization of each matrix.
        words: the same in sentences.
        cautions: what its owner should know before it is trained, in sentences.
        materials: the rows with this stage's tokenizer, possibly with a pruned vocabulary.
    """

    stage: Stage
    role: str
    start: str
    teachers: tuple[str, ...]
    shape: str
    parameters: int
    bytes_estimate: int
    train_rows: int
    steps: int
    vanilla_obstacle: str | None
    plans: Mapping[str, Any]
    words: tuple[str, ...]
    cautions: tuple[str, ...]
    materials: Materials


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        recipe: the recipe, its lengths fitted to its models.
        materials: checked rows and tokenizer.
        stages: in order, controls included.
        outside_teachers: external teachers.
        reference: name of the model the others are compared with.
        notes: facts needed to interpret the numbers.
        cautions: those of them that are known before training and worth knowing then.
    """

    recipe: Recipe
    materials: Materials
    stages: tuple[StagePlan, ...]
    outside_teachers: tuple[str, ...]
    reference: str
    notes: tuple[str, ...]
    cautions: tuple[str, ...]

    def materials_of(self, start: str) -> Materials:
        """The rows with the tokenizer of a stage's start.

        Args:
            start: name of a stage, or the recipe's own model.
        """
        return next((entry.materials for entry in self.stages if entry.stage.name == start), self.materials)


def plan(recipe: Recipe, folder: str | Path | None = None, *, measure: bool = False) -> Plan:
    """Check a recipe against its rows and models, and plan its stages. Nothing is trained, no weights are loaded.

    Args:
        recipe: validated recipe.
        folder: folder of the run, which may hold latency tables; default: the recipe's.
        measure: whether to measure missing latency tables that targets need; otherwise their targets are checked
            as far as possible.

    Returns:
        The plan; :func:`~lmcompress.recipes.runner.run` carries it out.

    Raises:
        LmcompressError: If rows, labels, layers, vocabularies, shapes or targets do not fit; the message names the
            stage.
    """
    place = run_folder(recipe, folder)
    gathered = gather(recipe)
    check_run(recipe, place, gathered.task)
    recipe, of_lengths = fitted_lengths(recipe, gathered.tokenizer, gathered.task.kind)
    materials = gathered.of(recipe, of_lengths)
    materials.rows()
    if isinstance(recipe.model, str):
        check_vocabulary(materials, AutoConfig.from_pretrained(recipe.model), recipe.model)
    planner = _Planner(recipe, materials, place, measure)
    plans = [planner.stage(stage, control_of) for stage, control_of in with_controls(recipe)]
    reference = next((t for p in plans for t in p.teachers), plans[0].stage.name)
    notes = [*materials.data.notes, *(note for entry in plans for note in entry.materials.rows().notes)]
    cautions = [caution for entry in plans for caution in entry.cautions]
    notes += cautions
    return Plan(
        recipe,
        materials,
        tuple(plans),
        planner.outside,
        reference,
        tuple(dict.fromkeys(notes)),
        (*of_lengths, *cautions),
    )


def run_folder(recipe: Recipe, folder: str | Path | None = None) -> Path:
    """The folder of a run.

    Args:
        recipe: a recipe, which may name its folder.
        folder: overrides it.
    """
    return Path(folder or recipe.output or f"runs/{recipe.name}")


class _Planner:
    """Iterates over the stages, with the models of earlier ones available, on ``meta``."""

    def __init__(self, recipe: Recipe, materials: Materials, folder: Path, measure: bool) -> None:
        self.recipe, self.materials, self.folder, self.measure = recipe, materials, folder, measure
        distilled = [stage.distillation for stage in recipe.stages if stage.distillation is not None]
        self.used = {teacher for distillation in distilled for teacher in distillation.teachers}
        self.models: dict[str, PreTrainedModel] = {}
        self.staged: dict[str, Materials] = {}
        self.unknown_ranks: set[str] = set()
        self.coded: set[str] = set()

    @property
    def outside(self) -> tuple[str, ...]:
        """External teachers."""
        return tuple(name for name in self.models if name not in self.staged)

    def stage(self, stage: Stage, control_of: Stage | None) -> StagePlan:
        """Check one stage, and store its resulting model.

        Args:
            stage: a stage of the recipe.
            control_of: the stage it is the control of, if any.
        """
        try:
            work = self._begun(stage)
            return self._planned(work, control_of)
        except LmcompressError as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error

    def _begun(self, stage: Stage) -> Planning:
        """The stage with the model that it trains, made from its start."""
        after = is_stage(stage.start)
        path = self.recipe.model
        if not (after or stage.trains) and isinstance(path, str):
            # its head stays as it is, and another one would be made at random
            check_trained_for(AutoConfig.from_pretrained(path), self.materials.task, path)
        if stage.start in self.coded:
            raise LmcompressError(
                f"it starts from {stage.start!r}, whose weights are codes and can be neither trained nor cut: start "
                "from an earlier stage, or do both in one stage"
            )
        work = Planning(
            recipe=self.recipe,
            stage=stage,
            folder=self.folder,
            materials=self.staged[stage.start] if after else self.materials,
            # a copy: a stage that changes no shape must not rename its start
            model=copy.deepcopy(self.models[stage.start]) if after else base_model(self.materials, meta=True),
            staged=self.staged,
            models=self.models,
            measure=self.measure,
            unknown_ranks=stage.start in self.unknown_ranks,
        )
        check_packing(self.recipe.task, work.model)
        name = f"the model of stage {stage.name!r}"
        for part, spec in stage.parts():
            work.plans[part.key] = part.prepare(spec, work)
            # the next part may name the model in a message
            work.model.config.name_or_path = name
        work.model.config.name_or_path = name
        return work

    def _planned(self, work: Planning, control_of: Stage | None) -> StagePlan:
        stage, materials = work.stage, work.materials
        if stage.augmentation is not None and materials.task.kind is TaskKind.QUESTION_ANSWERING:
            raise LmcompressError(
                "augmentation changes the words of a context, in which answers have places; leave it out"
            )
        if stage.augmentation is not None and stage.augmentation.replaces:
            whole_words(work.teacher_tokenizer or materials.tokenizer)
        rows = materials.rows(teacher_tokenizer=work.teacher_tokenizer).train.num_rows
        rows *= 1 + (stage.augmentation.copies if stage.augmentation else 0)
        work.steps = optimizer_steps(stage, rows)
        work.obstacle = CompressedModel(work.model).why_not_vanilla()
        for part, spec in stage.parts():
            if (planned := part.plan(spec, work)) is not None:
                work.plans[part.key] = planned
        self._remember(work)
        _check_format(work)
        shape, parameters = shape_in_words(CompressedModel(work.model)), parameter_count(work.model)
        words = [words for part, _ in stage.parts() for words in part.words(work.plans[part.key])]
        words += [f"exported to {config.to}" for config in stage.export]
        if stage.trains and stage.training.bf16 == "auto":
            bfloat16 = stage.training.computes_in_bfloat16()
            words.append(f"trains in {'bfloat16' if bfloat16 else 'float32'} (bf16: auto, as this machine has it)")
        return StagePlan(
            stage=stage,
            role=self._role(stage, control_of),
            start=_start_name(self.recipe, stage),
            teachers=tuple(stage.distillation.teachers) if stage.distillation else (),
            shape=shape if work.exact else f"about {shape}",
            parameters=parameters,
            bytes_estimate=4 * parameters if work.bytes_estimate is None else work.bytes_estimate,
            train_rows=rows,
            steps=work.steps,
            vanilla_obstacle=work.obstacle,
            plans={key: planned for key, planned in work.plans.items() if planned is not None},
            words=tuple(words),
            cautions=tuple(self._cautions(work)),
            materials=materials,
        )

    def _remember(self, work: Planning) -> None:
        name = work.stage.name
        self.models[name], self.staged[name] = work.model, work.materials
        if work.unknown_ranks and layers_of(work.model):
            self.unknown_ranks.add(name)
        if any(part.codes for part, _ in work.stage.parts()):
            self.coded.add(name)

    def _cautions(self, work: Planning) -> Iterator[str]:
        for part, spec in work.stage.parts():
            yield from part.cautions(spec, work)
        stage = work.stage
        if stage.distillation is None or any(part.shrinks for part, _ in stage.parts()):
            return
        sizes = {name: parameter_count(self.models[name]) for name in stage.distillation.teachers}
        own, smallest = parameter_count(work.model), min(sizes, key=sizes.__getitem__)
        if own >= sizes[smallest]:
            blocks = max(1, len(CompressedModel(work.model).structure.blocks) // 2)
            yield (
                f"{stage.name} is not smaller than its teacher {smallest}: {own:,} parameters against "
                f"{sizes[smallest]:,}, {shape_in_words(CompressedModel(work.model))}. A smaller one, for example: "
                f"stages.{stage.name}.student.layers={blocks}"
            )

    def _role(self, stage: Stage, control_of: Stage | None) -> str:
        if stage.name in self.used:
            return "teacher"
        if control_of:
            return "control"
        if stage.distillation is not None:
            return "student"
        return next((part.role for part, _ in reversed(stage.parts()) if part.role is not None), "model")


def _check_format(work: Planning) -> None:
    save = work.stage.save
    if save != "native" and layers_of(work.model):
        raise LmcompressError(f"{argument('save', save)} is not possible with compact layers; save it as native")
    if save == "vanilla" and work.obstacle:
        raise LmcompressError(
            f"{argument('save', save)} is not possible: {work.obstacle}; save it as native or self_loading"
        )


def shape_in_words(model: CompressedModel) -> str:
    """A model's shape, such as ``"4 blocks of width 256: 4 heads, FFN 1024"``.

    Args:
        model: on any device.
    """
    blocks = model.structure.blocks
    heads, ffn = ([getattr(b, part) for b in blocks] for part in ("heads", "ffn"))
    described = [str(v[0]) if len(set(v)) == 1 else "/".join(map(str, v)) for v in (heads, ffn)]
    many = "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"
    return f"{many} of width {model.anatomy.hidden_size}: {described[0]} heads, FFN {described[1]}"


def optimizer_steps(stage: Stage, rows: int) -> int:
    """The number of optimizer steps of a stage on one device.

    Args:
        stage: a stage of the recipe.
        rows: number of training rows.
    """
    training = stage.training
    if training.max_steps >= 0:
        return training.max_steps
    batches = math.ceil(rows / training.per_device_train_batch_size)
    return math.ceil(training.num_train_epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))


def _start_name(recipe: Recipe, stage: Stage) -> str:
    if is_stage(stage.start):
        return stage.start
    return recipe.model if isinstance(recipe.model, str) else "random weights"
