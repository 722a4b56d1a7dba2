"""Pruning targets: a share, a number, or a shape."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.costs import CostModel, FlopCost, ModelSizes, ParameterCost
from lmcompress.pruning.structured.latency import LatencyTable


class Shape(BaseModel):
    """A target shape; unnamed parts are unchanged.

    Attributes:
        layers: number of blocks.
        heads: heads of every block, or of each remaining block, in order.
        ffn: neurons of every block, or of each remaining block, in order.
        hidden: width of the residual stream.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: Annotated[int, Field(ge=1)] | None = None
    heads: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    ffn: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    hidden: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Shape:
        if self == Shape.model_construct():
            raise ValueError("a shape must name at least one of layers, heads, ffn, hidden; got none")
        return self


class Target(BaseModel):
    """A pruning target: exactly one of these.

    Attributes:
        sparsity: share of the parameters of the blocks to remove; embeddings do not count, as in CoFi and later work.
        parameters: maximum number of parameters of the whole model.
        flops_share: maximum share of the blocks' floating-point operations to keep.
        latency_share: maximum share of the model's latency to keep, by a table measured on this machine.
        latency_ms: maximum time of one forward pass, by the same table.
        shape: the shape itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    parameters: Annotated[int, Field(ge=1)] | None = None
    flops_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    shape: Shape | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Target:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a target must be exactly one of {names}, got {' and '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Name of the target's kind."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


def counted_in(target: Target, sizes: ModelSizes, cost: CostModel | None = None) -> CostModel:
    """The cost that a target is counted in; for a shape, parameters of the blocks.

    Args:
        target: a target.
        sizes: sizes of the model.
        cost: a latency table for latency targets; FLOPs at a given batch size and length.

    Raises:
        LmcompressError: If a latency target has no table.
    """
    if target.kind in ("latency_share", "latency_ms"):
        if not isinstance(cost, LatencyTable):
            raise LmcompressError(
                f"{target.kind} must come with cost=, a LatencyTable measured on this machine, got "
                f"{'none' if cost is None else type(cost).__name__}; create one with measure_latency, or target "
                "flops_share"
            )
        return cost
    if target.flops_share is not None:
        return cost if isinstance(cost, FlopCost) else FlopCost(sizes)
    return ParameterCost(sizes, "encoder" if target.parameters is None else "whole")
