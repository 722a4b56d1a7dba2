"""The declarative description of a family's parts, and a view of a model through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import LmcompressError
from lmcompress.families.narrow import remove_heads
from lmcompress.families.shaping import resized
from lmcompress.nn.base import Compact
from lmcompress.nn.embedding import FactorizedHead
from lmcompress.nn.packed import Packed

HeadAttributes = Callable[[int, int], dict[str, int]]
"""``(heads, head_size) -> attributes`` that the attention module must have after heads were removed."""


@dataclass(frozen=True)
class Family:
    """One model family, described by the paths of its parts.

    Paths are attribute names joined by dots; those of a block are relative to the block, the others to the *base* model
    (``model.base_model``), so that they hold with and without a task head.

    Attributes:
        model_type: ``config.model_type`` of the family.
        blocks: the ``ModuleList`` of Transformer blocks.
        attention: in a block, the module that splits heads.
        query, key, value: in a block, the projections; empty if there is ``qkv``.
        qkv: in a block, one fused projection with query, key and value side by side on its output axis.
        attention_out: in a block, the output projection of attention.
        ffn_in, ffn_out: in a block, the two matrices of the feed-forward network.
        word_embeddings, position_embeddings: the embedding tables.
        token_type_embeddings, embedding_projection: the same, empty if the family has none.
        causal: whether position i attends only to positions up to i.
        num_layers, num_heads, hidden_size, intermediate_size: names of the config's fields.
        head_attributes: attributes of the attention module to update when it loses heads.
        layer_index: paths, in a block, of integers that number the block (caches are indexed by them).
        attention_tail: names, in the attention module, of the modules applied to the output of the heads, in order;
            empty if the output projection lies outside.
        final_norm: the norm after the last block, in families whose blocks normalise their input (pre-LN); empty
            if they normalise their output, and the embeddings have a norm of their own.
        attention_norm, ffn_norm: in a block of such families, the norms that attention and feed-forward network alone
            read; empty if a norm's output is the residual stream as well.
    """

    model_type: str
    blocks: str
    attention: str
    attention_out: str
    ffn_in: str
    ffn_out: str
    word_embeddings: str
    position_embeddings: str
    num_layers: str
    num_heads: str
    hidden_size: str
    intermediate_size: str
    head_attributes: HeadAttributes
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    token_type_embeddings: str = ""
    embedding_projection: str = ""
    causal: bool = False
    layer_index: tuple[str, ...] = field(default_factory=tuple)
    attention_tail: tuple[str, ...] = ()
    final_norm: str = ""
    attention_norm: str = ""
    ffn_norm: str = ""


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's ``Conv1D``, which stores ``(in, out)`` where ``nn.Linear`` stores ``(out, in)``."""
    return isinstance(module, Conv1D)


def out_features(module: nn.Module) -> int:
    """Output width of a ``Linear`` or ``Conv1D``, dense, packed or compact."""
    if isinstance(module, Packed):
        return module.shape[0]
    if isinstance(module, Compact):
        return module.out_features
    weight = _weight(module)
    return int(weight.shape[1] if is_conv1d(module) else weight.shape[0])


def in_features(module: nn.Module) -> int:
    """Input width of a ``Linear`` or ``Conv1D``, dense, packed or compact."""
    if isinstance(module, Packed):
        return module.shape[1]
    if isinstance(module, Compact):
        return module.in_features
    weight = _weight(module)
    return int(weight.shape[0] if is_conv1d(module) else weight.shape[1])


def weight_view(module: nn.Module) -> Tensor:
    """The weight as ``(out, in)``, however it is stored; a view: in-place changes reach the module.

    In a fake-quantized model this is the trained weight, not its quantized value.
    """
    weight = _weight(module)
    return weight.t() if is_conv1d(module) else weight


def _weight(module: nn.Module) -> Tensor:
    if isinstance(module, Packed):
        raise LmcompressError(
            f"a {type(module).__name__} has codes and no matrix: use the dense model that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives"
        )
    if isinstance(module, Compact):
        raise LmcompressError(
            f"a {type(module).__name__} has no matrix of its own that could be cut, quantized or replaced: do that "
            "with the dense model first, and make it compact afterwards"
        )
    # the parameter, even if attribute access returns something computed from it, such as quantized values
    stored = module._parameters.get("weight")
    weight = module.weight if stored is None else stored
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise LmcompressError(f"expected a Linear or Conv1D with a matrix as weight, got {type(module).__name__}")
    return weight


