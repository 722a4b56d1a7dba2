"""The sensitivity of the loss to each weight."""

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

    With batches of one row this is the sum over examples. The model runs in evaluation mode; its mode and gradients
    are restored afterwards.

    Args:
        model: a model whose outputs have a ``loss`` when the batch has labels.
        weights: parameters of the model, trainable or not.
        batches: model inputs, with labels.

    Returns:
        For each weight a tensor of its shape, float32, >= 0.

    Raises:
        LmcompressError: If there are no batches, or the model returns no loss for them.

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
                    f"sensitivity needs a loss, got a {type(model).__name__} that returns none for batches with "
                    f"{', '.join(batch)}; give batches with labels"
                )
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            seen += 1
    if not seen:
        raise LmcompressError("sensitivity needs at least one batch, got none; pass batches with labels")
    return sums
