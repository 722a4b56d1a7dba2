"""The plan of a recipe: what each stage will train, checked against everything that can be known before training."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import layers_of
from lmcompress.data.augmentation import whole_words
from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher, Match
from lmcompress.distillation.layer_maps import given, last, skip, uniform
from lmcompress.distillation.matches import match_for
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import parameter_count
from lmcompress.families import anatomy_of
from lmcompress.model import CompressedModel
from lmcompress.pruning.vocabulary.embeddings import VocabularyReport
from lmcompress.recipes.building import (
    Materials,
    base_model,
    different_tokenizer,
    gather,
    is_stage,
    make_student,
    teacher_skeleton,
)
from lmcompress.recipes.checks import check_run
from lmcompress.recipes.compact import CompactPlan, plan_compact
from lmcompress.recipes.pruning import PruningPlan, expected_model, plan_pruning, prune_stage_vocabulary
from lmcompress.recipes.quantization import NO_VANILLA, QuantizationPlan, plan_quantization
from lmcompress.recipes.schema import LayerLoss, Recipe, Stage, StageDistillation, with_controls
from lmcompress.recipes.weights import check_weights

Role = Literal["teacher", "student", "control", "pruned", "quantized", "shared", "compact", "model"]


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do.

    Attributes:
        stage: as the recipe has it; a control's is derived.
        role: teacher of another stage, student, control, what was done to it without a teacher, or a model by itself.
        start: what its weights come from.
        teachers: stages or models that it learns from.
        shape: blocks, heads and widths in words; of what is pruned, those to be expected.
        parameters: of the model; of what is pruned, those to be expected.
        bytes_estimate: of its weights, packed where they are quantized, else in float32.
        train_rows: rows or blocks trained on, augmentation included.
        steps: optimizer steps.
        vanilla_obstacle: why stock Transformers could not load it, or None.
        distillation: with its layer maps spelled out; None for plain fine-tuning.
        compact: what is replaced, and what that costs; None if nothing is.
        pruning: its target as shapes; None if nothing is pruned.
        quantization: which matrix gets what; None if nothing is quantized.
        vocabulary: what becomes of the vocabulary; None if it stays.
        materials: the rows as this stage's tokenizer, perhaps with a pruned vocabulary, makes them.
    """

    stage: Stage
    role: Role
    start: str
    teachers: tuple[str, ...]
    shape: str
    parameters: int
    bytes_estimate: int
    train_rows: int
    steps: int
    vanilla_obstacle: str | None
    distillation: DistillationConfig | None
    compact: CompactPlan | None
    pruning: PruningPlan | None
    quantization: QuantizationPlan | None
    vocabulary: VocabularyReport | None
    materials: Materials


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: the recipe.
        materials: rows and tokenizer, as they were checked.
        stages: in order, controls included.
        outside_teachers: teachers that no stage trains.
        reference: name of what the others are compared with in the end.
        notes: what a reader of the numbers must know.
    """

    recipe: Recipe
    materials: Materials
    stages: tuple[StagePlan, ...]
    outside_teachers: tuple[str, ...]
    reference: str
    notes: tuple[str, ...]

    def materials_of(self, start: str) -> Materials:
        """The rows as the tokenizer of a stage's start makes them.

        Args:
            start: name of a stage, or the recipe's own model.
        """
        return next((entry.materials for entry in self.stages if entry.stage.name == start), self.materials)


def plan(recipe: Recipe, folder: str | Path | None = None, *, measure: bool = False) -> Plan:
    """Check a recipe against its rows and models, and say what it will do. Nothing is trained, no weights are loaded.

    Args:
        recipe: validated.
        folder: of the run, where latency tables may lie; default: the recipe's.
        measure: measure the latency tables that targets need and that are not there yet; else their targets are checked
            as far as they can be.

    Returns:
        The plan; :func:`~lmcompress.recipes.runner.run` carries it out.

    Raises:
        LmcompressError: rows, labels, layers, vocabularies, shapes or targets do not fit; the message names the stage.
    """
    place = run_folder(recipe, folder)
    materials = gather(recipe)
    check_run(recipe, place, materials.task)
    materials.rows()
    planner = _Planner(recipe, materials, place, measure)
    plans = [planner.stage(stage, control_of) for stage, control_of in with_controls(recipe)]
    reference = next((t for p in plans for t in p.teachers), plans[0].stage.name)
    notes = [*materials.data.notes, *(note for entry in plans for note in entry.materials.rows().notes)]
    return Plan(recipe, materials, tuple(plans), tuple(planner.outside), reference, tuple(dict.fromkeys(notes)))


def run_folder(recipe: Recipe, folder: str | Path | None = None) -> Path:
    """Where a run goes.

    Args:
        recipe: may name its folder.
        folder: if given, wins.
    """
    return Path(folder or recipe.output or f"runs/{recipe.name}")


class _Planner:
    """Goes through the stages, with the models of those before at hand, on ``meta``."""

    def __init__(self, recipe: Recipe, materials: Materials, folder: Path, measure: bool) -> None:
        self.recipe, self.materials, self.folder, self.measure = recipe, materials, folder, measure
        self.names = {stage.name for stage, _ in with_controls(recipe)}
        distilled = [stage.distillation for stage in recipe.stages if stage.distillation is not None]
        self.used = {teacher for distillation in distilled for teacher in distillation.teachers}
        self.models: dict[str, PreTrainedModel] = {}
        self.staged: dict[str, Materials] = {}
        self.outside: dict[str, PreTrainedModel] = {}
        self.unknown_ranks: set[str] = set()
        self.packed = {stage.name for stage, _ in with_controls(recipe) if stage.quantization is not None}

    def stage(self, stage: Stage, control_of: Stage | None) -> StagePlan:
        """Check one stage, and remember the model it leaves.

        Args:
            stage: of the recipe.
            control_of: the stage it is the control of, if any.
        """
        try:
            return self._checked(stage, control_of)
        except LmcompressError as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error

    def _checked(self, stage: Stage, control_of: Stage | None) -> StagePlan:
        after = is_stage(stage.start)
        if stage.start in self.packed:
            raise LmcompressError(
                f"it starts from {stage.start!r}, whose weights are codes and can be neither trained nor cut: start "
                "from the stage before, or do both in one stage"
            )
        materials = self.staged[stage.start] if after else self.materials
        # a copy: a stage that changes no shape must not rename its start
        start = copy.deepcopy(self.models[stage.start]) if after else base_model(materials, meta=True)
        vocabulary = None
        if stage.vocabulary is not None:
            tokenizer, vocabulary = prune_stage_vocabulary(start, materials, stage.vocabulary)
            materials = materials.with_tokenizer(tokenizer)
        self.staged[stage.name] = materials
        model = make_student(start, stage.student, self.recipe.seed)
        model.config.name_or_path = f"the model of stage {stage.name!r}"
        compact = self._compact(stage, model)
        teachers = list(stage.distillation.teachers) if stage.distillation else []
        for name in teachers:
            if name not in self.names and name not in self.outside:
                self.outside[name] = teacher_skeleton(name, self.materials.task)
        teacher_tokenizer = different_tokenizer(stage, self.staged, materials)
        if stage.augmentation is not None and stage.augmentation.replaces:
            whole_words(teacher_tokenizer or materials.tokenizer)
        config = self._distillation(stage, model, teachers)
        rows = materials.rows(teacher_tokenizer=teacher_tokenizer).train.num_rows
        rows *= 1 + (stage.augmentation.copies if stage.augmentation else 0)
        steps = optimizer_steps(stage, rows)
        pruning, obstacle = None, CompressedModel(model).why_not_vanilla()
        if stage.pruning is not None:
            pruning = plan_pruning(stage.pruning, model, materials, steps, folder=self.folder, measure=self.measure)
            obstacle = pruning.obstacle
            if pruning.expected is not None:
                model = expected_model(model, pruning.expected)
        check_weights(stage, model, self.materials.task, steps)
        quantization = None
        if stage.quantization is not None:
            trains, prunes = stage.trains, stage.pruning is not None
            quantization = plan_quantization(stage.quantization, model, self.recipe.seed, trains=trains, prunes=prunes)
            obstacle = NO_VANILLA
        self.models[stage.name] = model
        if stage.save != "native" and layers_of(model):
            raise LmcompressError(f"save: {stage.save} is not possible with compact layers; save it as native")
        if stage.save == "vanilla" and obstacle:
            raise LmcompressError(f"save: vanilla is not possible: {obstacle}; save it as native or self_loading")
        shape = shape_in_words(CompressedModel(model))
        parameters = parameter_count(model)
        return StagePlan(
            stage=stage,
            role=self._role(stage, control_of, bool(teachers)),
            start=_start_name(self.recipe, stage),
            teachers=tuple(teachers),
            shape=shape if pruning is None or pruning.exact else f"about {shape}",
            parameters=parameters,
            bytes_estimate=4 * parameters if quantization is None else quantization.bytes_estimate,
            train_rows=rows,
            steps=steps,
            vanilla_obstacle=obstacle,
            distillation=config,
            compact=compact,
            pruning=pruning,
            quantization=quantization,
            vocabulary=vocabulary,
            materials=materials,
        )

    def _compact(self, stage: Stage, model: PreTrainedModel) -> CompactPlan | None:
        unknown = stage.start in self.unknown_ranks and bool(layers_of(model))
        planned = None
        if stage.compact is not None:
            planned = plan_compact(stage.compact, model, unknown_before=unknown)
            unknown = unknown or planned.unknown is not None
        if unknown:
            self.unknown_ranks.add(stage.name)
        return planned

    def _distillation(self, stage: Stage, model: PreTrainedModel, teachers: list[str]) -> DistillationConfig | None:
        if stage.distillation is None:
            return None
        known = [self.models.get(name) or self.outside[name] for name in teachers]
        config = distillation_config(stage.distillation, model, known)
        # on meta: all checks and no work
        method = Distillation(config, [LiveTeacher(teacher) for teacher in known])
        method.attach(model, torch.device("meta"), nullcontext)
        method.finish()
        return config

    def _role(self, stage: Stage, control_of: Stage | None, taught: bool) -> Role:
        if stage.name in self.used:
            return "teacher"
        if control_of:
            return "control"
        if taught:
            return "student"
        if stage.quantization is not None:
            return "quantized"
        if stage.sharing is not None:
            return "shared"
        if stage.compact is not None:
            return "compact"
        return "pruned" if stage.pruning is not None or stage.sparsity is not None else "model"


def distillation_config(
    distillation: StageDistillation, student: PreTrainedModel, teachers: list[PreTrainedModel]
) -> DistillationConfig:
    """A stage's distillation with its layer map spelled out as matches.

    Args:
        distillation: of the recipe.
        student: for its number of blocks.
        teachers: likewise.

    Raises:
        LmcompressError: the map does not fit the models, or a match has no such name.
    """
    own = {"teachers", "teacher_precision", "store", "layer_map", "losses"}
    values = distillation.model_dump(exclude=own, exclude_unset=True)
    matches = list(distillation.matches)
    for entry in distillation.losses:
        loss = LayerLoss(loss=entry) if isinstance(entry, str) else entry
        if loss.which >= len(teachers):
            raise LmcompressError(f"{loss.loss} names teacher {loss.which}; there are {len(teachers)}, from 0")
        found = match_for(loss.loss, loss.on)
        pairs = _pairs(distillation.layer_map, student, teachers[loss.which])
        for mine, theirs in pairs:
            # layer 0 is the embeddings, which have hidden states only
            if found.feature != "hidden" and 0 in (mine, theirs):
                continue
            both = found.layers == 2
            matches.append(
                Match(
                    student=(mine, mine) if both else mine,
                    teacher=(theirs, theirs) if both else theirs,
                    **loss.model_dump(),
                )
            )
    return DistillationConfig(**values | {"matches": tuple(matches)})


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
    """How many steps a stage takes on one device.

    Args:
        stage: of the recipe.
        rows: trained on.
    """
    training = stage.training
    if training.max_steps >= 0:
        return training.max_steps
    batches = math.ceil(rows / training.per_device_train_batch_size)
    return math.ceil(training.num_train_epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))


def _pairs(layer_map: Any, student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    depths = len(anatomy_of(student).block_list), len(anatomy_of(teacher).block_list)
    if layer_map == "uniform":
        return uniform(*depths)
    if layer_map in ("skip", "last"):
        return (skip if layer_map == "skip" else last)(*depths, include_last=True)
    return given(layer_map, *depths)


def _start_name(recipe: Recipe, stage: Stage) -> str:
    if is_stage(stage.start):
        return stage.start
    return recipe.model if isinstance(recipe.model, str) else "random weights"
