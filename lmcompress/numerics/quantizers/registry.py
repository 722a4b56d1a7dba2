"""The weight quantizers by name."""

from __future__ import annotations

from functools import cache

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.quantizers import closed_form, learned, ranges, uniform
from lmcompress.numerics.quantizers.base import TERNARY, WITH_ZERO, WeightQuantizer
from lmcompress.registry import Registry

QUANTIZERS: Registry[WeightQuantizer] = Registry(
    "weight quantizer",
    {
        "dynamic_scaling": WeightQuantizer(learned.dynamic_scaling, learned.initial_gamma, learned=True, by_rows=True),
        "pact": WeightQuantizer(learned.pact, learned.initial_clip, learned=True, by_rows=True),
        "lsq": WeightQuantizer(learned.lsq, learned.initial_step, learned=True, by_rows=True),
        "elastic": WeightQuantizer(
            learned.elastic, learned.initial_elastic, learned=True, bits=(1, "ternary", 2, 3, 4), by_rows=True
        ),
        # not by rows: its iterations end for all rows at once
        "laq": WeightQuantizer(closed_form.laq, bits=(1, *WITH_ZERO), takes_curvature=True),
        "twn": WeightQuantizer(closed_form.twn, bits=TERNARY, by_rows=True),
        "tbt": WeightQuantizer(closed_form.tbt, bits=TERNARY, by_rows=True),
        "binary": WeightQuantizer(closed_form.binary, bits=(1,), by_rows=True),
        "minmax": WeightQuantizer(uniform.symmetric, by_rows=True),
        "percentile": WeightQuantizer(uniform.symmetric, ranges.percentile_clip, by_rows=True, takes_percentile=True),
        "mse": WeightQuantizer(uniform.symmetric, ranges.mse_clip, by_rows=True),
        "asymmetric_minmax": WeightQuantizer(uniform.asymmetric),
        "asymmetric_percentile": WeightQuantizer(uniform.asymmetric, ranges.percentile_limits, takes_percentile=True),
        "asymmetric_mse": WeightQuantizer(uniform.asymmetric, ranges.mse_limits),
    },
    lambda part: isinstance(part, WeightQuantizer),
    "a lmcompress.numerics.quantizers.base.WeightQuantizer",
)
"""The built-in weight quantizers by name; ``resolve`` also finds custom ones by ``module:attribute``."""


def quantizer_for(quantizer: str | WeightQuantizer, bits: Bits) -> WeightQuantizer:
    """The quantizer of this name, or the given one, if it supports a bit-width.

    Args:
        quantizer: a key of :data:`QUANTIZERS`, ``module:attribute`` of a custom one, or a quantizer.
        bits: the bit-width.

    Raises:
        LmcompressError: If the name is unknown or cannot be imported, or the quantizer does not support these bits.

    Example:
        >>> quantizer_for("lsq", 4).learned
        True
    """
    found = QUANTIZERS.resolve(quantizer)
    if isinstance(bits, (bool, float)) or bits not in found.bits:
        others = sorted(other for other, q in QUANTIZERS.items() if bits in q.bits)
        instead = f"; at {bits} there are {', '.join(others)}" if others else ""
        name = quantizer_name(quantizer)
        raise LmcompressError(
            f"the quantizer {name!r} has bits {', '.join(map(str, found.bits))}, got {bits!r}{instead}"
        )
    return found


@cache
def quantizer_name(quantizer: str | WeightQuantizer) -> str:
    """The name of a quantizer in reports: the one that finds it, or, if none does, that of its function.

    Args:
        quantizer: a name, which is returned unchanged, or a quantizer.
    """
    if isinstance(quantizer, str):
        return quantizer
    try:
        return QUANTIZERS.name_of(quantizer)
    except LmcompressError:
        return f"custom {getattr(quantizer.function, '__qualname__', quantizer.function)}"
