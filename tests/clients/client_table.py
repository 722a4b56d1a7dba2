"""The table of clients: every cell is declared by a test that works, or is refused, as declared."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import pytest
from client_forms import FORMS


class Refusal(NamedTuple):
    """How a client is told that it cannot use a form.

    Attributes:
        match: pattern of the message.
        reason: for the table.
    """

    match: str
    reason: str


class Elsewhere(RuntimeError):
    """An error of a driver in the process without lmcompress, with its type and message."""


TABLE: dict[str, dict[str, Refusal | None]] = {}
"""By client and form: None where it works. Filled when the modules of tests are imported."""

_TESTS: dict[tuple[str, str], str] = {}


def client(name: str, *, forms: tuple[str, ...] = tuple(FORMS), **refused: Refusal) -> Callable[..., Any]:
    """Declare the cells of a client: the test runs for each form, and passes where the form is not refused.

    Args:
        name: row of the table.
        forms: forms that the test is for; others have no cell, or one by another test.
        **refused: by form, with ``_`` for a hyphen or a space: the refusal that is expected.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        expected = {form: refused.get(form.replace("-", "_").replace(" ", "_")) for form in forms}
        assert set(refused) == {form.replace("-", "_").replace(" ", "_") for form in forms if expected[form]}
        TABLE.setdefault(name, {}).update(expected)
        for form in expected:
            assert _TESTS.setdefault((name, form), test.__qualname__) == test.__qualname__, f"two tests for {name}"

        @wraps(test)
        def checked(*args: Any, form: Any, **kwargs: Any) -> None:
            refusal = expected[form.name]
            if refusal is None:
                test(*args, form=form, **kwargs)
                return
            with pytest.raises((ValueError, Elsewhere), match=refusal.match):
                test(*args, form=form, **kwargs)

        return pytest.mark.clients(pytest.mark.parametrize("form", forms, indirect=True)(checked))

    return decorate
