"""The parts of a model with one row per token, and removing rows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Anatomy, anatomy_of


@dataclass(frozen=True)
class Tables:
    """The parts of a model with one row per token."""

    embedding: nn.Embedding
    head: nn.Linear | None
    padding: int | None
    counts_positions: bool


def tables_of(model: PreTrainedModel) -> Tables:
    """The tables of a model.

    Args:
        model: a model of a known family, with or without a vocabulary head.

    Raises:
        LmcompressError: If a table is quantized, packed or parametrized, or the config has another number of rows.
    """
    if not isinstance(model, PreTrainedModel):
        raise LmcompressError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; pass a CompressedModel's .model"
        )
    anatomy = anatomy_of(model)
    embedding = anatomy.embedding("word_embeddings")
    if not isinstance(embedding, nn.Embedding) or not _is_plain(embedding, embedding.num_embeddings):
        raise LmcompressError(
            "the token embeddings must be a plain nn.Embedding with a floating-point weight, got "
            f"{_describe(embedding)}; if they are quantized, packed or parametrized, prune the vocabulary first"
        )
    head = model.get_output_embeddings()
    rows = embedding.num_embeddings
    if head is not None and not (isinstance(head, nn.Linear) and _is_plain(head, rows)):
        raise LmcompressError(
            f"the vocabulary head must be a plain nn.Linear with {rows} rows, as the embeddings have, got "
            f"{_describe(head)}; if it is quantized or packed, prune the vocabulary first"
        )
    if model.config.vocab_size != rows:
        raise LmcompressError(
            f"model.config.vocab_size must be the embeddings' number of rows, {rows}, got {model.config.vocab_size}; "
            "change sizes with model.resize_token_embeddings, which sets both"
        )
    return Tables(embedding, head, embedding.padding_idx, _counts_positions(anatomy))


def _is_plain(module: nn.Module, rows: int) -> bool:
    # a parametrized weight is not among the module's own parameters
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() == 2 and len(weight) == rows


def _describe(module: nn.Module | None) -> str:
    weight = getattr(module, "weight", None)
    of = f" with a weight of {weight.dtype}, {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return type(module).__name__ + of


def _counts_positions(anatomy: Anatomy) -> bool:
    """Whether positions are counted from the padding id, as in RoBERTa: its position table has a padding row."""
    positions = anatomy.embedding("position_embeddings")
    return isinstance(positions, nn.Embedding) and positions.padding_idx is not None


def configs_of(model: PreTrainedModel) -> list[Any]:
    """The model's config, and its generation config if it has one.

    Args:
        model: any model.
    """
    # only models that generate have a generation config
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]


def is_token_id(field: str) -> bool:
    """Whether a field of a config names a token by its id.

    Args:
        field: its name.
    """
    return field.endswith("_token_id") and not field.startswith("_")


def shrink(model: PreTrainedModel, tables: Tables, order: Sequence[int], new_ids: Mapping[int, int]) -> int:
    """Remove the rows from every module that has them; returns the bytes saved."""
    rows, embedding, head = tables.embedding.num_embeddings, tables.embedding, tables.head
    tensors: list[Tensor | None] = [embedding.weight]
    if head is not None:
        tensors += [head.weight, head.bias]
        # BERT and RoBERTa store the head's bias a second time, next to the head: the same tensor only if it is tied
        around = (module for module in model.modules() if any(child is head for child in module.children()))
        tensors += [p for module in around for p in module.parameters(recurse=False) if tuple(p.shape) == (rows,)]
    old = {id(tensor): tensor for tensor in tensors if tensor is not None}
    index = torch.tensor(list(order), device=embedding.weight.device)
    new = {
        key: nn.Parameter(tensor.detach()[index.to(tensor.device)].clone(), requires_grad=tensor.requires_grad)
        for key, tensor in old.items()
    }
    # by identity and in every module, so that tied tensors stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
    embedding.num_embeddings = len(order)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_ids[embedding.padding_idx]
    if head is not None:
        head.out_features = len(order)
    model.config.vocab_size = len(order)
    for config in configs_of(model):
        _renumber_config(config, new_ids)
    return sum((old[key].numel() - new[key].numel()) * old[key].element_size() for key in old)


def _renumber_config(config: Any, new_ids: Mapping[int, int]) -> None:
    """Renumber the fields of a model's or a generation config that name tokens.

    Ids without a row are unchanged. Entries of a generation config for pruned tokens are removed:
    these can no longer be generated.
    """
    for name, value in list(vars(config).items()):
        if value is None:
            continue
        if is_token_id(name):
            several = isinstance(value, (list, tuple))
            setattr(config, name, [new_ids.get(i, i) for i in value] if several else new_ids.get(value, value))
        elif name in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(config, name, [new_ids[i] for i in value if i in new_ids] or None)
        elif name == "bad_words_ids":
            stay = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)]
            setattr(config, name, stay or None)
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            biases = [([new_ids[i] for i in ids], bias) for ids, bias in pairs if all(i in new_ids for i in ids)]
            as_dict = {tuple(ids): bias for ids, bias in biases}
            setattr(config, name, (as_dict if isinstance(value, dict) else [list(b) for b in biases]) or None)
