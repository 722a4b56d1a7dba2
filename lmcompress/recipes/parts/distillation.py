"""Distillation in recipes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher, Match
from lmcompress.distillation.checks import crosses
from lmcompress.distillation.config import MatchPart, WeightSchedule
from lmcompress.distillation.layer_maps import given, last, skip, uniform
from lmcompress.distillation.matches import match_for
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.recipes.building import check_packing, teacher_skeleton
from lmcompress.recipes.parts.base import Planning, Running, StagePart, Work
from lmcompress.recipes.parts.teachers import Precision, StoreSpec, different_tokenizer, teachers_of
from lmcompress.recipes.specs import SchemaPart

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage


class LayerLoss(SchemaPart):
    """A match that is repeated for every pair of a layer map."""

    loss: Annotated[
        MatchPart,
        Field(
            description="Name of the match: hidden_mse, nst, attention_mse, ...; or module:attribute of a custom own."
        ),
    ]
    weight: Annotated[float, Field(ge=0, description="Weight of each of the terms.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    projection: Annotated[
        Literal["none", "auto", "linear", "relu", "tanh"], Field(description="Projection of the student; see matches.")
    ] = "auto"
    projection_learning_rate: Annotated[float | None, Field(gt=0, description="Default: the model's.")] = None
    on: Annotated[
        Literal["scores", "probabilities"] | None,
        Field(description="Attention matches only: before or after the softmax."),
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, if there are several.")] = 0
    options: Annotated[dict[str, Any], Field(description="Further arguments of the match.")] = {}


class StageDistillation(DistillationConfig):
    """The objective by which the stage's student is fitted to its teachers."""

    teachers: Annotated[
        tuple[str, ...], Field(min_length=1, description="Names of earlier stages, paths, or names on the Hub.")
    ]
    teacher_precision: Annotated[
        Precision | None,
        Field(description="Precision of the teachers; 8bit and 4bit need pip install lmcompress[bnb] and a GPU."),
    ] = None
    store: Annotated[
        StoreSpec | None, Field(description="Store the teacher's outputs on disk instead of computing them each time.")
    ] = None
    layer_map: Annotated[
        Literal["uniform", "skip", "last"] | tuple[tuple[int, int], ...] | None,
        Field(description="Layer map from student to teacher blocks, for losses; or a custom list of pairs."),
    ] = None
    losses: Annotated[
        tuple[MatchPart | LayerLoss, ...],
        Field(description="Matches to repeat for every pair of layer_map, as names or in full."),
    ] = ()

    @model_validator(mode="after")
    def _something_to_do(self) -> StageDistillation:
        if bool(self.losses) != (self.layer_map is not None):
            raise ValueError("layer_map and losses go together: one gives the layers, the other the comparison")
        plain = {name: getattr(self, name) for name in DistillationConfig.model_fields}
        if self.losses:
            # any match will do: this only checks that there is something to train on
            plain["matches"] = (*self.matches, Match(loss="hidden_mse", student=-1, teacher=-1))
        DistillationConfig.model_validate(plain)
        if self.store is not None and (self.on_policy is not None or crosses(self)):
            raise ValueError(
                "a store holds outputs by the student's tokens, and only for the training rows: leave store out with "
                "on_policy, shared_tokens and loss uld"
            )
        if self.teacher_weights is not None and len(self.teacher_weights) != len(self.teachers):
            raise ValueError(f"{len(self.teachers)} teachers have {len(self.teacher_weights)} teacher_weights")
        return self


class DistillationPart(StagePart[StageDistillation]):
    """The stage's model learns from teachers while it is trained."""

    key = "distillation"
    schema = Annotated[
        StageDistillation | None,
        Field(description="If omitted: plain fine-tuning, which is how teachers are made."),
    ]
    applied = "distillation"
    reports = False

    def check(self, stage: Stage, spec: StageDistillation) -> None:
        if not stage.trains:
            raise ValueError(
                "max_steps: 0 trains nothing, so there is nothing to distil; leave distillation out or train some steps"
            )

    def prepare(self, spec: StageDistillation, work: Work) -> DistillationConfig | None:
        if isinstance(work, Planning):
            for name in (name for name in spec.teachers if name not in work.models):
                work.models[name] = teacher_skeleton(name, work.materials.task)
        work.teacher_tokenizer = different_tokenizer(work.stage, work.staged, work.materials)
        if not isinstance(work, Planning):
            return None
        known = [work.models[name] for name in spec.teachers]
        for model in known:
            check_packing(work.recipe.task, model)
        config = distillation_config(spec, work.model, known)
        sizes = {model.config.vocab_size for model in (work.model, *known)}
        if work.teacher_tokenizer is None and config.vocab_size is None and len(sizes) > 1:
            # one tokenizer: tables that differ are padded
            config = config.model_copy(update={"vocab_size": len(work.materials.tokenizer)})
        # on meta: all checks without computation
        mine = work.materials.tokenizer
        method = Distillation(config, [LiveTeacher(teacher, work.teacher_tokenizer or mine) for teacher in known])
        method.attach(work.model, torch.device("meta"), nullcontext, mine)
        method.finish()
        return config

    def words(self, planned: DistillationConfig) -> list[str]:
        terms = [f"{match.loss} {match.student}←{match.teacher}" for match in planned.matches]
        return [f"matches {', '.join(terms)}"] if terms else []

    def method(self, spec: StageDistillation, work: Running) -> Distillation:
        teachers, config = teachers_of(work, work.plans[self.key], spec.teacher_precision or "float32", spec.store)
        return Distillation(config, teachers)


def distillation_config(
    distillation: StageDistillation, student: PreTrainedModel, teachers: list[PreTrainedModel]
) -> DistillationConfig:
    """A stage's distillation with its layer map expanded into matches.

    Args:
        distillation: distillation of the recipe.
        student: determines its number of blocks.
        teachers: determine theirs.

    Raises:
        LmcompressError: If the map does not fit the models, or a match cannot compare the requested features.
    """
    given_fields = distillation.model_fields_set & DistillationConfig.model_fields.keys()
    values = {name: getattr(distillation, name) for name in given_fields}
    matches = list(distillation.matches)
    for entry in distillation.losses:
        loss = entry if isinstance(entry, LayerLoss) else LayerLoss(loss=entry)
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
                    **dict(loss),
                )
            )
    return DistillationConfig(**values | {"matches": tuple(matches)})


def _pairs(layer_map: Any, student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    depths = len(anatomy_of(student).block_list), len(anatomy_of(teacher).block_list)
    if layer_map == "uniform":
        return uniform(*depths)
    if layer_map in ("skip", "last"):
        return (skip if layer_map == "skip" else last)(*depths, include_last=True)
    return given(layer_map, *depths)
