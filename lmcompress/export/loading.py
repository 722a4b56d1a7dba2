"""Loading what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from lmcompress.errors import LmcompressError
from lmcompress.export.causal import TextGeneration, TextGenerationWithPast
from lmcompress.export.folder import RECORD
from lmcompress.export.generation import ExportedLanguageModel
from lmcompress.export.graph import ONNX_FILE, OPENVINO_FILE
from lmcompress.export.runtime import Exported
from lmcompress.export.sessions import session_of


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported model.

    Args:
        folder: any path.
    """
    return any((Path(folder) / name).is_file() for name in (ONNX_FILE, OPENVINO_FILE))


def load_exported(folder: str | Path, threads: int | None = None, precision: str | None = None) -> Exported:
    """Load an exported model.

    Args:
        folder: what :func:`~lmcompress.export.export_model` wrote.
        threads: number of threads; None: the runtime's choice.
        precision: precision of what is not quantized, ``"f32"``, ``"bf16"`` or ``"f16"``; for OpenVINO only. None: the
            runtime's choice.

    Raises:
        LmcompressError: If the folder holds no exported model, its runtime is not installed or cannot load it, or its
            config is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LmcompressError(
            f"there is no folder {folder}; an exported model is a folder that lmcompress export wrote"
        )
    session = session_of(folder, threads, precision)
    if not (folder / "config.json").is_file():
        raise LmcompressError(f"{folder} has no config.json: the folder is not complete; export or copy it again")
    config = _config(folder)
    if record(folder).get("task") not in (TextGeneration.task, TextGenerationWithPast.task):
        return Exported(session, config)
    generation = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG_NAME).is_file() else None
    return ExportedLanguageModel(session, config, generation)


def _config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    # no JSON, no object, a model type that is missing or unknown, a value of another type
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LmcompressError(
            f"cannot read {folder / 'config.json'}: {first[:400]}; the folder is damaged, export or copy it again"
        ) from error


def record(folder: str | Path) -> dict[str, Any]:
    """What was recorded of an export; empty if nothing was.

    Args:
        folder: what :func:`~lmcompress.export.export_model` wrote.
    """
    file = Path(folder) / RECORD
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise LmcompressError(f"{file} is no JSON: the folder is damaged; export or copy it again") from error
    return found if isinstance(found, dict) else {}
