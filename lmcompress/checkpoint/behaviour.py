"""What a compressed model answers where the methods of its class would be wrong about it.

Transformers' methods count parameters, resize embeddings and lay out caches for stock modules and the shapes of a stock
config. Methods here take the place of those of the class in a single model, loaded or made in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.guard import guard_config
from lmcompress.checkpoint.structure import stock_structure, structure_of, why_not_vanilla
from lmcompress.errors import LmcompressError
from lmcompress.families import outline_of
from lmcompress.nn.embedding import FactorizedEmbedding, FactorizedHead
from lmcompress.nn.packed import Packed, PackedEmbedding, TiedHead
from lmcompress.nn.quantized_attention import ATTENTION

Applies = Callable[[PreTrainedModel], bool]
M = TypeVar("M", bound=Callable[..., Any])

_RULES: dict[str, tuple[Applies, Callable[..., Any]]] = {}


def rule(applies: Applies) -> Callable[[M], M]:
    """Let a function take the place of the method of its name in models that need it.

    Args:
        applies: whether a model needs it.

    Returns:
        A decorator, which returns the function.
    """

    def add(method: M) -> M:
        _RULES[method.__name__] = applies, method
        return method

    return add


def behave(model: PreTrainedModel) -> None:
    """Give a model the methods that its compression needs, and take away those that it no longer needs.

    Its config gets or loses the word of :mod:`lmcompress.checkpoint.guard` in the same way.

    Args:
        model: a model of a known family whose config records its compression; its class stays as it is.
    """
    guard_config(model.config, _differs_from_stock(model))
    for name, (applies, method) in _RULES.items():
        if applies(model):
            model.__dict__[name] = MethodType(method, model)
        else:
            model.__dict__.pop(name, None)


def _differs_from_stock(model: PreTrainedModel) -> bool:
    recorded = recorded_compression(model.config)
    if recorded is None:
        return False
    shapes = recorded.structure
    uneven = shapes is not None and why_not_vanilla(shapes, model.config) is not None
    return uneven or recorded.encoding is not None or bool(recorded.layers)


def has_codes(model: nn.Module) -> bool:
    """Whether any weight of a model is packed.

    Args:
        model: any model.
    """
    return any(isinstance(module, Packed) for module in model.modules())


@rule(has_codes)
def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Number of parameters, each code counting as one.

    Args:
        self: a packed model.
        only_trainable: whether to count only what can be trained, which codes cannot.
        exclude_embeddings: whether to leave embeddings out.
    """
    stock = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    packed = [module for module in self.modules() if isinstance(module, Packed) and not only_trainable]
    return int(stock) + sum(
        module.shape[0] * module.shape[1]
        for module in packed
        if not (exclude_embeddings and isinstance(module, PackedEmbedding))
    )


def _has_fixed_vocabulary(model: PreTrainedModel) -> bool:
    tables = (Packed, TiedHead, FactorizedEmbedding, FactorizedHead)
    return isinstance(model.get_input_embeddings(), tables) or isinstance(model.get_output_embeddings(), tables)


@rule(_has_fixed_vocabulary)
def resize_token_embeddings(self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """The token embeddings, which keep their number of tokens.

    Args:
        self: a model whose token embeddings or head are packed or factorized.
        new_num_tokens: None or the current number.
        *args: without effect, since nothing is resized.
        **kwargs: likewise.

    Raises:
        LmcompressError: If the number is another.
    """
    table: Any = self.get_input_embeddings()
    if new_num_tokens is None or (new_num_tokens == table.num_embeddings and not kwargs.get("pad_to_multiple_of")):
        return table
    raise LmcompressError(
        f"cannot resize the token embeddings of this model from {table.num_embeddings} to {new_num_tokens}: they or "
        "the head are packed or compact. Resize the dense model before it is compressed; for a packed one that is "
        "model.dequantize(), which quantize(model) packs again afterwards"
    )


def _outgrows_its_config(model: PreTrainedModel) -> bool:
    """Whether a cache laid out by the config does not fit the blocks."""
    structure, stock = structure_of(model), stock_structure(model.config)
    heads = stock.blocks[0].heads
    even = structure.head_size == stock.head_size and all(block.heads == heads for block in structure.blocks)
    return not even or model.config._attn_implementation == ATTENTION


def _generates(model: PreTrainedModel) -> bool:
    # a classifier on GPT-2 does not
    return outline_of(model).family.causal and hasattr(type(model), "init_continuous_batching")


@rule(_generates)
def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own, where the cache that it lays out for all blocks, by the config's number of heads, is theirs.

    Args:
        self: a causal model.
        *args: passed on.
        **kwargs: likewise.

    Raises:
        LmcompressError: If blocks have other numbers of heads, or attention is quantized.
    """
    if not _outgrows_its_config(self):
        return type(self).init_continuous_batching(self, *args, **kwargs)
    heads = [block.heads for block in structure_of(self).blocks]
    stock = stock_structure(self.config).blocks[0].heads
    reason = (
        f"it lays out one cache of {stock} heads for all blocks, and those of this model have {heads}"
        if set(heads) != {stock}
        else "it puts its own attention in place of the quantized one"
    )
    raise LmcompressError(
        f"continuous batching (generate_batch) is not possible with this model: {reason}. Use generate(), with any "
        "kind of cache, on a padded batch"
    )
