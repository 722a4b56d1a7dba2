"""Per-example losses, on given labels or on labels sampled from the model's own predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.hooks import valid_outputs, valid_tokens
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, head_logits

Labels = Literal["given", "self"]
IGNORED = -100
"""The label of a token that is ignored."""

# up to this number of classes every label's loss is used, weighted by its probability, instead of a sampled one
_FEW_CLASSES = 8


@dataclass(frozen=True)
class Objective:
    """A loss of each example, and its weight in a mean over examples.

    Attributes:
        loss: ``(batch,)`` float32, with gradient.
        weight: ``(batch,)`` float32, without; the weights of an example's objectives sum to 1, or to 0 if it has no
            label.
    """

    loss: Tensor
    weight: Tensor


def label_objective(model: PreTrainedModel, outputs: Any, batch: Mapping[str, Tensor]) -> Objective:
    """The loss on the labels, for each example as if it were a batch of its own.

    Cross-entropy for classes, the mean over an example's labels if tokens have them; mean squared error for one
    output (or ``problem_type="regression"``); the mean of binary cross-entropies for float labels in several columns;
    the mean of the cross-entropies of both ends for question answering.
    Causal language models predict the next token: without ``labels`` the text itself is used.

    Args:
        model: the model.
        outputs: its outputs, with ``logits``.
        batch: inputs with ``labels``.

    Raises:
        LmcompressError: If there are no labels, or no logits.
    """
    if all(name in batch for name in SPAN_LABELS) and (ends := head_logits(outputs)) is not None:
        return _span_objective(ends, *(batch[name] for name in SPAN_LABELS))
    causal = anatomy_of(model).predicts_next
    labels = batch.get("labels")
    if labels is None and causal:
        labels = batch["input_ids"].masked_fill(~valid_tokens(batch), IGNORED)
    if labels is None:
        raise LmcompressError(
            f"this criterion needs labels in every batch, got {', '.join(batch)}; add a column 'labels', or use "
            'the model\'s own predictions with labels="self"'
        )
    logits = head_logits(outputs)
    if logits is None:
        raise LmcompressError(
            f"{type(model).__name__} must return logits to have a loss on labels, it returns {', '.join(outputs)}; use "
            'labels="self", or a model with a head'
        )
    if logits.dim() == 3:
        return _token_objective(*_next_token(logits, labels) if causal else (logits, labels))
    if _is_regression(model, logits):
        errors = (logits.float() - labels.float().reshape(logits.shape)).square()
        return _evenly(errors.mean(dim=-1))
    if _is_multi_label(model, labels):
        return _evenly(F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1))
    counted = labels != IGNORED
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return Objective(loss, counted.float())


def own_objectives(
    model: PreTrainedModel, outputs: Any, batch: Mapping[str, Tensor], generator: torch.Generator
) -> list[Objective]:
    r"""Losses on labels sampled from the model's own predictions, for calibration without labels.

    The loss against the model's own probabilities is useless: at the model itself its gradient is zero. But the loss
    on a label y *sampled* from them, :math:`-\log p(y)`, has a gradient whose mean is zero and whose second
    moment is the Fisher information, that is, the curvature of the divergence between the model and the model with
    a gate changed (Kwon et al. 2022 use the same quantity on given labels). So:

    - up to 8 classes: every label, weighted by its probability, which is the exact expectation; more: one is sampled;
    - tokens: one label is sampled for each valid token, in causal models for each predicted one; mean over them;
    - question answering: a first and a last token are sampled, each of all valid tokens;
    - multi-label: each label is sampled independently;
    - regression: the output is the mean of a Gaussian of variance 1, and the sample is one standard deviation off, up
      or down. For one output the gradient is then that of the output itself, without randomness;
    - a model without head: the same, for each element of its last hidden state; mean over valid tokens.

    Args:
        model: the model.
        outputs: its outputs, with ``logits`` or ``last_hidden_state``.
        batch: labels are ignored, except that their dtype identifies multi-label tasks.
        generator: on the CPU; used example by example, once per valid token,
            so that samples do not depend on batches or padding.

    Raises:
        LmcompressError: If the outputs have neither logits nor hidden states.
    """
    logits, mask = head_logits(outputs), valid_outputs(model, batch)
    if logits is None:
        hidden = outputs.get("last_hidden_state")
        if hidden is None:
            raise LmcompressError(
                f"{type(model).__name__} must return logits or last_hidden_state, got {', '.join(outputs)}: there "
                "is nothing to sample labels from; use a criterion without gradients"
            )
        return [_evenly(_signed_sum(hidden, mask, generator))]
    if "start_logits" in outputs:
        ends = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        uniform = torch.stack([torch.rand(2, generator=generator) for _ in logits]).to(logits.device)
        return [_span_objective(ends, *_draw(ends.detach().transpose(1, 2), uniform).unbind(-1))]
    if logits.dim() == 3:
        if anatomy_of(model).predicts_next:
            logits, mask = logits[:, :-1], mask[:, :-1] & mask[:, 1:]
        uniform = _uniform_per_token(mask, generator)
        drawn = _draw(logits.detach(), uniform.to(logits.device)).masked_fill(~mask, IGNORED)
        return [_token_objective(logits, drawn)]
    if _is_regression(model, logits):
        return [_evenly(_signs(logits, generator).mul(logits.float()).sum(dim=-1))]
    if _is_multi_label(model, batch.get("labels")):
        draws = torch.stack([torch.rand(logits.shape[-1], generator=generator) for _ in logits]).to(logits.device)
        there = (draws < torch.sigmoid(logits.detach().float())).float()
        return [_evenly(F.binary_cross_entropy_with_logits(logits.float(), there, reduction="none").mean(dim=-1))]
    log_p = torch.log_softmax(logits.float(), dim=-1)
    classes = logits.shape[-1]
    if classes <= _FEW_CLASSES:
        return [Objective(-log_p[:, label], log_p[:, label].detach().exp()) for label in range(classes)]
    uniform = torch.stack([torch.rand(1, generator=generator)[0] for _ in logits]).to(logits.device)
    return [_evenly(-log_p.gather(-1, _draw(logits.detach(), uniform)[:, None])[:, 0])]


def _evenly(loss: Tensor) -> Objective:
    return Objective(loss, torch.ones_like(loss.detach()))


def _is_regression(model: PreTrainedModel, logits: Tensor) -> bool:
    kind = getattr(model.config, "problem_type", None)
    return kind == "regression" or (kind is None and logits.shape[-1] == 1)


def _is_multi_label(model: PreTrainedModel, labels: Tensor | None) -> bool:
    kind = getattr(model.config, "problem_type", None)
    by_labels = labels is not None and labels.is_floating_point() and labels.dim() == 2
    return kind == "multi_label_classification" or (kind is None and by_labels)


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1], labels[:, 1:]


def _token_objective(logits: Tensor, labels: Tensor) -> Objective:
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    count = (labels != IGNORED).sum(dim=-1)
    return Objective(losses.sum(dim=-1) / count.clamp_min(1), (count > 0).float())


def _span_objective(ends: Tensor, *positions: Tensor) -> Objective:
    length = ends.shape[1]
    # as in the heads of Transformers: positions beyond the row are ignored
    sides = [
        F.cross_entropy(ends[..., side].float(), place.clamp(0, length), ignore_index=length, reduction="none")
        for side, place in enumerate(positions)
    ]
    return _evenly((sides[0] + sides[1]) / 2)


def _uniform_per_token(mask: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.zeros(mask.shape)
    for row, valid in zip(uniform, mask.cpu(), strict=True):
        row[valid] = torch.rand(int(valid.sum()), generator=generator)
    return uniform


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sampling by the inverse of the cumulative distribution."""
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def _signs(values: Tensor, generator: torch.Generator) -> Tensor:
    if values.shape[-1] == 1:
        return torch.ones(values.shape, device=values.device)
    rows = [(torch.rand(values.shape[1:], generator=generator) < 0.5).float() * 2 - 1 for _ in values]
    return torch.stack(rows).to(values.device)


def _signed_sum(hidden: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.zeros(hidden.shape)
    for row, valid in zip(signs, mask.cpu(), strict=True):
        row[valid] = (torch.rand(int(valid.sum()), hidden.shape[-1], generator=generator) < 0.5).float() * 2 - 1
    total = (signs.to(hidden.device) * hidden.float()).sum(dim=(1, 2))
    return total / mask.sum(dim=-1).clamp_min(1)
