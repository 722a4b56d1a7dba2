"""Blocks that share their parameters.

In a state dict, and so in files, a block that shares another's parameters has one number, the other's, in place of its
first parameter, and its own buffers. A loader without support for this finds a tensor of another shape and refuses;
tensors that are merely missing would be initialized at random by Transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError, LmcompressError

_SOURCE = "_lmcompress_source"


def shared_sources(blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each block the number of the first one with the same parameters, possibly its own.

    Args:
        blocks: blocks of one model, in order.

    Returns:
        Numbers counted from 0.

    Raises:
        LmcompressError: If two blocks share some of their parameters but not all.
    """
    owners: dict[int, int] = {}
    sources = []
    for index, block in enumerate(blocks):
        found = {owners.setdefault(id(parameter), index) for parameter in block.parameters()}
        if len(found) > 1 or (found and index not in found and _SOURCE not in vars(block)):
            raise LmcompressError(
                f"blocks must share all of their parameters or none, block {index} has some of block {min(found)}: it "
                "was changed after sharing; change the model first and share its blocks afterwards (share_layers)"
            )
        sources.append(found.pop() if found else index)
    return tuple(sources)


def share_parameters(blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Give blocks the parameters of earlier ones; each keeps its own buffers.

    Args:
        blocks: blocks of the same shapes; modified in place.
        sources: for each block the number of the block whose parameters it gets.
    """
    for index, source in enumerate(sources):
        if source == index:
            continue
        block, owner = blocks[index], dict(blocks[source].named_modules())
        for name, module in block.named_modules():
            # in the order of the source's parameters
            module._parameters = dict(owner[name]._parameters)
        # not a buffer, which would have a name of its own in the state dict
        vars(block)[_SOURCE] = torch.tensor([source])
        block.register_state_dict_post_hook(_source_only)
        block.register_load_state_dict_pre_hook(_with_parameters)


def empty_shared(blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Remove the parameters of blocks that will share those of earlier ones, while a skeleton is filled.

    Args:
        blocks: modified in place.
        sources: as for :func:`fill_shared`, which must be called once the others have values.
    """
    for index, source in enumerate(sources):
        if source == index:
            continue
        owner, own = _first(blocks[index])
        device = owner._parameters[own].device  # type: ignore[union-attr]
        for module in blocks[index].modules():
            module._parameters.update(dict.fromkeys(module._parameters))
            # Transformers would initialize what the files lack; buffers alone, such as GPT-J's sinusoids, it must
            if module._parameters or not module._buffers:
                module._is_hf_initialized = True  # type: ignore[assignment]
        del owner._parameters[own]
        owner.register_buffer(own, torch.empty(1, dtype=torch.int64, device=device))
        vars(blocks[index])[_SOURCE] = (owner, own)


def fill_shared(blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Let the blocks emptied by :func:`empty_shared` share parameters.

    Args:
        blocks: modified in place.
        sources: for each block the number of the block whose parameters it gets.

    Raises:
        CheckpointError: If the files name other blocks.
    """
    for index, source in enumerate(sources):
        if source == index:
            continue
        owner, own = vars(blocks[index]).pop(_SOURCE)
        found = owner._buffers.pop(own)
        if not found.is_meta and (found.is_floating_point() or found.tolist() != [source]):
            raise CheckpointError(
                f"block {index} has the parameters of block {source} by its config, of {found.tolist()} by its tensor "
                f"{own}: config.json and the weights do not belong together; fetch or copy both again"
            )
    share_parameters(blocks, sources)


def _first(block: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a block's first parameter, and its name there."""
    path, _, own = next(name for name, _ in block.named_parameters()).rpartition(".")
    return block.get_submodule(path), own


def _source_only(block: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    names = [name for name, _ in block.named_parameters()]
    for name in names:
        state.pop(prefix + name, None)
    source: Tensor = vars(block)[_SOURCE]
    state[prefix + names[0]] = source


def _with_parameters(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # the block that owns them comes first, and already has its new values
    state.update({prefix + name: parameter.detach() for name, parameter in block.named_parameters()})
