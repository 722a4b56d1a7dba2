"""Smaller students in recipes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import refuse_compact
from lmcompress.errors import nearest
from lmcompress.recipes.parts.base import StagePart, Work
from lmcompress.recipes.specs import SchemaPart
from lmcompress.students.layers import by_layers
from lmcompress.students.named_shapes import NAMED_SHAPES, named
from lmcompress.students.shape import by_shape, by_width


class Shape(SchemaPart):
    """Sizes of a student; omitted ones are those of the model it is made from."""

    layers: Annotated[
        int | tuple[int, ...] | None, Field(description="Number of Transformer blocks, or their numbers (from 0).")
    ] = None
    hidden_size: Annotated[int | None, Field(ge=1, le=1 << 16, description="Width of the hidden states.")] = None
    intermediate_size: Annotated[
        int | None, Field(ge=1, le=1 << 18, description="Width of the feed-forward networks.")
    ] = None
    num_heads: Annotated[int | None, Field(ge=1, le=256, description="Number of attention heads per block.")] = None


class StudentSpec(SchemaPart):
    """The construction of the student from the stage's start model; exactly one of its first four fields."""

    layers: Annotated[
        int | tuple[int, ...] | None,
        Field(description="Number of blocks to keep with their weights, or their numbers (from 0)."),
    ] = None
    shape: Annotated[Shape | None, Field(description="Any sizes expressible in a stock config.")] = None
    named: Annotated[str | None, Field(description="A named shape: T3, T4-tiny, DistilBERT, DistilGPT2, ...")] = None
    width: Annotated[
        float | None,
        Field(gt=0, le=1, description="Multiplier of all widths; heads keep their size, so it is rounded to heads."),
    ] = None
    choose: Annotated[
        Literal["uniform", "first", "last", "skip"],
        Field(description="With a number of layers: which are kept. skip: the last one of each group."),
    ] = "uniform"
    initialise: Annotated[
        Literal["slice", "random"],
        Field(description="For shape, named and width: slice the weights from the start's, or initialize randomly."),
    ] = "slice"

    @model_validator(mode="after")
    def _exactly_one(self) -> StudentSpec:
        given = [name for name in ("layers", "shape", "named", "width") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of layers, shape, named and width must be given, got {' and '.join(given) or 'none'}"
            )
        if self.named is not None and self.named not in NAMED_SHAPES:
            raise ValueError(f"no shape is called {self.named!r}{nearest(self.named, NAMED_SHAPES)}")
        if self.initialise == "random" and self.layers is not None:
            raise ValueError("layers keeps weights; for random weights give shape: {layers: ...}")
        return self


class StudentPart(StagePart[StudentSpec]):
    """The stage's model is made from its start with fewer or narrower blocks."""

    key = "student"
    schema = Annotated[StudentSpec | None, Field(description="Reduction of the start model; default: none.")]
    applied = "smaller student"
    reports = False

    def prepare(self, spec: StudentSpec, work: Work) -> None:
        work.model = make_student(work.model, spec, work.recipe.seed)


def make_student(start: PreTrainedModel, spec: StudentSpec, seed: int) -> PreTrainedModel:
    """The model that a stage trains.

    Args:
        start: the model it is made from; if on ``meta``, so is the student.
        spec: the reduction.
        seed: seed of random weights.

    Raises:
        LmcompressError: If layers do not exist, sizes do not fit, or compact layers would be sliced.
    """
    meta = start.device.type == "meta"
    choose: Any = spec.choose
    if spec.layers is not None:
        return by_layers(start, spec.layers, choose=choose).model
    if spec.initialise == "slice":
        refuse_compact(start, "slice")
    # norms, by which a slice is chosen, need weights
    initialise: Any = "random" if meta else spec.initialise
    with torch.device("meta") if meta else nullcontext():
        if spec.named is not None:
            return named(spec.named, start, initialise=initialise, seed=seed).model
        if spec.width is not None:
            return by_width(start, spec.width, initialise=initialise, seed=seed).model
        assert spec.shape is not None
        sizes: dict[str, Any] = spec.shape.model_dump()
        return by_shape(start, **sizes, choose=choose, initialise=initialise, seed=seed).model
