"""Configurations as they are written into reports."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from lmcompress.errors import LmcompressError


def saved(config: BaseModel) -> dict[str, Any]:
    """A configuration as JSON types, without what is None.

    Args:
        config: of any method.

    Raises:
        LmcompressError: If a criterion or ramp of the user's own cannot be found by a name.
    """
    try:
        return config.model_dump(mode="json", exclude_none=True)
    except PydanticSerializationError as error:
        # pydantic keeps the message alone
        raise LmcompressError(str(error).partition("LmcompressError: ")[2] or str(error)) from error
