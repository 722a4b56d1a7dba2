"""Grouping by length: each row once, little padding, no order among batches, the same after a resume."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.trainers.sampling import LengthGroupedSampler


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
)
def test_every_row_comes_exactly_once(lengths, batch_size, seed, epoch):
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths))) and len(sampler) == len(lengths)


def batches_of(sampler, size):
    rows = list(sampler)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_batches_hold_similar_lengths_and_come_in_no_order():
    rng = random.Random(0)
    lengths = [rng.randint(3, 100) for _ in range(4003)]
    batches = batches_of(LengthGroupedSampler(lengths, 16), 16)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    longest = torch.tensor([max(lengths[i] for i in batch) for batch in batches[:-1]], dtype=torch.float)
    # transformers' own sampler sorts the batches of a pool: neighbours then correlate almost perfectly
    neighbours = torch.corrcoef(torch.stack([longest[:-1], longest[1:]]))[0, 1]
    assert abs(neighbours) < 0.2


def test_the_order_is_of_seed_and_epoch_alone():
    lengths = [i % 37 + 1 for i in range(500)]
    first, again, other = (LengthGroupedSampler(lengths, 8, seed) for seed in (0, 0, 1))
    torch.manual_seed(1)
    assert list(first) == list(again) != list(other)
    epoch_0 = list(first)
    first.set_epoch(1)
    assert list(first) != epoch_0
    first.set_epoch(0)
    assert list(first) == epoch_0


def test_a_batch_has_at_least_one_row():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        LengthGroupedSampler([1, 2], 0)
