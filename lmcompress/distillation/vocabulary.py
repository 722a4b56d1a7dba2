"""The loss over a large vocabulary, in chunks of tokens: the full ``(tokens, vocabulary)`` float32 matrix never exists.

Gradients are computed chunk by chunk in the forward pass, so nothing is recomputed: student and teacher head are each
computed once, and the student's gradient costs the usual two matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TeacherChunk = Callable[[int, int], Tensor]
"""``(start, stop) -> (stop - start, vocabulary)`` logits of the teacher for these rows."""

SoftLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(student logits, teacher logits, labels) -> (rows,)`` float32, differentiable in the first."""


@dataclass(frozen=True)
class VocabularyLoss:
    """The options of the loss over chunks.

    Attributes:
        label_weight: weight of the cross-entropy with the labels.
        soft_weight: weight of the loss against the teacher.
        temperature: temperature of the closed form below.
        scale: factor of the closed form, usually ``temperature ** 2``.
        soft: another loss than KL, differentiated by autograd; None is KL(teacher ‖ student) with its gradient in
            closed form.
        chunk: rows per chunk.
        retain: whether backward runs more than once; costs one more gradient of the head.
    """

    label_weight: float
    soft_weight: float
    temperature: float = 1.0
    scale: float = 1.0
    soft: SoftLoss | None = None
    chunk: int = 512
    retain: bool = False


def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TeacherChunk,
    asked: VocabularyLoss,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows of cross-entropy with labels and of a loss against a teacher, in one pass over chunks.

    Args:
        hidden: ``(rows, width)``, inputs of the head; only rows that have a label.
        weight: ``(vocabulary, width)`` of the head.
        labels: ``(rows,)`` int64, none of them −100.
        teacher: gives the teacher's logits chunk by chunk; called once for each chunk, in order.
        asked: weights and form.
        row_weights: ``(rows,)`` float32, factor of the loss against the teacher for each row; default 1.

    Returns:
        ``(total, label_sum, soft_sum)``, 0-d float32: ``total`` is the weighted sum of the other two and carries the
        gradient to ``hidden`` and ``weight``; the others are for logging.
    """
    total, label_sum, soft_sum = _Chunked.apply(hidden, weight, labels, teacher, asked, row_weights)
    return total, label_sum.detach(), soft_sum.detach()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher: TeacherChunk,
        asked: VocabularyLoss,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        compute_weight = weight.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        # everything here is float32 except the matmuls, whose dtype is chosen above
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], asked.chunk):
                stop = min(start + asked.chunk, hidden.shape[0])
                rows = hidden[start:stop].detach().to(dtype)
                logits = (rows @ compute_weight.t()).float()
                targets = teacher(start, stop) if asked.soft_weight > 0 else logits
                row_weight = None if row_weights is None else row_weights[start:stop]
                gradient = _chunk_gradient(logits, targets, labels[start:stop], asked, sums, row_weight)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = gradient @ compute_weight
                if grad_weight is not None:
                    if dtype == torch.float32:
                        grad_weight.addmm_(gradient.t(), rows)
                    else:
                        grad_weight += gradient.t() @ rows
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.retain = asked.retain
        ctx.set_materialize_grads(False)
        total = asked.label_weight * sums[0] + asked.soft_weight * sums[1]
        label_sum, soft_sum = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(label_sum, soft_sum)
        return total, label_sum, soft_sum

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return None, None, None, None, None, None
        if ctx.grads is None:
            raise RuntimeError("backward through a chunked vocabulary loss a second time: allow it with retain=True")
        grad_hidden, grad_weight = ctx.grads
        if ctx.retain:
            scaled = [None if grad is None else grad * grad_total for grad in (grad_hidden, grad_weight)]
        else:
            ctx.grads = None
            # in place: the gradient of the head is as large as the head
            scaled = [None if grad is None else grad.mul_(grad_total) for grad in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None


def _chunk_gradient(
    logits: Tensor, targets: Tensor, labels: Tensor, asked: VocabularyLoss, sums: Tensor, row_weight: Tensor | None
) -> Tensor:
    """Adds the chunk's losses to ``sums`` and returns the gradient of their weighted sum with respect to ``logits``."""
    if asked.soft is not None:
        return _chunk_gradient_by_autograd(logits, targets, labels, asked.soft, asked, sums, row_weight)
    index = labels[:, None]
    gradient = torch.zeros((), device=logits.device)
    log_q = _log_softmax(logits, asked.temperature)
    if asked.label_weight > 0:
        plain = log_q if asked.temperature == 1.0 else _log_softmax(logits, 1.0)
        sums[0] -= plain.gather(1, index).sum()
        gradient = plain.exp() if asked.temperature == 1.0 and asked.soft_weight > 0 else plain.exp_()
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0)).mul_(asked.label_weight)
    if asked.soft_weight > 0:
        # owned by this chunk: a live teacher recomputes it each time
        log_p = _log_softmax(targets.float(), asked.temperature)
        p = log_p.exp()
        # KL = sum p (log p - log q); dKL/dz = scale / T (q - p)
        log_p.sub_(log_q)
        soft = log_q.exp_().sub_(p).mul_(asked.soft_weight * asked.scale / asked.temperature)
        if row_weight is not None:
            p.mul_(row_weight[:, None])
            soft.mul_(row_weight[:, None])
        sums[1] += asked.scale * torch.dot(p.flatten(), log_p.flatten())
        gradient = soft.add_(gradient) if gradient.dim() == 0 else gradient.add_(soft)
    return gradient if gradient.dim() else torch.zeros_like(logits)


def _chunk_gradient_by_autograd(
    logits: Tensor,
    targets: Tensor,
    labels: Tensor,
    soft_loss: SoftLoss,
    asked: VocabularyLoss,
    sums: Tensor,
    row_weight: Tensor | None,
) -> Tensor:
    with torch.enable_grad():
        logits = logits.requires_grad_()
        hard = F.cross_entropy(logits, labels, reduction="sum")
        rows = soft_loss(logits, targets, labels)
        soft = rows.sum() if row_weight is None else torch.dot(rows, row_weight)
        (gradient,) = torch.autograd.grad(asked.label_weight * hard + asked.soft_weight * soft, logits)
    sums[0] += hard.detach()
    sums[1] += soft.detach()
    return gradient


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
