"""The safetensors files of a checkpoint: their headers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from lmcompress.errors import CheckpointError


class Stored(NamedTuple):
    """The header entry of a tensor.

    Attributes:
        shape: as stored.
        dtype: safetensors' name of the type: ``F32``, ``BF16``, ``I8``…
    """

    shape: tuple[int, ...]
    dtype: str


def safetensors_header(file: Path) -> dict[str, Stored]:
    """Shapes and types of the tensors in a safetensors file, whose length is checked against them.

    Args:
        file: path of the file; only its header is read.

    Returns:
        Shape and type by name, in the order of the data.

    Raises:
        CheckpointError: If the file is not a complete safetensors file.
    """
    try:
        with safe_open(str(file), framework="pt") as source:
            slices = {name: source.get_slice(name) for name in source.offset_keys()}
            return {name: Stored(tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file, it is damaged or cut off ({error}); fetch or copy it again"
        ) from error
