import io

import pytest
from rich.console import Console

from lmcompress.activations import running


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
