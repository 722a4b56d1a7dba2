"""A finished model into the folder of a trainer, beside the files that are there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcompress.checkpoint.saving import Batch, Equivalence
from lmcompress.errors import LmcompressError
from lmcompress.method import calibration_rows
from lmcompress.model import CompressedModel

# weights of an earlier save under other names would be loaded in place of the new ones
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json")


def write_finished(
    compressed: CompressedModel, folder: str | Path, *, tokenizer: Any = None, batches: Sequence[Batch] | None = None
) -> Equivalence:
    """Save a finished model, and keep what else the folder holds, such as training checkpoints and logs.

    Args:
        compressed: the model.
        folder: may exist; its model files are replaced.
        tokenizer: saved alongside, if there is one.
        batches: inputs of the round-trip check; default: random ones.

    Returns:
        The measured differences.

    Raises:
        EquivalenceError: If the reloaded model differs; nothing was changed.
        LmcompressError: If ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise LmcompressError(f"{folder} must be a folder to save a model in, it is a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        measured = compressed.save_pretrained(made, tokenizer=tokenizer, batches=batches)
        folder.mkdir(exist_ok=True)
        for pattern in _WEIGHTS:
            for old in folder.glob(pattern):
                old.unlink()
        # the config last: without it, nothing loads
        for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    return measured


def probes(trainer: Any, rows: int = 8) -> list[Batch] | None:
    """Batches of the training data for the round-trip check, or None if none can be drawn.

    Args:
        trainer: the trainer.
        rows: number of rows.
    """
    try:
        batches = calibration_rows(trainer, rows, max(1, rows // 2), trainer.args.seed)
    except LmcompressError:
        return None
    # of a model that reads no tokens, the check draws its own
    return batches if batches and all("input_ids" in batch for batch in batches) else None
