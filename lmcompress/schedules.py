"""Pruning schedules: from the share of training done to the share of the way to the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcompress.errors import LmcompressError
from lmcompress.registry import PartField, Registry

Ramp = Callable[[float], float]
"""``share of the pruning phase in [0, 1] -> share of the way to the target in [0, 1]``, not decreasing."""


def linear(progress: float) -> float:
    """Linear from 0 to the target; CoFi's warm-up of the target sparsity.

    Args:
        progress: share of the phase done, in [0, 1].

    Returns:
        The same number.

    Raises:
        LmcompressError: If ``progress`` is outside [0, 1].
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
        LmcompressError: If ``progress`` is outside [0, 1].

    Reference:
        Zhu & Gupta, *To prune, or not to prune*, 2017, https://arxiv.org/abs/1710.01878, equation 1; Sanh, Wolf & Rush,
        *Movement Pruning*, 2020, https://arxiv.org/abs/2005.07683, section 5.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1 - (1 - linear(progress)) ** 3


RAMPS: Registry[Ramp] = Registry("ramp", {"linear": linear, "cubic": cubic}, callable, "a function of the progress")
"""The ramps by name; a custom one is a function, or its name ``module:attribute``."""


def ramp_of(ramp: str | Ramp) -> Ramp:
    """A ramp whose values are checked on use.

    Args:
        ramp: a name in :data:`RAMPS`, a function, or ``module:attribute`` of one.

    Returns:
        The function; it raises a :class:`~lmcompress.errors.LmcompressError` if its value is outside [0, 1].

    Raises:
        LmcompressError: If the ramp does not exist.
    """
    function = RAMPS.resolve(ramp)

    def checked(progress: float) -> float:
        share = float(function(progress))
        if not 0 <= share <= 1:
            raise LmcompressError(f"the ramp {ramp!r} must give shares in [0, 1], got {share} at progress {progress}")
        return share

    return checked


def phase_share(step: int, begin: int, end: int) -> float:
    """Share of a phase that is done.

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
        end: step of the last round; a single round is at ``begin``.
        count: number of rounds, at least 1.

    Returns:
        ``count`` steps, not decreasing.

    Raises:
        LmcompressError: If ``count`` is below 1, or the phase has fewer steps than rounds.

    Example:
        >>> rounds(0, 90, 4)
        [0, 30, 60, 90]
    """
    if count < 1:
        raise LmcompressError(f"an iterative schedule needs at least 1 round, got {count}")
    if end < begin or (count > 1 and end - begin < count - 1):
        raise LmcompressError(
            f"{count} rounds need at least {count - 1} optimizer steps between begin and end, got {end - begin}: "
            "train longer, use fewer rounds, or let the phase take a larger share of training"
        )
    if count == 1:
        return [begin]
    return [begin + round(i * (end - begin) / (count - 1)) for i in range(count)]


def cycle_phase(step: int, begin: int, end: int, cycles: int, dense_share: float) -> Literal["dense", "sparse"]:
    """The half of a prune/reactivate cycle that a step is in.

    The phase from ``begin`` to ``end`` is split into ``cycles`` equal cycles; each begins pruned (only the support is
    trained) and ends with everything reactivated. Before ``begin`` all is dense, from ``end`` on all is pruned.

    Args:
        step: optimizer steps done.
        begin: step of the first pruning.
        end: step of the last pruning.
        cycles: number of cycles, at least 1.
        dense_share: share of each cycle that is dense, in (0, 1).

    Returns:
        ``"sparse"`` in the half in which weights are pruned, else ``"dense"``.

    Raises:
        LmcompressError: If ``cycles`` is below 1, ``dense_share`` outside (0, 1), or a cycle shorter than two steps.

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
            "train longer or use fewer cycles"
        )
    if step < begin:
        return "dense"
    if step >= end:
        return "sparse"
    # whole steps: a cycle's dense half must not vanish by rounding
    number = (step - begin) * cycles // (end - begin)
    first = begin + -(-number * (end - begin) // cycles)
    last = begin + -(-(number + 1) * (end - begin) // cycles)
    sparse_steps = min(max(1, round((1 - dense_share) * (last - first))), last - first - 1)
    return "sparse" if step < first + sparse_steps else "dense"


@dataclass(frozen=True)
class Event:
    """An event before an optimizer step.

    Attributes:
        step: optimizer steps done by then.
        share: share of the way to the target up to which to prune; None: everything is reactivated.
        final: whether the mask is final from then on.
    """

    step: int
    share: float | None
    final: bool = False


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # whether the model must be trained in between
    trains: ClassVar[bool] = True


class Phase(_Part):
    """The begin and end of pruning, as shares of the optimizer steps; the rest is recovery."""

    begin: Annotated[float, Field(ge=0, lt=1, description="Share of training before anything is pruned.")] = 0.0
    end: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which the mask is final; the rest is recovery.")
    ] = 0.5

    @model_validator(mode="after")
    def _in_order(self) -> Phase:
        if self.end < self.begin:
            raise ValueError(f"end must not come before begin, got begin {self.begin} and end {self.end}")
        return self

    def steps(self, max_steps: int, what: str) -> tuple[int, int]:
        """First and last optimizer step of a phase that cannot be empty.

        Args:
            max_steps: optimizer steps of the run.
            what: the phase's name in the message.

        Raises:
            LmcompressError: If no step lies between them.
        """
        begin, end = round(self.begin * max_steps), round(self.end * max_steps)
        if end <= begin:
            raise LmcompressError(
                f"{what} must have optimizer steps between begin and end, got {end - begin} of {max_steps}: train "
                "longer, or let the phase take a larger share"
            )
        return begin, end


class OneShot(_Part):
    """All pruning at once, then recovery."""

    kind: Literal["one_shot"] = "one_shot"
    begin: Annotated[float, Field(ge=0, lt=1, description="Share of training before it.")] = 0.0

    trains: ClassVar[bool] = False

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            One event, the final one.
        """
        return [Event(round(self.begin * max_steps), 1.0, final=True)]


