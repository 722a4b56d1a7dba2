import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lmcompress.activations import running
from lmcompress.errors import LmcompressError


@pytest.mark.parametrize(
    ("items", "terminal", "enabled", "shown"),
    [
        ([1, 2, 3], True, True, True),
        ([1, 2, 3], False, True, False),
        ([1, 2, 3], True, False, False),
        ([1], True, True, False),
    ],
    ids=["terminal", "file", "switched-off", "one-item"],
)
def test_the_bar_shows_only_where_it_helps_and_changes_no_item(monkeypatch, items, terminal, enabled, shown):
    stream = io.StringIO()
    monkeypatch.setattr(running, "Console", lambda stderr: Console(file=stream, force_terminal=terminal))
    assert list(running.with_progress(items, "perplexity", enabled=enabled)) == items
    assert ("perplexity" in stream.getvalue()) == shown


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_the_longest_first(lengths, batch_size):
    batches = running.batches_by_length(lengths, batch_size)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_a_batch_has_a_row():
    with pytest.raises(LmcompressError, match="batch_size must be >= 1, got 0"):
        running.batches_by_length([3], 0)
