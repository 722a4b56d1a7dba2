"""Cross-encoders, which read two texts at once and give one score: rerankers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.hooks import model_inputs
from lmcompress.activations.running import batches_by_length, evaluating
from lmcompress.errors import LmcompressError
from lmcompress.families import head_logits
from lmcompress.families.positions import positions_of


def reranker_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int = 512,
    batch_size: int = 32,
    sigmoid: bool = False,
) -> NDArray[np.float32]:
    """The score of each pair, in order; pairs of similar length share a batch.

    Args:
        model: a sequence classifier with one output.
        tokenizer: its tokenizer.
        pairs: query and document.
        max_length: longest pair in tokens, at most the model's positions; the longer text is truncated.
        batch_size: pairs per forward pass.
        sigmoid: whether scores are squeezed into (0, 1), as ``CrossEncoder`` of sentence-transformers does by default;
            the order is the same.

    Returns:
        ``(pairs,)`` float32.

    Raises:
        LmcompressError: If there are no pairs, the model has not one output, or ``batch_size`` is less than 1.
    """
    if not pairs:
        raise LmcompressError("there must be pairs to score, got none")
    if model.config.num_labels != 1:
        raise LmcompressError(
            f"a reranker must have one output, {type(model).__name__} has {model.config.num_labels}: load it with "
            "num_labels=1, and train it on scores"
        )
    length = min(max_length, positions_of(model.config), tokenizer.model_max_length)
    batches = batches_by_length([sum(map(len, pair)) for pair in pairs], batch_size)
    scores = np.empty(len(pairs), dtype=np.float32)
    with evaluating(model):
        for chosen in batches:
            first, second = zip(*(pairs[index] for index in chosen), strict=True)
            batch = tokenizer(
                list(first), list(second), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            moved = {name: value.to(model.device) for name, value in batch.items()}
            logits = head_logits(model(**model_inputs(model, moved)))
            if logits is None:
                raise LmcompressError(f"{type(model).__name__} does not return logits; load the model with its head")
            values = logits.float().reshape(-1)
            scores[chosen] = (torch.sigmoid(values) if sigmoid else values).cpu().numpy()
    return scores
