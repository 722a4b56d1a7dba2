"""Checks of a quantization before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import PerGroup
from lmcompress.numerics.quantizers.registry import quantizer_for
from lmcompress.quantization.config import QuantizationConfig, WeightScheme, width
from lmcompress.quantization.planning import Plan


def check_trainable(planned: Plan, config: QuantizationConfig, *, cut_later: bool = False) -> None:
    """Refuse a configuration that cannot be trained.

    Args:
        planned: quantization of each matrix.
        config: configuration with the schedule of bits.
        cut_later: whether another method cuts the model in the same run.

    Raises:
        LmcompressError: If a quantizer does not support bits of the schedule, the schedule ends above the bits of a
            matrix, or the model is cut and scales belong to groups or the grid has no zero.
    """
    schedule = config.bits_schedule
    for one in planned.matrices:
        own = one.weights.bits
        if schedule and width(schedule[-1][1]) > width(own):
            raise LmcompressError(
                f"bits_schedule must end with the bits of all matrices or fewer, got {schedule[-1][1]} at its end and "
                f"{own} for {one.path}"
            )
        for _, bits in schedule:
            if width(bits) > width(own):
                try:
                    quantizer_for(one.weights.quantizer, bits)
                except LmcompressError as error:
                    raise LmcompressError(f"bits_schedule does not fit {one.path}: {error}") from error
        if cut_later and isinstance(one.weights.grouping(), PerGroup):
            raise LmcompressError(
                f"the granularity of {one.path} must be tensor or row in a run that prunes too, got groups of "
                f"{one.weights.granularity}: a cut group is incomplete. Prune in an earlier stage"
            )
        if cut_later and _has_no_zero(one.weights):
            raise LmcompressError(
                f"the grid of {one.path} must have a zero in a run that prunes too, {one.weights.name} at {own} bits "
                "has none: masked weights would not be 0. Prune in an earlier stage"
            )


def is_cut(methods: Sequence[Any], quantization: Any) -> bool:
    """Whether another method of the run cuts the model.

    Args:
        methods: methods of the run, in order.
        quantization: the quantizing method.

    Raises:
        LmcompressError: If a method that cuts comes later in the list, or leaves gates between 0 and 1.
    """
    cutting = [index for index, method in enumerate(methods) if getattr(method, "changes_shapes", False)]
    for index in cutting:
        if index > list(methods).index(quantization):
            raise LmcompressError(
                f"{methods[index].name} must come before quantization in the list of methods, got it after: that "
                "must see the gated model"
            )
        if getattr(methods[index], "folds", False):
            raise LmcompressError(
                f"{methods[index].name} must end with gates of 0 and 1 in a run that quantizes too, got a schedule "
                "whose gates end in between, or layers whose attention is scaled by their number "
                "(scale_attn_by_inverse_layer_idx): weights multiplied by such factors are no longer codes. Use "
                "another schedule, or prune in an earlier stage"
            )
    return bool(cutting)


def _has_no_zero(scheme: WeightScheme) -> bool:
    grid = scheme.model_copy(update={"granularity": "tensor"})
    found = grid.rounded(torch.tensor([[1.0, -1.0]]))
    return found.zero_points is None and float(found.grid.nearest(torch.zeros(()))) != 0