class Iterative(Phase):
    """Several rounds, each with new scores, with recovery between them (TextPruner, Molchanov)."""

    kind: Literal["iterative"] = "iterative"
    rounds: Annotated[int, Field(ge=1, description="Number of prunings, in equal steps.")] = 8

    trains: ClassVar[bool] = False

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            One event per round; the last is final.

        Raises:
            LmcompressError: If the phase has fewer steps than rounds.
        """
        steps = rounds(round(self.begin * max_steps), round(self.end * max_steps), self.rounds)
        return [Event(s, (i + 1) / len(steps), final=i + 1 == len(steps)) for i, s in enumerate(steps)]


class Gradual(Phase):
    """Gradual pruning along a ramp (Zhu & Gupta)."""

    kind: Literal["gradual"] = "gradual"
    ramp: Annotated[
        str | Ramp,
        PartField(RAMPS),
        Field(description="cubic: fast at first, slow at the end, as in Zhu & Gupta; linear; or module:attribute."),
    ] = "cubic"
    every: Annotated[
        int,
        Field(
            ge=1,
            description="Optimizer steps between two prunings; with scores: calibration, each of them costs a pass "
            "over calibration_rows.",
        ),
    ] = 20

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            An event every :attr:`every` steps and a final one at the end.

        Raises:
            LmcompressError: If a custom ramp returns a share outside [0, 1].
        """
        begin, end = round(self.begin * max_steps), round(self.end * max_steps)
        ramp = ramp_of(self.ramp)
        shares = ((s, ramp(phase_share(s, begin, end))) for s in range(begin + self.every, end, self.every))
        # a share of 0 prunes nothing
        return [*(Event(step, share) for step, share in shares if share), Event(end, 1.0, final=True)]


class HardThresholding(Phase):
    """Cycles: prune the smallest and train the rest, then reactivate all and train all (IHT)."""

    kind: Literal["iht"] = "iht"
    begin: Annotated[float, Field(ge=0, lt=1, description="Share of training before the first cycle.")] = 0.1
    end: Annotated[float, Field(gt=0, le=1, description="Share of training after which all stays pruned.")] = 0.7
    cycles: Annotated[int, Field(ge=1, description="Number of times that all is pruned and reactivated.")] = 3
    dense_share: Annotated[float, Field(gt=0, lt=1, description="Share of each cycle in which all is trained.")] = 0.5

    def events(self, max_steps: int) -> list[Event]:
        """The events of a run, by step.

        Args:
            max_steps: optimizer steps of the run.

        Returns:
            Alternating prunings and reactivations; the last is final.

        Raises:
            LmcompressError: If a cycle would have fewer than two steps.
        """
        begin, end = round(self.begin * max_steps), round(self.end * max_steps)
        found: list[Event] = []
        before = "dense"
        for step in range(begin, end):
            now = cycle_phase(step, begin, end, self.cycles, self.dense_share)
            if now != before:
                found.append(Event(step, 1.0 if now == "sparse" else None))
            before = now
        return [*found, Event(end, 1.0, final=True)]
