"""Packed models of every kind, and the batches that their graphs are compared on: helpers of the tests of exporters."""

from __future__ import annotations

import torch
from families import make
from torch import Tensor, nn

from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme, quantize

SCHEMES = {
    "weights only": None,
    "dynamic": ActivationScheme(),
    "by token": ActivationScheme(granularity="token"),
    "static": ActivationScheme(range="static"),
    "asymmetric, clipped": ActivationScheme(symmetric=False, clip=2.5),
}
# weights, how activations are quantized, and whether attention is
KINDS = [
    (("minmax", 8), "weights only", False),
    (("minmax", 8), "dynamic", False),
    (("minmax", 8), "by token", True),
    (("minmax", 8), "static", True),
    (("asymmetric_minmax", 8), "asymmetric, clipped", True),
    (("minmax", 4), "weights only", False),
    (("asymmetric_minmax", 4), "dynamic", False),
    (("minmax", 3), "weights only", False),
    (("minmax", 2), "by token", False),
    (("twn", "ternary"), "weights only", False),
]
KIND_IDS = [f"{name} {bits}, {scheme}" for (name, bits), scheme, _ in KINDS]
HEADS = {"bert": "classification", "gpt2": "language"}


class Logits(nn.Module):
    """A model as exporters take it: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if model.config.model_type == "gpt2" else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def batch(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask, with padding at the end of the first row."""
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return ids, mask


EXAMPLE = batch(2, 9)
OTHERS = [batch(2, 9, seed=1), batch(3, 14, seed=2), batch(2, 5, seed=3)]


def packed_for_export(name: str, weights: tuple, scheme: str, attention: bool) -> Logits:
    """A packed model of a family."""
    model = make(name, HEADS[name])
    quantizer, bits = weights
    of_weights = WeightScheme(quantizer=quantizer, bits=bits, granularity="row")
    config = QuantizationConfig(
        weights=of_weights, embeddings=of_weights, activations=SCHEMES[scheme], attention=attention
    )
    ids, mask = EXAMPLE
    quantize(model, config, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    return Logits(model.eval()).eval()


def check(graph, model: Logits, others: list[tuple[Tensor, Tensor]]) -> None:
    """A graph gives what the packed model gives, but for numbers between two codes; wrong ones are wrong by 1."""
    for ids, mask in (EXAMPLE, *others):
        with torch.no_grad():
            wanted = model(ids, mask)
        got = torch.as_tensor(graph(ids, mask))
        assert got.shape == wanted.shape
        error = float((got - wanted).norm() / wanted.norm())
        assert error < 0.05, error
