"""Blocks that have the same parameters.

In a state dict, and so in files, a block that has another's parameters has one number, the other's, in the place of its
first parameter, and its own buffers. A loader that knows nothing of this finds a tensor of another shape and refuses;
with tensors that are merely missing, Transformers would fill in random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError, LmcompressError

_SOURCE = "_lmcompress_source"


def shared_sources(blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each block the first one that has its parameters: its own number where they are its own.

    Args:
        blocks: of one model, in order.

    Returns:
        Numbers counted from 0.

    Raises:
        LmcompressError: If two blocks have some parameters in common, and not all.
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
    """Give blocks the parameters of earlier ones; buffers stay their own.

    Args:
        blocks: of the same shapes; changed in place.
        sources: for each block the one whose parameters it gets.
    """
    for index, source in enumerate(sources):
        if source == index:
            continue
        block, owner = blocks[index], dict(blocks[source].named_modules())
        for name, module in block.named_modules():
            # in the order that they have there
            module._parameters = dict(owner[name]._parameters)
        # not a buffer, which would have a name of its own in the state dict
        vars(block)[_SOURCE] = torch.tensor([source])
        block.register_state_dict_post_hook(_source_only)
        block.register_load_state_dict_pre_hook(_with_parameters)


def empty_shared(blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Take the parameters away of blocks that will get those of earlier ones, while a skeleton is filled.

    Args:
        blocks: changed in place.
        sources: as for :func:`fill_shared`, which is to be called once the others have values.
    """
    for index, source in enumerate(sources):
        if source == index:
            continue
        owner, own = _first(blocks[index])
        device = owner._parameters[own].device  # type: ignore[union-attr]
        for module in blocks[index].modules():
            module._parameters.update(dict.fromkeys(module._parameters))
            # Transformers would fill what the files do not have
            module._is_hf_initialized = True  # type: ignore[assignment]
        del owner._parameters[own]
        owner.register_buffer(own, torch.empty(1, dtype=torch.int64, device=device))
        vars(blocks[index])[_SOURCE] = (owner, own)


def fill_shared(blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Let the blocks that :func:`empty_shared` has emptied share.

    Args:
        blocks: changed in place.
        sources: for each block the one whose parameters it gets.

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
    """The module that has a block's first parameter, and its name there."""
    path, _, own = next(name for name, _ in block.named_parameters()).rpartition(".")
    return block.get_submodule(path), own


def _source_only(block: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    names = [name for name, _ in block.named_parameters()]
    for name in names:
        state.pop(prefix + name, None)
    source: Tensor = vars(block)[_SOURCE]
    state[prefix + names[0]] = source


def _with_parameters(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # the block that owns them comes first, and has its new values by now
    state.update({prefix + name: parameter.detach() for name, parameter in block.named_parameters()})
