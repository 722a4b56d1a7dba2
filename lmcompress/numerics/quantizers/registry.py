"""The weight quantizers by name."""

from __future__ import annotations

from lmcompress.errors import LmcompressError, nearest
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

QUANTIZERS: dict[str, WeightQuantizer] = {
    "dynamic_scaling": WeightQuantizer(dynamic_scaling, initial_gamma, True, WITH_ZERO),
    "pact": WeightQuantizer(pact, initial_clip, True, WITH_ZERO),
    "lsq": WeightQuantizer(lsq, initial_step, True, WITH_ZERO),
    "elastic": WeightQuantizer(elastic, initial_elastic, True, (1, "ternary", 2, 3, 4)),
    "laq": WeightQuantizer(laq, None, False, (1, *WITH_ZERO)),
    "twn": WeightQuantizer(twn, None, False, TERNARY),
    "tbt": WeightQuantizer(tbt, None, False, TERNARY),
    "binary": WeightQuantizer(binary, None, False, (1,)),
    "minmax": WeightQuantizer(symmetric, None, False, WITH_ZERO),
    "percentile": WeightQuantizer(symmetric, percentile_clip, False, WITH_ZERO),
    "mse": WeightQuantizer(symmetric, mse_clip, False, WITH_ZERO),
    "asymmetric_minmax": WeightQuantizer(asymmetric, None, False, WITH_ZERO),
    "asymmetric_percentile": WeightQuantizer(asymmetric, percentile_limits, False, WITH_ZERO),
    "asymmetric_mse": WeightQuantizer(asymmetric, mse_limits, False, WITH_ZERO),
}
"""The weight quantizers by name, for recipes."""


def quantizer_for(name: str, bits: Bits) -> WeightQuantizer:
    """The quantizer of a name, where it has those bits.

    Args:
        name: a key of :data:`QUANTIZERS`.
        bits: the width wanted.

    Returns:
        The quantizer.

    Raises:
        LmcompressError: an unknown name, or bits that this quantizer does not have.

    Example:
        >>> quantizer_for("lsq", 4).learned
        True
    """
    if name not in QUANTIZERS:
        raise LmcompressError(f"unknown weight quantizer {name!r}{nearest(name, QUANTIZERS)}")
    quantizer = QUANTIZERS[name]
    if isinstance(bits, (bool, float)) or bits not in quantizer.bits:
        others = sorted(other for other, q in QUANTIZERS.items() if bits in q.bits)
        instead = f"; at {bits} there are {', '.join(others)}" if others else ""
        raise LmcompressError(
            f"the quantizer {name!r} has bits {', '.join(map(str, quantizer.bits))}, got {bits!r}{instead}"
        )
    return quantizer
