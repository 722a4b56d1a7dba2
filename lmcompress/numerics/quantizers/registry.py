"""The weight quantizers by name."""

from __future__ import annotations

from functools import cache

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.quantizers.base import TERNARY, WITH_ZERO, WeightQuantizer
from lmcompress.numerics.quantizers.closed_form import binary, laq, tbt, twn
from lmcompress.numerics.quantizers.learned import (
    dynamic_scaling,
    elastic,
    initial_clip,
    initial_elastic,
    initial_gamma,
    initial_step,
    lsq,
    pact,
)
from lmcompress.numerics.quantizers.uniform import (
    asymmetric,
    mse_clip,
    mse_limits,
    percentile_clip,
    percentile_limits,
    symmetric,
)
from lmcompress.registry import Registry

QUANTIZERS: Registry[WeightQuantizer] = Registry(
    "weight quantizer",
    {
        "dynamic_scaling": WeightQuantizer(dynamic_scaling, initial_gamma, learned=True, by_rows=True),
        "pact": WeightQuantizer(pact, initial_clip, learned=True, by_rows=True),
        "lsq": WeightQuantizer(lsq, initial_step, learned=True, by_rows=True),
        "elastic": WeightQuantizer(elastic, initial_elastic, learned=True, bits=(1, "ternary", 2, 3, 4), by_rows=True),
        # not by rows: its iterations end for all rows at once
        "laq": WeightQuantizer(laq, bits=(1, *WITH_ZERO), takes_curvature=True),
        "twn": WeightQuantizer(twn, bits=TERNARY, by_rows=True),
        "tbt": WeightQuantizer(tbt, bits=TERNARY, by_rows=True),
        "binary": WeightQuantizer(binary, bits=(1,), by_rows=True),
        "minmax": WeightQuantizer(symmetric, by_rows=True),
        "percentile": WeightQuantizer(symmetric, percentile_clip, by_rows=True, takes_percentile=True),
        "mse": WeightQuantizer(symmetric, mse_clip, by_rows=True),
        "asymmetric_minmax": WeightQuantizer(asymmetric),
        "asymmetric_percentile": WeightQuantizer(asymmetric, percentile_limits, takes_percentile=True),
        "asymmetric_mse": WeightQuantizer(asymmetric, mse_limits),
    },
    lambda part: isinstance(part, WeightQuantizer),
    "a lmcompress.numerics.WeightQuantizer",
)
"""The built-in weight quantizers by name; ``resolve`` also finds one of your own by ``module:attribute``."""


def quantizer_for(quantizer: str | WeightQuantizer, bits: Bits) -> WeightQuantizer:
    """The quantizer that a name or an object stands for, if it supports a bit-width.

    Args:
        quantizer: a key of :data:`QUANTIZERS`, ``module:attribute`` of your own, or a quantizer.
        bits: the bit-width wanted.

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
    """What reports call a quantizer: the name that finds it, or, if none does, that of its function.

    Args:
        quantizer: a name, which is returned as it is, or a quantizer.
    """
    if isinstance(quantizer, str):
        return quantizer
    try:
        return QUANTIZERS.name_of(quantizer)
    except LmcompressError:
        return f"custom {getattr(quantizer.function, '__qualname__', quantizer.function)}"
