"""How much the loss depends on each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.activations.gradients import differentiable
from lmcompress.errors import LmcompressError


def fisher_diagonal(
    model: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Mapping[str, Tensor]]
) -> list[Tensor]:
    r"""The diagonal of the empirical Fisher information: squared gradients, summed over batches.

    .. math:: F_{ii} = \sum_b (\partial L_b / \partial w_i)^2

    Of batches of one row this is the sum over examples. The model runs in evaluation mode; its mode and its gradients
    are as before afterwards.

    Args:
        model: whose outputs have a ``loss`` where the batch has labels.
        weights: of the model; whether they are trained does not matter.
        batches: what the model is called with, labels included.

    Returns:
        For each weight a tensor of its shape, float32, at least 0.

    Raises:
        LmcompressError: If there are no batches, or the model gives no loss on them.

    Reference:
        Kim et al., *SqueezeLLM*, ICML 2024, https://arxiv.org/abs/2306.07629, section 4.1, equation 4.
    """
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    device = weights[0].device
    seen = 0
    with differentiable(model, weights):
        for batch in batches:
            outputs: Any = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            loss = outputs["loss"] if "loss" in outputs else None
            if loss is None:
                raise LmcompressError(
                    f"sensitivity needs a loss, got a {type(model).__name__} that gives none on batches with "
                    f"{', '.join(batch)}; give batches with labels"
                )
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            seen += 1
    if not seen:
        raise LmcompressError("sensitivity must be measured on some batches, got none; pass batches with labels")
    return sums
