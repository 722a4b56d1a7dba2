"""Checks of post-training quantization."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import outline_of, refuse_foreign
from lmcompress.families.foreign import refuse_packed
from lmcompress.families.weights import EMBEDDINGS
from lmcompress.numerics.quantizers.registry import QUANTIZERS
from lmcompress.quantization.config import ActivationScheme
from lmcompress.quantization.planning import Plan
from lmcompress.quantization.ptq.awq import scalings

Method = Literal["rtn", "gptq", "awq"]
"""Round to nearest; GPTQ's error compensation; AWQ's scaling of inputs, then rounding."""


def check_post_training(model: PreTrainedModel, planned: Plan, method: Method) -> None:
    """Refuse what :func:`quantize` would, as far as the plan shows.

    Args:
        model: the plan's model, on any device.
        planned: the plan.
        method: as for :func:`quantize`.

    Raises:
        LmcompressError: If something is learned, or the method has nothing to do.
    """
    _refuse_learned(planned)
    _refuse_idle(model, planned, method)


def refuse_quantized(model: PreTrainedModel) -> None:
    """Refuse a model that is quantized already.

    Args:
        model: any model.

    Raises:
        LmcompressError: If it is packed, another library has quantized it, or it has adapters or masks.
    """
    refuse_packed(model, "quantize")
    refuse_foreign(model, "quantize")


def _refuse_learned(planned: Plan) -> None:
    fit = ", ".join(name for name, quantizer in QUANTIZERS.items() if not quantizer.learned)
    for matrix in planned.matrices:
        if matrix.weights.function().learned:
            raise LmcompressError(
                f"the quantizer of {matrix.path} must not be one that learns, got {matrix.weights.name!r}, whose "
                f"scale needs training: use one of {fit}, or train with QuantizationTrainer"
            )
    schemes: list[tuple[str, ActivationScheme | None]] = [(m.path, m.inputs) for m in planned.matrices]
    for name, scheme in [*schemes, ("attention", planned.attention)]:
        if scheme is not None and scheme.range == "learned":
            raise LmcompressError(
                f"activation ranges of {name} must be dynamic or static without training, got learned; static ones are "
                "calibrated"
            )


def _refuse_idle(model: PreTrainedModel, planned: Plan, method: Method) -> None:
    if method == "rtn":
        return
    others = [matrix for matrix in planned.matrices if matrix.part != EMBEDDINGS]
    if not others:
        raise LmcompressError(
            f"{method} must have matrices beside the embeddings to work on, got none: give the config weights, or use "
            "method='rtn'"
        )
    if method == "awq":
        blocks = outline_of(model).blocks
        parts = {(m.block, m.part) for m in others}
        able = {(i, part) for i, b in enumerate(blocks) for s in scalings(b, leave_unchanged) for part in s.parts}
        if not parts & able:
            possible = sorted({part for _, part in able})
            raise LmcompressError(
                f"awq must have a matrix whose input can be scaled exactly, got none: in a {type(model).__name__} that "
                f"is {', '.join(possible) or 'no part'}; use method='gptq'"
            )


def leave_unchanged(parameter: nn.Parameter, values: Tensor) -> None:
    """Does nothing, for callers that only ask what could be scaled."""
