"""The errors that lmcompress raises for its users, and suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

_SPELLING: ContextVar[Mapping[str, str] | None] = ContextVar("_SPELLING", default=None)


class LmcompressError(ValueError):
    """An input is not as expected; the message names the input, the expectation and the remedy."""


class CheckpointError(LmcompressError):
    """A checkpoint is damaged, malicious, or does not match its config."""


class EquivalenceError(LmcompressError):
    """The outputs of a saved and reloaded model differ from those of the model in memory; nothing was written."""


class UnknownFamilyError(LmcompressError):
    """A model family that :mod:`lmcompress.families` does not describe."""


MOST_NAMES = 50
"""The greatest number of names that a message lists."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause for an error message: the valid name nearest to ``name``, and all of them, or the first of very many.

    Args:
        name: the invalid name.
        valid: the valid names.

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
    """Within the block, messages spell arguments as the user writes them; the outermost block wins.

    Args:
        spelling: name of an argument in Python to the user's spelling: ``{"text_columns": "--text-column"}``.
    """
    token = _SPELLING.set(_SPELLING.get() or spelling)
    try:
        yield
    finally:
        _SPELLING.reset(token)


def argument(name: str, value: str | None = None) -> str:
    """An argument as the reader of a message can write it: as in Python, or as set by :func:`arguments_called`.

    Args:
        name: name of the argument in Python.
        value: its value, as written in Python, or empty for any; None: the name only.

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
