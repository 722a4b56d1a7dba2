"""Parts of irregular models: projections of zero width, attention without heads, a narrower residual stream.

This module depends only on torch and :mod:`lmcompress.families.coupled`: the self-loading format carries its source
text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lmcompress.families.coupled import READ_STREAM, WRITE_STREAM

_COMPANION = "_lmcompress_companion"


class ZeroWidthLinear(nn.Module):
    """A projection of zero input or output width: its output is its bias, without a matmul.

    The empty matrix is a buffer that is not saved: files hold no empty tensors, which Transformers would take for
    tensors that share memory.

    Args:
        in_features: input width.
        out_features: output width; one of the two is 0.
        bias: whether there is a bias to return.
        device: device of the tensors.
        dtype: dtype of the tensors.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "weight", torch.zeros(out_features, in_features, device=device, dtype=dtype), persistent=False
        )
        values = torch.zeros(out_features, device=device, dtype=dtype)
        if bias and out_features:
            self.bias = nn.Parameter(values)
        else:
            self.register_buffer("bias", values if bias else None, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> ZeroWidthLinear:
        # no file fills these on meta, and from there nothing can be moved, not even nothing
        for name, empty in self._buffers.items():
            if empty is not None and empty.is_meta:
                self._buffers[name] = torch.empty_like(empty, device="cpu")
        super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The bias at every position.

        Args:
            x: ``(..., in_features)``.

        Returns:
            ``(..., out_features)``, of the dtype of ``x``.
        """
        if self.out_features == 0:
            return x[..., :0]
        # zeros that depend on x: earlier modules get a gradient of 0, where DistributedDataParallel rejects None
        answer = x.sum(-1, keepdim=True).expand(*x.shape[:-1], self.out_features)
        return answer.contiguous() if self.bias is None else answer + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """The widths, formatted as by ``nn.Linear``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Derived:
    """Base of mixins that :func:`derive` puts before a module's own class.

    The class is created at run time: copies and pickles store the mixin and the stock class it was created from. It is
        a
    subclass of the stock class, by which Transformers finds attention when it records attention outputs.

    Attributes:
        prefix: prefix of the created class's name.
        mixin: the mixin; set on created classes.
        stock: the module's original class; set on created classes.
    """

    prefix: str
    mixin: type[Derived]
    stock: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.mixin, self.stock), self.__dict__.copy()


def derive(module: nn.Module, mixin: type[Derived]) -> None:
    """Put a mixin before a module's class.

    Args:
        module: modified in place.
        mixin: its methods take precedence over those of the class.
    """
    module.__class__ = cast(Any, _derived)(mixin, type(module))


@cache
def _derived(mixin: Any, stock: type) -> Any:
    names = {"__module__": stock.__module__, "mixin": mixin, "stock": stock}
    return type(mixin.prefix + stock.__name__, (mixin, stock), names)


def _rebuilt(mixin: Any, stock: type) -> Any:
    made = _derived(mixin, stock)
    return made.__new__(made)


class _Headless(Derived):
    """The forward pass of attention without heads; mixed into the family's own class by :func:`remove_heads`."""

    prefix = "Headless"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        module = cast(Any, self)
        length = hidden_states.shape[1]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            # the number of cached tokens is read from the cache's first layer, among others: a layer must not
            # be without keys, and keys without elements count as none. This costs one number for each token
            cache = getattr(cache, "self_attention_cache", cache)
            seen = hidden_states.new_zeros(hidden_states.shape[0], 1, length, 1)
            length = cache.update(seen, seen, module.layer_idx)[0].shape[-2]
        answer = hidden_states[..., :0]
        for name in module.tail:
            answer = module.get_submodule(name)(answer)
        weights = None
        # a class without a config computes attention by itself
        if getattr(getattr(module, "config", None), "_attn_implementation", "eager") == "eager":
            weights = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], length)
        return answer, weights


def remove_heads(attention: nn.Module, tail: Sequence[str]) -> None:
    """Turn an attention module into one without heads; its projections are unchanged.

    Args:
        attention: modified in place: its class becomes a subclass of it.
        tail: names of the modules it applies to the heads' output, in order; empty if it leaves that to others.
    """
    if not isinstance(attention, _Headless):
        if isinstance(attention, _Counting):
            # it reads no number of heads any more
            attention.__class__ = attention.stock
        derive(attention, _Headless)
        attention.tail = tuple(tail)  # type: ignore[assignment]


class _View:
    """A config in which some fields have other values; the rest is looked up at every access."""

    def __init__(self, config: Any, values: Mapping[str, Any]) -> None:
        self._config, self._values = config, values

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask before anything is set
        if name.startswith("__"):
            raise AttributeError(name)
        return self._values[name] if name in self._values else getattr(self._config, name)


class _Counting(Derived):
    """Attention that reads its number of heads from the config, given its own; see :func:`count_own_heads`."""

    prefix = "Counting"

    @property
    def config(self) -> Any:
        return _View(self.__dict__["config"], self.__dict__["counted"])

    @config.setter
    def config(self, config: Any) -> None:
        self.__dict__["config"] = config


def count_own_heads(attention: nn.Module, field: str, heads: int) -> None:
    """Let an attention module find its own number of heads where it reads that of the config.

    Args:
        attention: modified in place: its class becomes a subclass of it.
        field: name of the config's field.
        heads: number of query heads.
    """
    if not isinstance(attention, _Counting):
        derive(attention, _Counting)
    attention.__dict__["counted"] = {field: heads}


