"""Contents of training checkpoints besides ``Trainer``'s: the state of methods, the shapes of a cut student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.checkpoint.structure import stock_structure, structure_of
from lmcompress.errors import CheckpointError
from lmcompress.method import Method
from lmcompress.model import CompressedModel

STATE_FILE = "lmcompress_training_state.safetensors"


def save_state(methods: Sequence[Method], folder: str | Path) -> None:
    """Write the state of the methods' modules to :data:`STATE_FILE`; no file if there are none.

    Args:
        methods: methods of the run, in order.
        folder: folder of the checkpoint.
    """
    if state := _state_of(methods):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(folder) / STATE_FILE)


def load_state(methods: Sequence[Method], folder: str | Path) -> None:
    """Load the saved state into the methods' modules.

    Args:
        methods: as for :func:`save_state`.
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint was written without these methods, or with others.
    """
    wanted, file = _state_of(methods), Path(folder) / STATE_FILE
    if not wanted and not file.is_file():
        return
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: it was written without these methods; start from the beginning, or resume "
            "with the methods that wrote it"
        )
    state = load_file(file)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
        raise CheckpointError(
            f"{file} holds the state of other methods: it has {sorted(state)[:6]}, these methods have "
            f"{sorted(wanted)[:6]}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])


def _state_of(methods: Sequence[Method]) -> dict[str, Tensor]:
    return {
        f"{method.name}.{number}.{part}.{name}": tensor
        for number, method in enumerate(methods)
        for part, module in method.modules().items()
        for name, tensor in module.state_dict().items()
    }


def describe_structure(student: PreTrainedModel) -> None:
    """Record the shapes in the config, so that every training checkpoint reloads.

    Args:
        student: the student, possibly cut earlier.
    """
    described = CompressedModel(student).compression
    if described.structure is not None and structure_of(student) != stock_structure(student.config):
        student.config.quantization_config = described
