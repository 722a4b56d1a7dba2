"""The errors that lmcompress raises for its users, and help with misspelt names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

_SPELLING: ContextVar[Mapping[str, str] | None] = ContextVar("_SPELLING", default=None)


class LmcompressError(ValueError):
    """Something that came in was not what was expected; the message says what, and what to do."""


class CheckpointError(LmcompressError):
    """A checkpoint is damaged, hostile, or of another make than its config says."""


class EquivalenceError(LmcompressError):
    """A model that was saved and reloaded does not answer as the one that was trained; nothing was written."""


class UnknownFamilyError(LmcompressError):
    """A model family that :mod:`lmcompress.families` does not describe."""


MOST_NAMES = 50
"""The greatest number of names that a message lists."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause for an error message: the valid name nearest to ``name``, and all of them, or the first of very many.

    Args:
        name: what came.
        valid: what would have been right.

    Returns:
        ``"; did you mean 'x'? Valid are: a, b, x"``.

    Example:
        >>> nearest("temprature", ["temperature", "weight"])
        "; did you mean 'temperature'? Valid are: temperature, weight"
    """
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    more = f" … and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{hint} Valid are: {', '.join(names[:MOST_NAMES]) or 'none'}{more}"


@contextmanager
def arguments_called(spelling: Mapping[str, str]) -> Iterator[None]:
    """Within the block, messages name arguments as they are written where the user is; the outermost block wins.

    Args:
        spelling: name of an argument in Python to what the user wrote: ``{"text_columns": "--text-column"}``.
    """
    token = _SPELLING.set(_SPELLING.get() or spelling)
    try:
        yield
    finally:
        _SPELLING.reset(token)


def argument(name: str, value: str | None = None) -> str:
    """An argument as the reader of a message can write it: as in Python, or as :func:`arguments_called` says.

    Args:
        name: of the argument in Python.
        value: to give it, as Python writes it, or empty for any; None: the name alone.

    Example:
        >>> argument("kind"), argument("kind", "'causal_lm'")
        ('kind', "kind='causal_lm'")
        >>> with arguments_called({"kind": "--kind"}):
        ...     argument("kind", "'causal_lm'")
        "--kind 'causal_lm'"
    """
    known = (_SPELLING.get() or {}).get(name)
    if value is None:
        return known or name
    if known is None:
        return f"{name}={value}"
    return f"{known}{' ' if known.startswith('-') else ': '}{value}".rstrip()