class Companion(Protocol):
    """Data attached to the rows of a module's matrix, one entry for each output, such as scales of codes."""

    def rows(self, keep: Tensor) -> Companion:
        """The entries of some rows.

        Args:
            keep: numbers of the rows, int64.

        Returns:
            A new companion.
        """


def companion_of(module: nn.Module) -> Any:
    """The companion given to :func:`accompany`, as cut along with the module's rows since, or None.

    Args:
        module: any module.

    Returns:
        The companion.
    """
    return module.__dict__.get(_COMPANION)


def accompany(module: nn.Module, companion: Companion | None) -> None:
    """Attach data to the rows of a module's matrix, cut along with the module or its replacement.

    Args:
        module: a module with a matrix.
        companion: the data; None detaches them.
    """
    module.__dict__.pop(_COMPANION, None)
    if companion is not None:
        module.__dict__[_COMPANION] = companion


def stacks_of(paths: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The paths of each stack of blocks: of an encoder, and of the decoder that reads it.

    Args:
        paths: those of a family; under ``decoder``, if it has one, those of the second stack.
    """
    return [paths, paths["decoder"]] if paths.get("decoder") else [paths]


def stream_axes(model: nn.Module, paths: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The axes of a model's parameters that are as wide as its residual stream.

    Found by building the stock model twice on ``meta``, the second time wider, so that no declaration per
    family and head is needed, and no other dimension of equal size is mistaken for it.

    Args:
        model: a ``PreTrainedModel`` of any shapes, with or without a head.
        paths: paths of its family: ``blocks``, the parts of a block, and the config's fields ``hidden_size``,
            ``embedding_size``, ``num_layers`` and ``per_layer``; under ``decoder`` those of a second stack.

    Returns:
        By name, tied parameters under each of their names: the axes of the parameter as stored, or None if a stock
        model of this class has no such parameter.
    """
    shapes = []
    stock = cast(Any, model).config
    # ELECTRA has no projection of its embeddings if they are as wide as the hidden states
    field = paths["embedding_size"]
    wider = 3 if field and getattr(stock, field) == 2 * getattr(stock, paths["hidden_size"]) else 2
    for factor in (1, wider):
        config = copy.deepcopy(stock)
        hidden = getattr(config, paths["hidden_size"])
        # two: the first block of some families is unlike the others
        for stack in stacks_of(paths):
            setattr(config, stack["num_layers"], 2)
        for name in paths["per_layer"]:
            if isinstance(said := getattr(config, name, None), (list, tuple)) and said:
                setattr(config, name, [said[0], said[-1]])
        setattr(config, paths["hidden_size"], factor * hidden)
        if field and getattr(config, field) == hidden:
            setattr(config, field, factor * hidden)
        with torch.device("meta"):
            skeleton = type(model)(config)
        shapes.append({name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)})
    narrow, wide = shapes
    base = cast(Any, model).base_model
    lists = {name: stack for stack in stacks_of(paths) for name, module in model.named_modules()
             if module is base.get_submodule(stack["blocks"])}  # fmt: skip
    # the skeletons have two blocks in each stack, of which the second stands for all but the first
    inside = re.compile(rf"^({'|'.join(map(re.escape, lists))})\.\d+\.")
    axes: dict[str, tuple[int, ...] | None] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        known = inside.sub(r"\1.1.", name)
        known = known if known in narrow else name
        found = tuple(i for i, n in enumerate(narrow[known]) if wide[known][i] != n) if known in narrow else None
        axes[name] = found
    for prefix, stack in lists.items():
        for index, block in enumerate(cast(Any, model.get_submodule(prefix))):
            for part in READ_STREAM + WRITE_STREAM:
                if stack[part]:
                    # the other axis of these is heads or neurons, which follow the hidden size only in a stock model
                    module = block.get_submodule(stack[part])
                    into = 0 if hasattr(module, "nx") else 1
                    name, reads = f"{prefix}.{index}.{stack[part]}", part in READ_STREAM
                    axes[f"{name}.weight"] = (into if reads else 1 - into,)
                    axes[f"{name}.bias"] = () if reads else (0,)
    return {name: axes[name] for name, _ in model.named_parameters(remove_duplicate=False)}


def narrow_stream(model: nn.Module, axes: Mapping[str, tuple[int, ...] | None], keep: Tensor) -> None:
    """Cut the residual stream down to some of its dimensions; tied tensors stay tied.

    Args:
        model: modified in place; on ``meta`` nothing is allocated.
        axes: from :func:`stream_axes`.
        keep: ``(dimensions,)`` int64, the dimensions to keep.
    """
    new: dict[int, nn.Parameter] = {}
    cut = {id(parameter): axes[name] or () for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        values = parameter.detach()
        for axis in axes[name] or ():
            # a pooler is as wide on both of its axes
            values = values.index_select(axis, keep.to(values.device))
        if axes[name] and id(parameter) not in new:
            new[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for module in model.modules():
        companion, output = companion_of(module), 1 if hasattr(module, "nx") else 0
        if companion is not None and output in cut.get(id(module._parameters.get("weight")), ()):
            accompany(module, companion.rows(keep))
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            # every owner gets the same new parameter
            setattr(module, name, new.get(id(old), old))
        weight = getattr(module, "weight", None)
        if isinstance(module, ZeroWidthLinear):
            # the width of an empty matrix is not given by any parameter
            width = len(keep)
            module.in_features, module.out_features = (0, width) if module.in_features == 0 else (width, 0)
            module.weight = module.weight.new_zeros(module.out_features, module.in_features)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif hasattr(module, "nx") and isinstance(weight, Tensor):
            # transformers' Conv1D
            module.nx, module.nf = weight.shape  # type: ignore[assignment]
