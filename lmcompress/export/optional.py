"""The libraries of the extras for exports, imported where they are needed and nowhere else."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lmcompress.errors import LmcompressError

_LEAST = {
    "onnx": "1.18",
    "onnxruntime": "1.22",
    "onnxscript": "0.5",
    "openvino": "2025.2",
    "compressed_tensors": "0.15",
    "gguf": "0.10",
}
_LEAST_TORCH = "2.8"


def library(name: str, extra: str) -> Any:
    """An optional library.

    Args:
        name: name of the package, such as ``"onnxruntime"``.
        extra: the extra of lmcompress that installs it.

    Returns:
        The imported module.

    Raises:
        LmcompressError: If it is not installed, cannot be imported, or is too old.
    """
    remedy = f'pip install -U "lmcompress[{extra}]"'
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise LmcompressError(
            f"{name} must be installed for this, and importing it failed ({error}): {remedy}"
        ) from error
    package, least = name.partition(".")[0], _LEAST.get(name.partition(".")[0])
    try:
        installed = version(package)
    except PackageNotFoundError:
        # built from source, without metadata
        return module
    if least is not None and _numbers(installed) < _numbers(least):
        raise LmcompressError(f"{package} must be {least} or later, got {installed}: {remedy}")
    return module


def check_exporter(target: str) -> None:
    """Refuse an export for which something is missing, before any work.

    Args:
        target: ``"onnx"``, ``"openvino"``, ``"compressed-tensors"`` or ``"gguf"``.

    Raises:
        LmcompressError: If torch is too old for operators of quantization in graphs, or a library is missing or too
            old.
    """
    if target in ("compressed-tensors", "gguf"):
        library(target.replace("-", "_"), target)
        return
    if _numbers(torch.__version__) < _numbers(_LEAST_TORCH):
        raise LmcompressError(
            f"torch must be {_LEAST_TORCH} or later to export a model (operators of ONNX in its graphs), got "
            f"{torch.__version__}: pip install -U torch"
        )
    for name in ("onnx", "onnxscript", "onnxruntime" if target == "onnx" else "openvino"):
        library(name, target)


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:2])
