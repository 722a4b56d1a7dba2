"""Counts of the units over which the terms of a loss are means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.documents import documents_in
from lmcompress.families import anatomy_of, is_described


def exact(device: torch.device) -> torch.dtype:
    """The most exact floating-point type of a device; MPS has no float64.

    Args:
        device: where sums are taken.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def reading_of(model: Any) -> tuple[bool, bool, bool]:
    """How a model reads a batch: causally, predicting the next token, with packed documents apart.

    Args:
        model: any model, not wrapped.

    Returns:
        Whether a token attends only to those before it, whether each position predicts the next token, and whether
        documents packed into a row by position ids are kept apart; all false for a model that is not one of
        transformers.
    """
    if not isinstance(model, PreTrainedModel):
        return False, False, False
    if not is_described(model):
        # only the loss on the labels is counted then
        shifted = getattr(model, "loss_type", None) == "ForCausalLM" and not model.config.is_encoder_decoder
        return shifted, shifted, False
    anatomy = anatomy_of(model)
    # a classifier on GPT-2 has causal attention, but no next token to predict
    return anatomy.causal, anatomy.predicts_next, anatomy.packs


def count_vector(batch: Mapping[str, Any], causal: bool, shifted: bool, packs: bool = False) -> Tensor:
    """Number of each unit in a batch, ``(len(UNITS),)``, in the order of ``UNITS``.

    Args:
        batch: on any device.
        causal: whether a token attends only to those before it.
        shifted: whether each position predicts the next token.
        packs: whether documents packed by position ids are examples of their own.

    Returns:
        Counts, float64 except on MPS.
    """
    ids = batch["input_ids"] if "input_ids" in batch else next(v for v in batch.values() if isinstance(v, Tensor))
    mask = batch.get("attention_mask")
    mask = torch.ones(ids.shape[:2], device=ids.device) if mask is None else mask
    if packs and (documents := documents_in(batch)) is not None:
        mask = documents.mask
    # exact counts, so that sum / count of one micro-batch is its mean bit-exact
    lengths = mask.sum(-1).to(exact(ids.device))
    pairs = (lengths * (lengths + 1) / 2 if causal else lengths * lengths).sum()
    labels = batch.get("labels")
    if labels is None and shifted:
        counted = (mask[:, 1:].bool() & mask[:, :-1].bool()).sum().to(lengths.dtype)
    elif labels is None or labels.is_floating_point():
        counted = lengths.new_tensor(ids.shape[0])
    else:
        counted = (labels[:, 1:] if shifted else labels).ne(-100).sum().to(lengths.dtype)
    return torch.stack([lengths.new_tensor(len(mask)), counted, lengths.sum(), pairs])
