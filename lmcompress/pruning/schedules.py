"""When to prune how much: from the share of training done to the share of the way to the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lmcompress.errors import LmcompressError

Ramp = Callable[[float], float]
"""``share of the pruning phase in [0, 1] -> share of the way to the target in [0, 1]``, not decreasing."""


def linear(progress: float) -> float:
    """Straight from 0 to the target; CoFi's warm-up of the target sparsity.

    Args:
        progress: share of the phase done, in [0, 1].

    Returns:
        The same number.

    Raises:
        LmcompressError: ``progress`` lies outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise LmcompressError(f"progress must be in [0, 1], got {progress}")
    return progress


def cubic(progress: float) -> float:
    r"""Fast at first, slow at the end: :math:`1 - (1 - p)^3`.

    With :math:`s_f` the target this is :math:`s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / n)^3` for :math:`s_i = 0`.

    Args:
        progress: share of the phase done, in [0, 1].

    Returns:
        Share of the way to the target, in [0, 1].

    Raises:
        LmcompressError: ``progress`` lies outside [0, 1].

    Reference:
        Zhu & Gupta, *To prune, or not to prune*, 2017, https://arxiv.org/abs/1710.01878, equation 1; Sanh, Wolf & Rush,
        *Movement Pruning*, 2020, https://arxiv.org/abs/2005.07683, section 5.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1 - (1 - linear(progress)) ** 3


RAMPS: dict[str, Ramp] = {"linear": linear, "cubic": cubic}
"""The ramps by name, for recipes."""


def phase_share(step: int, begin: int, end: int) -> float:
    """How much of a phase is done.

    Args:
        step: optimizer steps done.
        begin: step at which the phase begins.
        end: step at which it ends; the phase may be empty.

    Returns:
        0 up to ``begin``, 1 from ``end`` on.

    Example:
        >>> phase_share(15, 10, 30)
        0.25
    """
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin))


def rounds(begin: int, end: int, count: int) -> list[int]:
    """Steps at which an iterative schedule prunes: evenly from ``begin`` to ``end``, both included.

    Args:
        begin: step of the first round.
        end: step of the last round; where there is one round only, it is at ``begin``.
        count: number of rounds, at least 1.

    Returns:
        ``count`` steps, not decreasing.

    Raises:
        LmcompressError: no rounds, or an end before the beginning, or more rounds than steps.

    Example:
        >>> rounds(0, 90, 4)
        [0, 30, 60, 90]
    """
    if count < 1:
        raise LmcompressError(f"an iterative schedule needs at least 1 round, got {count}")
    if end < begin or (count > 1 and end - begin < count - 1):
        raise LmcompressError(
            f"{count} rounds need at least {count - 1} optimizer steps between begin and end, got {end - begin}: "
            "train longer, ask for fewer rounds, or let the phase take a larger share of training"
        )
    if count == 1:
        return [begin]
    return [begin + round(i * (end - begin) / (count - 1)) for i in range(count)]


def cycle_phase(step: int, begin: int, end: int, cycles: int, dense_share: float) -> Literal["dense", "sparse"]:
    """In which half of a prune/re-activate cycle a step lies.

    The phase from ``begin`` to ``end`` is cut into ``cycles`` equal cycles; each begins pruned (the support alone is
    trained) and ends with everything re-activated. Before ``begin`` all is dense, from ``end`` on all is pruned.

    Args:
        step: optimizer steps done.
        begin: step of the first pruning.
        end: step of the last pruning.
        cycles: how many, at least 1.
        dense_share: share of each cycle that is dense, in (0, 1).

    Returns:
        Which half.

    Raises:
        LmcompressError: no cycles, a share outside (0, 1), or cycles of fewer than two steps.

    Reference:
        Jin, Yuan, Feng & Yan, *Training Skinny Deep Neural Networks with Iterative Hard Thresholding*, 2016,
        https://arxiv.org/abs/1607.05423, algorithm 1.

    Example:
        >>> [cycle_phase(s, 0, 8, 2, 0.5) for s in (0, 1, 2, 3, 4, 8)]
        ['sparse', 'sparse', 'dense', 'dense', 'sparse', 'sparse']
    """
    if cycles < 1 or not 0 < dense_share < 1:
        raise LmcompressError(f"cycles must be at least 1 and dense_share in (0, 1), got {cycles} and {dense_share}")
    if end - begin < 2 * cycles:
        raise LmcompressError(
            f"{cycles} cycles need at least {2 * cycles} optimizer steps between begin and end, got {end - begin}: "
            "train longer or ask for fewer cycles"
        )
    if step < begin:
        return "dense"
    if step >= end:
        return "sparse"
    # whole steps: a cycle's dense half must not vanish for rounding
    number = (step - begin) * cycles // (end - begin)
    first = begin + -(-number * (end - begin) // cycles)
    last = begin + -(-(number + 1) * (end - begin) // cycles)
    sparse_steps = min(max(1, round((1 - dense_share) * (last - first))), last - first - 1)
    return "sparse" if step < first + sparse_steps else "dense"
