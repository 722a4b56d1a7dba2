"""The harness: order, pairs, and when there is a verdict. No test rests on a real time."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.evaluation import Sample, Turns, take_turns, timed, timing
from lmcompress.evaluation.timing import Quartiles, is_clear, is_one, steady_clock


def recorded(names, log):
    def call(name):
        def sample():
            log.append(name)
            return Sample(1.0, 2.0)

        return sample

    return {name: call(name) for name in names}


def rounds_of(log, size):
    return [log[start : start + size] for start in range(0, len(log), size)]


def test_every_round_has_each_call_once_and_the_first_twice_in_an_order_drawn_anew():
    log = []
    turns = take_turns(recorded("abc", log), repeats=20, warmup=2, pause=0)
    assert log[:6] == list("abcabc")
    rounds = rounds_of(log[6:], 4)
    assert all(Counter(each) == Counter("aabc") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 5
    # nothing always runs after the same other one
    assert {b for a, b in zip(log[6:], log[7:], strict=False) if a == "b"} == set("abc")
    assert list(turns.samples) == list("abc") and turns.first == "a"
    assert [len(values) for values in (*turns.samples.values(), turns.again)] == [20] * 4


def test_the_order_is_that_of_the_seed():
    logs = [[], [], []]
    for log, seed in zip(logs, (0, 0, 1), strict=True):
        take_turns(recorded("abc", log), repeats=8, seed=seed, pause=0)
    assert logs[0] == logs[1] != logs[2]


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    # the machine halves its speed from round to round, the ratio stays
    slower = [1.0, 2.0, 4.0, 8.0, 16.0]
    turns = Turns(
        {"a": [Sample(s, 3 * s) for s in slower], "b": [Sample(s / 4, s) for s in slower]},
        [Sample(s, s) for s in slower],
    )
    assert turns.ratio("a", "b", "wall") == Quartiles(4.0, 4.0, 4.0)
    assert turns.ratio("b", "a", "cpu") == pytest.approx((1 / 3,) * 3)
    assert turns.itself("wall") == Quartiles(1.0, 1.0, 1.0) and turns.itself("cpu").median == 3.0
    assert turns.milliseconds("b", "wall") == Quartiles(500.0, 1000.0, 2000.0)
    assert turns.milliseconds(None, "cpu").median == 4000.0


def test_both_clocks_are_read_around_the_call_alone(monkeypatch):
    moments = iter([Sample(10.0, 1.0), Sample(10.5, 1.9)])
    monkeypatch.setattr(timing, "now", lambda: next(moments))
    called = []
    assert timed(lambda: called.append(1))() == pytest.approx((0.5, 0.9))
    assert called == [1]


@pytest.mark.parametrize(
    ("ratio", "same"),
    [((0.98, 1.01, 1.03), True), ((1.0, 1.04, 1.1), True), ((1.001, 1.004, 1.006), True), ((1.02, 1.04, 1.05), False)],
)
def test_a_ratio_is_one_within_its_quartiles_or_to_two_decimals(ratio, same):
    assert is_one(Quartiles(*ratio)) is same


ratios = st.lists(st.floats(0.01, 100), min_size=3, max_size=3).map(sorted).map(lambda three: Quartiles(*three))


@given(ratios, ratios)
def test_a_difference_is_clear_only_beyond_that_of_a_call_over_itself(ratio, itself):
    if is_clear(ratio, itself):
        assert not is_one(ratio)
        assert ratio.lower > itself.upper or ratio.upper < itself.lower
    assert not is_clear(itself, itself)


def test_cpu_time_counts_on_one_thread_of_a_cpu_alone():
    clocks = [steady_clock(threads, torch.device(place)) for threads, place in ((1, "cpu"), (2, "cpu"), (1, "cuda"))]
    assert clocks == ["cpu", "wall", "wall"]
