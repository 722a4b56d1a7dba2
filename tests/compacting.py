"""Tiny models with every kind of compact layer, for tests."""

from __future__ import annotations

import torch
from families import inputs
from transformers import PreTrainedModel

from lmcompress.checkpoint.cutting import keep_heads
from lmcompress.families import anatomy_of
from lmcompress.students import factorize, factorize_embeddings, group, separate, share_layers


def batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Random inputs with padding, of more tokens than a tiny model is wide."""
    return [inputs(model, rows=6, length=12, seed=seed) for seed in (1, 2)]


def low_rank(model: PreTrainedModel) -> PreTrainedModel:
    """All matrices at rank 2; in place."""
    factorize(model, rank=2)
    return model


def grouped(model: PreTrainedModel) -> PreTrainedModel:
    """All matrices in 2 groups of fitted channels; in place."""
    group(model, 2)
    return model


def embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Words of 3 numbers; in place."""
    factorize_embeddings(model, 3)
    return model


def separable(model: PreTrainedModel) -> PreTrainedModel:
    """Local mixing in the first block; in place."""
    separate(model, [0], 3, batches(model))
    return model


def shared(model: PreTrainedModel) -> PreTrainedModel:
    """The second block is the first; in place."""
    share_layers(model, every=2)
    return model


def everything(model: PreTrainedModel) -> PreTrainedModel:
    """One of each; the last two blocks attend, the first mixes, the third is the second; in place."""
    factorize(model, rank=3, parts=["ffn_in"])
    group(model, 2, parts=["ffn_out", "attention_out"], shuffle="channel")
    embeddings(model)
    separate(model, [0, 1, 2], 3, batches(model))
    share_layers(model)
    return model


def compact_uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Factors, groups and embeddings in a model whose blocks differ; in place."""
    factorize(model, rank=2, parts=["ffn_in", "ffn_out"])
    group(model, 2, parts=["attention_out"])
    return embeddings(model)


def compact_causal(model: PreTrainedModel) -> PreTrainedModel:
    """Local mixing in the last block, factors of neurons in the first; in place."""
    separate(model, [2], 4, batches(model))
    factorize(model, rank=2, parts=["ffn_in"], blocks=[0])
    return model


def shared_uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The first two blocks share, the last has two heads less; in place."""
    keep_heads(anatomy_of(model).blocks[2], [0, 3])
    return shared(model)
