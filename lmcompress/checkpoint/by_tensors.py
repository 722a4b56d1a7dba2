"""The round-trip check of a large model, which never holds it twice: tensor by tensor, and two blocks that are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from lmcompress.checkpoint.saving import Batch, Equivalence, compared, outputs_of
from lmcompress.checkpoint.skeleton import model_from_config
from lmcompress.errors import EquivalenceError
from lmcompress.families import anatomy_of
from lmcompress.families.inside import name_of

LARGE = 4 << 30
"""Bytes of weights from which on a model is checked in this way by default."""


def check_by_tensors(
    model: PreTrainedModel, folder: Path, batches: Sequence[Batch], *, tolerance: float, inputs: str, format: str
) -> Equivalence:
    """Refuse a written checkpoint whose tensors, shapes or blocks are not those of the model in memory.

    Every tensor of the files is read alone and compared bit by bit. The config's shapes come from a skeleton on
    ``meta``. The first and the last block of that skeleton get the tensors of the files, and are run on what these
    blocks read in the model. At any time there are the model, one more tensor or one more block.

    Args:
        model: the model that was written.
        folder: folder it was written to, with plain tensors.
        batches: the first is what the blocks are run on.
        tolerance: max abs difference of a block's outputs allowed, relative to the max abs output.
        inputs: origin of the batches, for the result.
        format: format it was written in, for messages.

    Returns:
        The measured differences of the blocks' outputs.

    Raises:
        EquivalenceError: If a tensor is missing or differs in a bit, the config describes other shapes, or a block's
            outputs differ.
    """
    state: dict[str, Tensor] = model.state_dict()
    count = _compare_tensors(state, folder)
    with torch.device("meta"):
        skeleton = model_from_config(AutoConfig.from_pretrained(folder), type(model)).eval()
    _compare_shapes(state, skeleton.state_dict())
    blocks = [block.module for block in anatomy_of(model).blocks]
    numbers = sorted({0, len(blocks) - 1})
    before, again = _run_blocks(model, [blocks[number] for number in numbers], batches[0])
    after = [
        again[place](_filled(anatomy_of(skeleton).blocks[number].module, blocks[number], model, folder))
        for place, number in enumerate(numbers)
    ]
    found = compared(after, before, tolerance, inputs, format)
    return Equivalence(found.max_error, found.relative_error, 1, inputs, tensors=count)


def _compare_tensors(state: Mapping[str, Tensor], folder: Path) -> int:
    """Compare the files with the tensors in memory; the number of tensors read."""
    read = set()
    for name, stored in _stored(folder):
        own = state.get(name)
        if own is None or own.shape != stored.shape or own.dtype != stored.dtype or not _same_bits(own, stored):
            raise EquivalenceError(
                f"the tensor {name} on disk is not the one in memory: expected "
                f"{'none' if own is None else f'{tuple(own.shape)} {own.dtype}'}, got {tuple(stored.shape)} "
                f"{stored.dtype}, or other bits; nothing was written"
            )
        read.add(name)
    written = {(state[name].data_ptr(), state[name].shape) for name in read}
    missing = [name for name, tensor in state.items() if (tensor.data_ptr(), tensor.shape) not in written]
    if missing:
        raise EquivalenceError(f"the tensor {missing[0]} is not on disk (of {len(missing)}); nothing was written")
    return len(read)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # as bytes, so that NaN equals itself and -0 is not 0
    one, other = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return torch.equal(one, other)


def _stored(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files one by one."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118: it is no mapping
                if wanted(name):
                    yield name, shard.get_tensor(name)


def _compare_shapes(state: Mapping[str, Tensor], skeleton: Mapping[str, Tensor]) -> None:
    expected, found = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (state, skeleton))
    if expected != found:
        name = next(n for n in (*expected, *found) if expected.get(n) != found.get(n))
        raise EquivalenceError(
            f"config.json describes the tensor {name} as {found.get(name, 'none')}, in memory it is "
            f"{expected.get(name, 'none')}; nothing was written"
        )


def _run_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Batch
) -> tuple[list[Tensor], list[Callable[[nn.Module], Tensor]]]:
    """The outputs of some blocks in a forward pass, and for each a function that runs another block on its input."""
    outputs: list[Tensor] = []
    again: list[Callable[[nn.Module], Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # a cache would have grown by then
        own = {name: value for name, value in kwargs.items() if not name.startswith("past_key_value")}
        own |= {"use_cache": False} if "use_cache" in own else {}
        outputs.append(_first(output))

        def run(other: nn.Module) -> Tensor:
            with torch.no_grad():
                return _first(other(*args, **own))

        again.append(run)

    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
    try:
        outputs_of(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return outputs, again


def _first(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).detach().float().cpu()


def _filled(block: nn.Module, own: nn.Module, model: PreTrainedModel, folder: Path) -> nn.Module:
    """A block of the skeleton with the tensors of the files; what files do not hold is the model's."""
    path = name_of(model, own)
    stored = {
        name.removeprefix(f"{path}."): tensor.to(model.device)
        for name, tensor in _stored(folder, lambda name: name.startswith(f"{path}."))
    }
    block.load_state_dict(stored, strict=False, assign=True)
    for name, buffer in own.named_buffers():
        parent, _, last = name.rpartition(".")
        if name not in stored:
            block.get_submodule(parent).register_buffer(last, buffer, persistent=False)
    return block
