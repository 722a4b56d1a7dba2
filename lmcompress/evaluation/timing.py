"""Times of several calls, taken in turn: random order within rounds, wall and CPU time, the first call twice."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

Clock = Literal["wall", "cpu"]

PAUSE = 0.005
"""Seconds of sleep before a call: threads of the one before it that wait actively for more work give up meanwhile."""


WAITING = 1.25
"""Time that passed over CPU time on one thread, from which on a call waited: others had so much of its core that its
caches are theirs.

The ratio of that call to itself does not show it: on a core shared by eight, it was 1.00, and bf16 1.6 times as fast as
fp32 in place of 2.4."""


class Sample(NamedTuple):
    """The time of one call.

    Attributes:
        wall: seconds that passed.
        cpu: seconds that all threads of its process computed.
    """

    wall: float
    cpu: float


Timed = Callable[[], Sample]
"""A call that says how long it took."""


class Quartiles(NamedTuple):
    """The middle half of several measurements.

    Attributes:
        lower: first quartile.
        median: second quartile.
        upper: third quartile.
    """

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class Turns:
    """Times of calls that took turns.

    Attributes:
        samples: by name, a sample for each round.
        again: of the first call, timed a second time in each round.
    """

    samples: Mapping[str, Sequence[Sample]]
    again: Sequence[Sample]

    @property
    def first(self) -> str:
        """Name of the call that the others are compared with."""
        return next(iter(self.samples))

    def milliseconds(self, name: str | None, clock: Clock) -> Quartiles:
        """Milliseconds of a call.

        Args:
            name: which one; None: the first, timed again.
            clock: wall or CPU time.
        """
        return quartiles([1000 * seconds for seconds in self._seconds(name, clock)])

    def ratio(self, one: str | None, other: str | None, clock: Clock) -> Quartiles:
        """Time of one call over the time of another one, of pairs within rounds.

        What slows down a whole round thus slows down both.

        Args:
            one: which one; None: the first, timed again.
            other: as ``one``.
            clock: wall or CPU time.
        """
        pairs = zip(self._seconds(one, clock), self._seconds(other, clock), strict=True)
        # a clock may stand still during a call that sleeps
        return quartiles([mine / max(theirs, 1e-9) for mine, theirs in pairs])

    def itself(self, clock: Clock) -> Quartiles:
        """The first call over itself, which is 1 on a quiet machine.

        Args:
            clock: wall or CPU time.
        """
        return self.ratio(self.first, None, clock)

    def _seconds(self, name: str | None, clock: Clock) -> list[float]:
        return [getattr(sample, clock) for sample in (self.again if name is None else self.samples[name])]


def take_turns(
    calls: Mapping[str, Timed], *, repeats: int, warmup: int = 2, seed: int = 0, pause: float = PAUSE
) -> Turns:
    """Time calls in rounds, each of them once in every round, in an order drawn anew; the first of them twice.

    In a fixed order, each call would always run after the same other one, and share its caches and idle threads.

    Args:
        calls: by name; the first is what the others are compared with.
        repeats: rounds that count.
        warmup: rounds before those.
        seed: of the orders.
        pause: seconds of sleep before each call.

    Returns:
        All samples, in the order of ``calls``.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    first = next(iter(calls))
    order: list[str | None] = [*calls, None]
    samples: dict[str | None, list[Sample]] = {name: [] for name in order}
    generator = random.Random(seed)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            time.sleep(pause)
            samples[name].append(calls[first if name is None else name]())
    return Turns({name: samples[name] for name in calls}, samples[None])


def now() -> Sample:
    """Wall and CPU clock of this process."""
    return Sample(time.perf_counter(), time.process_time())


def timed(call: Callable[[], Any], device: torch.device | None = None) -> Timed:
    """A call of this process that says how long it took.

    Args:
        call: what to time.
        device: where it computes; on a GPU, it is over when the GPU has finished.
    """

    def sample() -> Sample:
        _synchronize(device)
        before = now()
        call()
        _synchronize(device)
        after = now()
        return Sample(after.wall - before.wall, after.cpu - before.cpu)

    return sample


def steady_clock(threads: int, device: torch.device) -> Clock:
    """The clock that other programs on the machine change least.

    Args:
        threads: torch's threads.
        device: where models compute.

    Returns:
        ``cpu`` on one thread of a CPU; ``wall`` on several, which wait for each other, and on a GPU.
    """
    return "cpu" if threads == 1 and device.type == "cpu" else "wall"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of measurements, interpolated between neighbours.

    Args:
        values: at least two.
    """
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def waited(wall: float, cpu: float) -> bool:
    """Whether a call waited for other programs, which had its core.

    Args:
        wall: time that passed.
        cpu: time that it computed, in the same unit.
    """
    return wall > WAITING * cpu


def is_one(ratio: Quartiles) -> bool:
    """Whether a ratio cannot be told from 1: 1 lies within its quartiles, or it is 1.00 to two decimals.

    Args:
        ratio: of pairs within rounds.

    Example:
        >>> is_one(Quartiles(0.98, 1.01, 1.03)), is_one(Quartiles(1.02, 1.04, 1.05))
        (True, False)
    """
    return ratio.lower <= 1 <= ratio.upper or f"{ratio.median:.2f}" == "1.00"


def is_clear(ratio: Quartiles, itself: Quartiles) -> bool:
    """Whether a ratio differs from 1 by more than that of a call over itself.

    Args:
        ratio: of two calls.
        itself: of the first call over itself, in the same rounds.

    Returns:
        True if the quartiles of both do not overlap, and those of the ratio do not contain 1.
    """
    apart = ratio.lower > itself.upper or ratio.upper < itself.lower
    return apart and not is_one(ratio)


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