class Block:
    """One Transformer block of a model, seen through its family's paths."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module = module
        self.family = family

    def get(self, part: str) -> nn.Module:
        """The submodule that the family calls ``part``.

        Args:
            part: name such as ``"ffn_in"``.

        Raises:
            LmcompressError: If the family has no such part.
        """
        path = getattr(self.family, part)
        if not path:
            raise LmcompressError(f"{self.family.model_type} has no {part}")
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise LmcompressError(
                f"this block has no {part}: it mixes neighbours in place of attention (lmcompress.students.separate)"
            ) from error

    def has(self, part: str) -> bool:
        """Whether the family has this part and the block still does: one that mixes neighbours has no queries.

        Args:
            part: name such as ``"query"``.
        """
        path = getattr(self.family, part)
        return bool(path) and any(name == path for name, _ in self.module.named_modules())

    def replace(self, part: str, new: nn.Module) -> None:
        """Replace the family's ``part`` by ``new``."""
        parent, _, name = getattr(self.family, part).rpartition(".")
        setattr(self.module.get_submodule(parent), name, new)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        attention = self.get("attention")
        for name in ("attention_head_size", "head_dim"):
            if isinstance(size := getattr(attention, name, None), int):
                return size
        raise LmcompressError(f"{type(attention).__name__} does not say how wide its heads are")

    @property
    def num_heads(self) -> int:
        """Current number of attention heads of this block."""
        return in_features(self.get("attention_out")) // self.head_size

    @property
    def ffn_width(self) -> int:
        """Current number of neurons of this block's feed-forward network."""
        return in_features(self.get("ffn_out"))

    @property
    def scaling(self) -> float:
        """The factor of ``q·k`` before the softmax."""
        return float(getattr(self.get("attention"), "scaling", self.head_size**-0.5))

    def set_heads(self, heads: int) -> None:
        """Set the number of heads in the attention module, if any; matrices are unchanged."""
        attention = self.get("attention")
        for name, value in self.family.head_attributes(heads, self.head_size).items():
            setattr(attention, name, value)
        if heads == 0:
            remove_heads(attention, self.family.attention_tail)

    def set_index(self, index: int) -> None:
        """Renumber the block, so that key/value caches stay dense when earlier blocks were removed."""
        for path in self.family.layer_index:
            parent, _, name = path.rpartition(".")
            setattr(self.module.get_submodule(parent), name, index)


class Anatomy:
    """A model seen through its family: blocks, embeddings, and the sizes that its config names.

    Args:
        model: a ``PreTrainedModel`` with or without a head, on any device, ``meta`` included.
        family: the family's description.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.family = family

    @property
    def base(self) -> nn.Module:
        """The model without its task head."""
        return self.model.base_model

    @property
    def block_list(self) -> nn.ModuleList:
        """The list that holds the blocks' modules."""
        blocks = self.base.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [Block(module, self.family) for module in self.block_list]

    @property
    def hidden_size(self) -> int:
        """Current width of the residual stream; after a cut, the config may have that of the stock skeleton."""
        return out_features(self.blocks[0].get("ffn_out"))

    @property
    def head(self) -> nn.Linear | FactorizedHead | None:
        """The vocabulary head of a causal language model, or None if there is none."""
        head = self.model.get_output_embeddings() if self.family.causal else None
        return head if isinstance(head, (nn.Linear, FactorizedHead)) else None

    def embedding(self, part: str) -> nn.Module | None:
        """The embedding table that the family calls ``part``, or None if the family or this model has none."""
        path = getattr(self.family, part)
        # ELECTRA has its projection only if embeddings and hidden states differ in width
        present = path and any(name == path for name, _ in self.base.named_modules())
        return self.base.get_submodule(path) if present else None


def config_value(config: PretrainedConfig, family: Family, part: str) -> Any:
    """The value of the config field that the family uses for ``part``, such as ``"intermediate_size"``."""
    return getattr(config, getattr(family, part))


def new_projection(
    old: nn.Module, *, in_width: int, out_width: int, device: torch.device | str | None = None
) -> nn.Module:
    """A new ``Linear`` or ``Conv1D`` like ``old`` but of other widths; its values are unset.

    Args:
        old: module whose kind, dtype and presence of a bias are copied.
        in_width: input width.
        out_width: output width.
        device: default: that of ``old``.

    Returns:
        The new module; on ``meta`` nothing is allocated. With a width of 0 it is a
        :class:`~lmcompress.families.narrow.ZeroWidthLinear`, whose bias is zero.

    Raises:
        LmcompressError: If ``old`` has no matrix: it is packed, compact or something else.
    """
    _weight(old)
    return resized(old, in_width, out_width, device)
