"""The parts of a model with one row per token, and removing rows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, refuse_foreign
from lmcompress.nn.configs import own_config

_LOGITS_BIAS = "final_logits_bias"
"""The buffer that Marian and BART add to their logits, ``(1, rows)``."""


@dataclass(frozen=True)
class Tables:
    """The parts of a model with one row per token.

    Attributes:
        embeddings: the tables of token embeddings: one, or those of encoder and decoder, tied or not.
        head: the vocabulary head, if there is one.
        padding: id of the padding token as the embeddings know it.
        counts_positions: whether positions are counted from that id.
    """

    embeddings: tuple[nn.Embedding, ...]
    head: nn.Linear | None
    padding: int | None
    counts_positions: bool

    @property
    def rows(self) -> int:
        """Number of rows of each table."""
        return self.embeddings[0].num_embeddings


def tables_of(model: PreTrainedModel) -> Tables:
    """The tables of a model.

    Args:
        model: a model of a known family, or an encoder–decoder, with or without a vocabulary head.

    Raises:
        LmcompressError: If a table is quantized, packed or parametrized, tables or config have other numbers of rows,
            or the model has adapters, or another library's masks or quantized weights.
    """
    if not isinstance(model, PreTrainedModel):
        raise LmcompressError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; load one with "
            "AutoModelFor….from_pretrained"
        )
    refuse_foreign(model, "prune the vocabulary of")
    embeddings = _embeddings_of(model)
    rows = embeddings[0].num_embeddings
    if any(other.num_embeddings != rows for other in embeddings):
        raise LmcompressError(
            "encoder and decoder must share one vocabulary, got embeddings of "
            f"{' and '.join(map(str, sorted({table.num_embeddings for table in embeddings})))} rows; "
            "two vocabularies cannot be pruned as one"
        )
    head = model.get_output_embeddings()
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
    return Tables(embeddings, head, embeddings[0].padding_idx, _counts_positions(model, embeddings))


def _embeddings_of(model: PreTrainedModel) -> tuple[nn.Embedding, ...]:
    """The modules of token embeddings, each once; anything but plain ones is refused."""
    if model.config.is_encoder_decoder:
        stacks = (model, model.get_encoder(), model.get_decoder())
        found: list[nn.Module | None] = [stack.get_input_embeddings() for stack in stacks]
    else:
        found = [anatomy_of(model).embedding("word_embeddings")]
    plain: list[nn.Embedding] = []
    for embedding in found:
        if not isinstance(embedding, nn.Embedding) or not _is_plain(embedding, embedding.num_embeddings):
            raise LmcompressError(
                "the token embeddings must be a plain nn.Embedding with a floating-point weight, got "
                f"{_describe(embedding)}; if they are quantized, packed or parametrized, prune the vocabulary first"
            )
        plain.append(embedding)
    # Marian and BART hold the same weight a third time
    weights = {id(embedding.weight) for embedding in plain}
    holders = [
        module for module in model.modules() if isinstance(module, nn.Embedding) and id(module.weight) in weights
    ]
    return tuple(sorted(holders, key=lambda module: module is not plain[0]))


def _is_plain(module: nn.Module, rows: int) -> bool:
    # a parametrized weight is not among the module's own parameters
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() == 2 and len(weight) == rows


def _describe(module: nn.Module | None) -> str:
    weight = getattr(module, "weight", None)
    of = f" with a weight of {weight.dtype}, {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return type(module).__name__ + of


def _counts_positions(model: PreTrainedModel, tables: Sequence[nn.Module]) -> bool:
    """Whether positions are counted from the padding id, as in RoBERTa: its position table has a padding row."""
    others = (module for module in model.modules() if all(module is not table for table in tables))
    return any(
        isinstance(getattr(module, "padding_idx", None), int)
        and (isinstance(module, nn.Embedding) or "Position" in type(module).__name__)
        for module in others
    )


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
    rows = tables.rows
    old = {id(tensor): tensor for tensor in _tensors_of(model, tables)}
    index = torch.tensor(list(order), device=tables.embeddings[0].weight.device)
    new = {
        key: nn.Parameter(tensor.detach()[index.to(tensor.device)].clone(), requires_grad=tensor.requires_grad)
        for key, tensor in old.items()
    }
    saved = sum((old[key].numel() - new[key].numel()) * old[key].element_size() for key in old)
    # by identity and in every module, so that tied tensors stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
        if isinstance(bias := module._buffers.get(_LOGITS_BIAS), Tensor) and bias.shape[-1] == rows:
            setattr(module, _LOGITS_BIAS, bias[..., index.to(bias.device)].clone())
            saved += (bias.shape[-1] - len(order)) * bias.element_size()
    for embedding in tables.embeddings:
        embedding.num_embeddings = len(order)
        if embedding.padding_idx is not None:
            embedding.padding_idx = new_ids[embedding.padding_idx]
    if tables.head is not None:
        tables.head.out_features = len(order)
    own_config(model).vocab_size = len(order)
    # Marian's decoder, whose table is the encoder's
    if getattr(model.config, "decoder_vocab_size", None) == rows:
        model.config.decoder_vocab_size = len(order)
    for config in configs_of(model):
        _renumber_config(config, new_ids)
    return saved


def _tensors_of(model: PreTrainedModel, tables: Tables) -> list[Tensor]:
    """The parameters with one row per token; a tied one several times."""
    tensors: list[Tensor | None] = [embedding.weight for embedding in tables.embeddings]
    if (head := tables.head) is not None:
        tensors += [head.weight, head.bias]
        # BERT and RoBERTa store the head's bias a second time, next to the head: the same tensor only if it is tied
        around = (module for module in model.modules() if any(child is head for child in module.children()))
        tensors += [
            p for module in around for p in module.parameters(recurse=False) if tuple(p.shape) == (tables.rows,)
        ]
    return [tensor for tensor in tensors if tensor is not None]


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
