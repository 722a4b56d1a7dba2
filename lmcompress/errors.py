"""The errors that lmcompress raises for its users, and help with misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LmcompressError(ValueError):
    """Something that came in was not what was expected; the message says what, and what to do."""


class CheckpointError(LmcompressError):
    """A checkpoint is damaged, hostile, or of another make than its config says."""


class EquivalenceError(LmcompressError):
    """A model that was saved and reloaded does not answer as the one that was trained; nothing was written."""


class UnknownFamilyError(LmcompressError):
    """A model family that :mod:`lmcompress.families` does not describe."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause for an error message: the valid name nearest to ``name``, and all of them.

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
    return f"{hint} Valid are: {', '.join(names)}"
