"""Configurations as stored in reports."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from lmcompress.errors import LmcompressError


def saved(config: BaseModel) -> dict[str, Any]:
    """A configuration as JSON types, without None values.

    Args:
        config: a configuration of any method.

    Raises:
        LmcompressError: If a custom criterion or ramp cannot be found by a name.
    """
    try:
        return config.model_dump(mode="json", exclude_none=True)
    except PydanticSerializationError as error:
        # pydantic keeps only the message
        raise LmcompressError(str(error).partition("LmcompressError: ")[2] or str(error)) from error
