"""Schedules: their ends, that they do not fall, and that cycles are whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcompress import LmcompressError
from lmcompress.schedules import RAMPS, cubic, cycle_phase, linear, phase_share, rounds


@pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
def test_ramps_begin_at_nothing_end_at_the_target_and_never_fall(ramp):
    values = [ramp(i / 100) for i in range(101)]
    assert values[0] == 0 and values[-1] == 1 and values == sorted(values)
    with pytest.raises(LmcompressError, match=r"progress must be in \[0, 1\], got 1.5"):
        ramp(1.5)


def test_the_cubic_ramp_is_zhu_and_guptas():
    final, initial, start, length = 0.8, 0.0, 10, 40
    for step in range(start, start + length + 1):
        theirs = final + (initial - final) * (1 - (step - start) / length) ** 3
        assert final * cubic(phase_share(step, start, start + length)) == pytest.approx(theirs)
    assert cubic(0.3) > linear(0.3)


def test_a_phase_that_is_empty_is_over():
    assert phase_share(5, 5, 5) == 1.0
    assert phase_share(4, 5, 9) == 0.0


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 20))
def test_rounds_are_in_order_and_include_both_ends(begin, length, count):
    if count > 1 and length < count - 1:
        with pytest.raises(LmcompressError, match="need at least .* optimizer steps"):
            rounds(begin, begin + length, count)
        return
    steps = rounds(begin, begin + length, count)
    assert len(set(steps)) == len(steps) == count
    assert steps == sorted(steps) and steps[0] == begin
    assert count == 1 or steps[-1] == begin + length


def test_no_rounds_are_refused():
    with pytest.raises(LmcompressError, match="at least 1 round, got 0"):
        rounds(0, 10, 0)


@given(st.integers(0, 20), st.integers(2, 120), st.integers(1, 6), st.floats(0.05, 0.95))
def test_every_cycle_is_pruned_first_and_dense_then_and_the_end_is_pruned(begin, length, cycles, dense_share):
    if length < 2 * cycles:
        with pytest.raises(LmcompressError, match="cycles need at least"):
            cycle_phase(begin, begin, begin + length, cycles, dense_share)
        return
    phases = [cycle_phase(s, begin, begin + length, cycles, dense_share) for s in range(begin + length + 3)]
    assert phases[:begin] == ["dense"] * begin
    assert phases[begin + length :] == ["sparse"] * 3
    changes = sum(a == "dense" and b == "sparse" for a, b in zip(phases, phases[1:], strict=False))
    assert changes == cycles + (begin > 0)
    assert phases[begin] == "sparse"


def test_cycles_out_of_range_are_refused():
    with pytest.raises(LmcompressError, match=r"dense_share in \(0, 1\), got 2 and 1.0"):
        cycle_phase(0, 0, 10, 2, 1.0)
