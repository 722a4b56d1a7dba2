"""Per-example gradients, for criteria that must not depend on the batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmcompress.activations.running import evaluation_mode
from lmcompress.errors import LmcompressError

MAX_CLASSES = 64


def example_gradients(
    model: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[list[Tensor]]:
    """The gradient of each example's own loss, one example at a time, in evaluation mode.

    Args:
        model: a model whose outputs have a ``loss`` when the batch has labels.
        weights: parameters of the model, trainable or not.
        batches: model inputs with labels; split into single rows.

    Yields:
        For each weight a tensor of its shape and dtype; zeros where the loss does not depend on it.

    Raises:
        LmcompressError: If there are no examples, or the model returns no loss for them.
    """
    with differentiable(model, weights):
        for row in _rows(weights, batches):
            with torch.enable_grad():
                outputs = model(**row)
                loss = outputs["loss"] if "loss" in outputs else None
                if loss is None:
                    raise LmcompressError(
                        f"gradients need a loss, got a {type(model).__name__} that returns none for batches "
                        f"with {', '.join(row)}; give batches with labels"
                    )
                gradients = _gradients(loss, weights, keep=False)
            yield gradients


def class_gradients(
    model: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[float, list[Tensor]]]:
    r"""Terms whose sum is the exact diagonal of the Gauss-Newton matrix of a classifier's loss.

    The Hessian of cross entropy in the logits is :math:`\sum_c p_c (e_c - p)(e_c - p)^T`, and :math:`e_c - p`
    is the gradient of :math:`\log p_c`, so that for each example

    .. math:: h_{kk} = \sum_c p_c \Big(\frac{\partial \log p_c}{\partial w_k}\Big)^2

    For networks that are piecewise linear in each matrix (ReLU, max pooling) this is the second derivative itself; with
    a smooth activation the term with its second derivative is missing, as in the Levenberg-Marquardt approximation that
    LeCun et al. use. For a squared error with one output it is twice the squared gradient of the output.

    Args:
        model: a model whose outputs have ``logits``, ``(rows, classes)``.
        weights: parameters of the model.
        batches: model inputs; labels are ignored.

    Yields:
        For each example and class, the factor of the class and the gradients, one per weight and of its shape.

    Raises:
        LmcompressError: If there are no examples, the logits have another shape, or there are more than
            :data:`MAX_CLASSES` classes.

    Reference:
        LeCun, Denker & Solla, *Optimal Brain Damage*, NIPS 1989, section 2.2; that the Gauss-Newton matrix of cross
        entropy is the Fisher information with labels sampled from the model's own distribution: Martens, *New Insights
        and Perspectives on the Natural Gradient Method*, 2014, https://arxiv.org/abs/1412.1193.
    """
    unlabelled = ({k: v for k, v in batch.items() if k != "labels"} for batch in batches)
    with differentiable(model, weights):
        for row in _rows(weights, unlabelled):
            with torch.enable_grad():
                found = _by_class(model(**row)["logits"], weights)
            yield from found


def _by_class(logits: Tensor, weights: Sequence[nn.Parameter]) -> list[tuple[float, list[Tensor]]]:
    if logits.dim() != 2 or logits.shape[1] > MAX_CLASSES:
        raise LmcompressError(
            f"exact second derivatives need a classifier with logits (rows, at most {MAX_CLASSES}), got "
            f"{tuple(logits.shape)}; use the criterion fisher"
        )
    if logits.shape[1] == 1:
        return [(2.0, _gradients(logits[0, 0], weights, keep=False))]
    log_p = torch.log_softmax(logits[0].float(), dim=-1)
    last = len(log_p) - 1
    return [(p, _gradients(log_p[c], weights, keep=c < last)) for c, p in enumerate(log_p.exp().tolist())]


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode with gradients for these weights; modes and flags are restored afterwards.

    Args:
        model: any model.
        weights: parameters of it.
    """
    trained = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with evaluation_mode(model):
            yield
    finally:
        for weight, flag in zip(weights, trained, strict=True):
            weight.requires_grad_(flag)


def _rows(weights: Sequence[nn.Parameter], batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    device, seen = weights[0].device, 0
    for batch in batches:
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        for index in range(len(next(iter(tensors.values()), ()))):
            seen += 1
            yield {k: v[index : index + 1] for k, v in tensors.items()}
    if not seen:
        raise LmcompressError("gradients need at least one example, got none; pass batches")


def _gradients(value: Tensor, weights: Sequence[nn.Parameter], *, keep: bool) -> list[Tensor]:
    found = torch.autograd.grad(value, list(weights), retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]
