"""The loss of causal language models: labels and teacher together, with logits computed in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.activations.capture import Capture
from lmcompress.activations.documents import Documents, documents_in, documents_of
from lmcompress.data.text import TEACHER_PREFIX
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.crossing import aligned
from lmcompress.distillation.losses.outputs import token_weights
from lmcompress.distillation.vocabulary import SoftLoss, TeacherChunk, VocabularyLoss, vocabulary_loss
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, Term


def next_token_labels(inputs: Mapping[str, Any]) -> Tensor:
    """The next token of each position, −100 where none counts; the last position never has one.

    Args:
        inputs: a causal batch; without ``labels`` the next real token is used, within a document where position ids
            start again and there is no mask.

    Returns:
        ``(batch, length)`` int64.
    """
    labels = inputs.get("labels")
    if labels is None:
        labels = inputs["input_ids"]
        if (documents := documents_in(inputs)) is not None:
            labels = labels.masked_fill(documents.begins, -100)
        if (mask := inputs.get("attention_mask")) is not None:
            # the first real token after padding on the left has no context
            before = F.pad(mask[:, :-1], (1, 0), value=0)
            labels = labels.masked_fill((mask == 0) | (before == 0), -100)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def teacher_labels(inputs: Mapping[str, Any]) -> Tensor:
    """The next token of each position of a teacher with its own inputs, as :func:`next_token_labels`.

    Args:
        inputs: a causal batch with ``teacher_input_ids``; ``teacher_labels`` mark what counts.

    Returns:
        ``(batch, length)`` int64, of the teacher's length.
    """
    own = {name.removeprefix(TEACHER_PREFIX): v for name, v in inputs.items() if name.startswith(TEACHER_PREFIX)}
    return next_token_labels(own)


def by_document(rows: Tensor, documents: Documents | None) -> Tensor:
    """Marked positions, with one row for each packed document; their order is unchanged.

    Args:
        rows: ``(batch, length)`` bool.
        documents: those packed into the rows, if any.

    Returns:
        ``(documents, longest)`` bool, or ``rows``.
    """
    return rows if documents is None else documents.of_positions(rows) & documents.mask.bool()


def chunked_term(
    config: DistillationConfig,
    step: Step,
    capture: Capture,
    answers: Sequence[Callable[[Tensor], TeacherChunk]],
    *,
    weights: tuple[float, float],
    soft: SoftLoss | None,
    mean: Callable[[Sequence[Tensor]], Tensor],
    tokens: int | None,
    autocast: Any,
    crossing: bool = False,
) -> dict[str, Term]:
    """The losses on labels and on the teachers' logits as one term.

    Args:
        config: temperature, scaling of tokens, size of the chunks.
        step: the step, after the student's forward pass.
        capture: hooks with its last hidden states.
        answers: the teachers' outputs, by chunks.
        weights: weights of the labels and of the teachers at this point of the training.
        soft: the loss against the teachers; None is KL(teacher ‖ student) with its gradient in closed form.
        mean: average of the logits of several teachers.
        tokens: size of the vocabulary, if tables are padded to different sizes; None: that of all tables. Both losses
            are then over these tokens alone.
        autocast: creates the mixed-precision context.
        crossing: whether the teachers have tokens of their own: positions are aligned, and the loss against the
            teachers is summed over those of the student's that have a counterpart.

    Returns:
        ``label+kd``, with both parts for logging.
    """
    hidden = capture.take_last_hidden()
    labels = next_token_labels(step.inputs)
    rows = (labels != -100).flatten().nonzero().squeeze(1)
    theirs, scales = rows, None
    if crossing:
        theirs, counts = aligned(labels != -100, teacher_labels(step.inputs) != -100)
        scales = counts.float()
    chunks = [answer(theirs) for answer in answers]
    head = anatomy_of(capture.model).head
    if head is None:
        raise LmcompressError(
            f"losses on the vocabulary need a language model head, which this {type(capture.model).__name__} does not "
            "have; load it with AutoModelForCausalLM"
        )
    temperature = config.temperature
    asked = VocabularyLoss(
        label_weight=weights[0] if "labels" in step.inputs else 0.0,
        soft_weight=weights[1],
        temperature=temperature,
        scale=temperature**2 if config.scale_by_temperature else 1.0,
        soft=soft,
        chunk=config.chunk_tokens,
        retain=step.retain_graph,
    )

    def teacher_logits(start: int, stop: int) -> Tensor:
        return mean([chunk(start, stop)[:, :tokens] for chunk in chunks])

    targets = labels.flatten()[rows]
    if config.token_scaling is not None and asked.soft_weight > 0 and len(rows):
        # every token's weight depends on the whole sequence: the teacher's head runs twice
        surprise = [
            F.cross_entropy(teacher_logits(n, n + asked.chunk).float(), targets[n : n + asked.chunk], reduction="none")
            for n in range(0, len(rows), asked.chunk)
        ]
        counted = by_document(labels != -100, documents_of(capture.model, step.inputs))
        scales = token_weights(torch.cat(surprise), counted, config.token_scaling)
    with autocast():
        states = _entering(head, hidden).flatten(0, 1)[rows]
        # a slice of all rows would cost a second gradient of the head
        weight = head.weight if tokens is None else head.weight[:tokens]
        total, label_sum, soft_sum = vocabulary_loss(states, weight, targets, teacher_logits, asked, scales)
    # a part that is not requested is no dead term
    sums = (("label", label_sum, asked.label_weight), ("kd", soft_sum, asked.soft_weight))
    return {"label+kd": Term(total, "labels", parts={name: part for name, part, weight in sums if weight > 0})}


def _entering(head: nn.Module, hidden: Tensor) -> Tensor:
    """The input of the head's matmul: chunks bypass its forward pass, but not the hooks that quantize its input."""
    for key, hook in head._forward_pre_hooks.items():
        if key in head._forward_pre_hooks_with_kwargs:
            (hidden, *_), _ = hook(head, (hidden,), {}) or ((hidden,), {})
        elif (changed := hook(head, (hidden,))) is not None:
            hidden = changed[0] if isinstance(changed, tuple) else changed
    return hidden
