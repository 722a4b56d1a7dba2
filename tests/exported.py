"""Packed models and real batches for the tests of exports."""

from __future__ import annotations

import torch
from families import VOCAB, inputs, make
from transformers import PreTrainedModel

from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme, quantize

STATIC, DYNAMIC = ActivationScheme(range="static"), ActivationScheme()
BY_TOKEN = ActivationScheme(granularity="token")
SHIFTED = ActivationScheme(symmetric=False, clip=2.5)
FOUR_BITS = ActivationScheme(bits=4, range="static")


def batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Batches of several shapes, with padding."""
    made = [inputs(model, rows=rows, length=length, seed=seed) for seed, (rows, length) in enumerate([(4, 12), (1, 5)])]
    return [batch | {"input_ids": batch["input_ids"] % model.config.vocab_size} for batch in made]


def packed(
    model: PreTrainedModel, activations: ActivationScheme | None = STATIC, *, attention: bool = False, **weights: object
) -> PreTrainedModel:
    """The model with every matrix of bytes, one scale for each row; in place."""
    rows = WeightScheme(**{"quantizer": "minmax", "granularity": "row", **weights})
    config = QuantizationConfig(weights=rows, embeddings=rows, activations=activations, attention=attention)
    quantize(model, config, batches(model), progress=False)
    return model.eval()


def bert(activations: ActivationScheme | None = STATIC, head: str = "classification", **given: object):
    """A packed BERT of three blocks."""
    return packed(make("bert", head), activations, **given)


def ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Random ids without padding."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(9))
