"""The plan of a recipe: what each stage will train, checked against everything that can be known before training."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lmcompress.anatomy import anatomy_of
from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher, Match
from lmcompress.distillation.layer_maps import given, last, skip, uniform
from lmcompress.distillation.matches import match_for
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import parameter_count
from lmcompress.model import CompressedModel
from lmcompress.recipes.building import (
    Materials,
    base_model,
    different_tokenizer,
    gather,
    is_stage,
    make_student,
    teacher_skeleton,
)
from lmcompress.recipes.schema import LayerLoss, Recipe, Stage, StageDistillation, with_controls

Role = Literal["teacher", "student", "control", "model"]


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do.

    Attributes:
        stage: as the recipe has it; a control's is derived.
        role: teacher of another stage, student, control, or a model by itself.
        start: what its weights come from.
        teachers: stages or models that it learns from.
        shape: blocks, heads and widths in words.
        parameters: of the model.
        bytes_estimate: of its weights in float32.
        train_rows: rows or blocks trained on, augmentation included.
        steps: optimizer steps.
        vanilla_obstacle: why stock Transformers could not load it, or None.
        distillation: with its layer maps spelled out; None for plain fine-tuning.
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


def plan(recipe: Recipe) -> Plan:
    """Check a recipe against its rows and models, and say what it will do. Nothing is trained, no weights are loaded.

    Args:
        recipe: validated.

    Returns:
        The plan; :func:`~lmcompress.recipes.runner.run` carries it out.

    Raises:
        LmcompressError: rows, labels, layers, vocabularies or shapes do not fit; the message names the stage.
    """
    materials = gather(recipe)
    materials.rows()
    models: dict[str, PreTrainedModel] = {}
    plans: list[StagePlan] = []
    outside: dict[str, PreTrainedModel] = {}
    stages = with_controls(recipe)
    names = {stage.name for stage, _ in stages}
    used = {t for stage, _ in stages if stage.distillation for t in stage.distillation.teachers}
    for stage, control_of in stages:
        try:
            start = models[stage.start] if is_stage(stage.start) else base_model(materials, meta=True)
            model = make_student(start, stage.student, recipe.seed)
            model.config.name_or_path = f"the model of stage {stage.name!r}"
            models[stage.name] = model
            teachers = list(stage.distillation.teachers) if stage.distillation else []
            for name in teachers:
                if name not in names and name not in outside:
                    outside[name] = teacher_skeleton(name, materials.task)
            known = [models.get(name) or outside[name] for name in teachers]
            teacher_tokenizer = different_tokenizer(stage, dict.fromkeys(names), materials)
            config = None
            if stage.distillation is not None:
                config = distillation_config(stage.distillation, model, known)
                # on meta: all checks and no work
                method = Distillation(config, [LiveTeacher(teacher) for teacher in known])
                method.attach(model, torch.device("meta"), nullcontext)
                method.finish()
            compressed = CompressedModel(model)
            obstacle = compressed.why_not_vanilla()
            if stage.save == "vanilla" and obstacle:
                raise LmcompressError(f"save: vanilla is not possible: {obstacle}; save it as native or self_loading")
        except LmcompressError as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error
        rows = materials.rows(teacher_tokenizer=teacher_tokenizer).train.num_rows
        rows *= 1 + (stage.augmentation.copies if stage.augmentation else 0)
        role: Role = (
            "teacher" if stage.name in used else "control" if control_of else "student" if teachers else "model"
        )
        parameters = parameter_count(model)
        plans.append(
            StagePlan(
                stage=stage,
                role=role,
                start=_start_name(recipe, stage),
                teachers=tuple(teachers),
                shape=shape_in_words(compressed),
                parameters=parameters,
                bytes_estimate=4 * parameters,
                train_rows=rows,
                steps=optimizer_steps(stage, rows),
                vanilla_obstacle=obstacle,
                distillation=config,
            )
        )
    reference = next((t for p in plans for t in p.teachers), plans[0].stage.name)
    notes = tuple(dict.fromkeys((*materials.data.notes, *materials.rows().notes)))
    return Plan(recipe, materials, tuple(plans), tuple(outside), reference, notes)


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
    if training.max_steps > 0:
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
