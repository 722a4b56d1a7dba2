"""Several tasks in one run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lmcompress.data import (
    MultiTaskCollator,
    MultiTaskDataset,
    Task,
    TaskSampledBatches,
    collator,
    sampling_probabilities,
)
from lmcompress.errors import LmcompressError

SIZES = {"a": 40, "b": 10, "c": 3}
STARTS = {"a": range(0, 40), "b": range(40, 50), "c": range(50, 53)}


def tasks_of(batches):
    """The task of each batch; fails if one is of several."""
    found = []
    for batch in batches:
        (name,) = {name for row in batch for name, rows in STARTS.items() if row in rows}
        found.append(name)
    return found


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0, 1))
def test_probabilities_follow_the_power_of_the_sizes(sizes, tau):
    p = sampling_probabilities(sizes, tau)
    assert p.sum() == pytest.approx(1)
    for i, size in enumerate(sizes):
        assert p[i] / p[0] == pytest.approx((size / sizes[0]) ** tau, rel=1e-6)


def test_tau_goes_from_even_to_proportional():
    np.testing.assert_allclose(sampling_probabilities([30, 10], 0), [0.5, 0.5])
    np.testing.assert_allclose(sampling_probabilities([30, 10], 1), [0.75, 0.25])


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_batch_is_full_and_of_one_task(batch_size):
    batches = list(TaskSampledBatches(SIZES, batch_size, tau=0.0, num_batches=60))
    assert {len(batch) for batch in batches} == {batch_size}
    assert set(tasks_of(batches)) == set(SIZES)


def test_tasks_come_as_often_as_they_should():
    seen = Counter(tasks_of(TaskSampledBatches(SIZES, 1, tau=0.5, num_batches=6000)))
    for name, p in zip(SIZES, sampling_probabilities(list(SIZES.values()), 0.5), strict=True):
        assert abs(seen[name] / 6000 - p) < 0.03


def test_no_row_comes_twice_before_all_rows_of_its_task_came_once():
    rows = [row for batch in TaskSampledBatches({"a": 7}, 3, num_batches=14) for row in batch]
    assert [sorted(rows[i : i + 7]) for i in range(0, 42, 7)] == [list(range(7))] * 6


def test_seed_and_epoch_decide_and_nothing_else():
    sampler = TaskSampledBatches(SIZES, 4, seed=3)
    first = list(sampler)
    assert first == list(sampler) == list(TaskSampledBatches(SIZES, 4, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first != list(TaskSampledBatches(SIZES, 4, seed=4))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_all_processes_have_one_task_at_each_step_and_different_rows(num_processes):
    def shard(index):
        batches = TaskSampledBatches(SIZES, 2, tau=0.5, num_batches=20, num_processes=num_processes)
        return list(BatchSamplerShard(batches, num_processes, index))

    shards = [shard(index) for index in range(num_processes)]
    assert len({len(batches) for batches in shards}) == 1
    assert len({tuple(tasks_of(batches)) for batches in shards}) == 1
    assert sum(map(len, shards)) == len(TaskSampledBatches(SIZES, 2, num_batches=20, num_processes=num_processes))
    if num_processes > 1:
        assert shards[0] != shards[1]


@pytest.mark.parametrize(("num_batches", "num_processes", "length"), [(None, 1, 14), (None, 4, 16), (5, 2, 6)])
def test_the_length_is_that_of_what_comes(num_batches, num_processes, length):
    sampler = TaskSampledBatches(SIZES, 4, num_batches=num_batches, num_processes=num_processes)
    assert len(sampler) == len(list(sampler)) == length


def test_rows_are_joined_in_order_and_know_their_task():
    both = MultiTaskDataset({"a": Dataset.from_dict({"x": [1, 2]}), "b": [{"x": 3}]})
    assert [both[i] for i in range(3)] == [{"x": 1, "task": "a"}, {"x": 2, "task": "a"}, {"x": 3, "task": "b"}]
    assert both[-1] == both[2]
    assert both.sizes == {"a": 2, "b": 1}
    with pytest.raises(IndexError, match="row 3 of 3"):
        both[3]


def test_a_loader_gives_batches_padded_by_their_task(bert):
    score = Task("score", "regression", ("text",), "label")
    tone = Task("tone", "classification", ("text",), "label", ("x", "y"))
    rows = MultiTaskDataset({
        "tone": [{"input_ids": [1] * (i + 1), "labels": i % 2} for i in range(5)],
        "score": [{"input_ids": [1] * (i + 1), "labels": i / 2} for i in range(7)],
    })  # fmt: skip
    loader = DataLoader(
        rows,
        batch_sampler=TaskSampledBatches(rows.sizes, 3, tau=0.0, num_batches=12),
        collate_fn=MultiTaskCollator({"tone": collator(tone, bert), "score": collator(score, bert)}),
    )
    types = {batch["task"]: batch["labels"].dtype for batch in loader}
    assert types == {"tone": torch.int64, "score": torch.float32}


def test_what_does_not_fit_is_refused(bert):
    for sizes in ([], [3, 0]):
        with pytest.raises(LmcompressError, match="every task must have at least one row, got sizes"):
            sampling_probabilities(sizes)
    with pytest.raises(LmcompressError, match=r"tau must be in \[0, 1\], got 2"):
        sampling_probabilities([1], 2)
    for name in ("batch_size", "num_batches", "num_processes"):
        with pytest.raises(LmcompressError, match=f"{name} must be >= 1, got 0"):
            TaskSampledBatches(SIZES, **{"batch_size": 1, name: 0})
    with pytest.raises(LmcompressError, match="needs at least one task, got none"):
        MultiTaskDataset({})
    with pytest.raises(LmcompressError, match="at least one row, but these have none: b"):
        MultiTaskDataset({"a": [{}], "b": []})
    collate = MultiTaskCollator({"tone": lambda rows: {}})
    with pytest.raises(
        LmcompressError, match="a batch must be of one task, got rows of score, tone; draw batches with"
    ):
        collate([{"task": "tone"}, {"task": "score"}])
    with pytest.raises(LmcompressError, match="no collator for task 'tune'; did you mean 'tone'"):
        collate([{"task": "tune"}])
