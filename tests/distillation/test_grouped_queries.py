"""Distillation of attention between models whose queries share keys, with unequal numbers of heads."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from families import HEAD_SIZE, inputs, make
from transformers import PreTrainedModel

from lmcompress import LmcompressError
from lmcompress.activations.capture import extract
from lmcompress.distillation import Distillation, DistillationConfig, Match
from lmcompress.method import Step, Term

MATCHES = [
    Match(loss="minilmv2_query", student=3, teacher=3),
    Match(loss="minilmv2_key", student=3, teacher=3),
    Match(loss="minilmv2_value", student=3, teacher=3),
    Match(loss="attention_mse_mean", on="scores", student=2, teacher=3),
    Match(loss="attention_mse_mean", on="probabilities", student=2, teacher=3),
    Match(loss="attention_ce_mean", on="probabilities", student=2, teacher=3),
]


def student_and_teacher(**student: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student of 4 query heads on 2 keys, and a teacher of 8 on 4, of the same width."""
    return make("llama", "language", seed=1, num_attention_heads=4, num_key_value_heads=2, **student), make(
        "llama", "language", seed=2
    )


def terms(student: PreTrainedModel, teacher: PreTrainedModel, matches: list[Match]) -> dict[str, Term]:
    """The terms of one step."""
    batch = inputs(student)
    method = Distillation(DistillationConfig(weight=0.0, label_weight=0.0, matches=matches), teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    step = Step(student, batch, batch, 0.0)
    method.before_forward(step)
    step.outputs = student(**step.student_inputs)
    found = method.loss_terms(step)
    method.finish()
    return found


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: f"{match.loss}-{match.on}")
def test_the_value_is_that_of_the_models_own_attention(match):
    student, teacher = student_and_teacher()
    ((_, term),) = terms(student, teacher, [match]).items()
    batch = inputs(student)
    mask = batch["attention_mask"].numpy().astype(bool)
    kind = match.on or {"query": "queries", "key": "keys", "value": "values"}[match.loss.split("_")[1]]
    pair = []
    for model, layer in ((student, match.student), (teacher, match.teacher)):
        if kind == "probabilities":
            model.set_attn_implementation("eager")
            with torch.no_grad():
                feature = model(**batch, output_attentions=True).attentions[layer - 1]
        else:
            feature = extract(model, batch, [(kind, layer)])[1][kind, layer]
        pair.append(feature.double().numpy())
    expected = (relations if match.on is None else distances)(match.loss, pair, mask)
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-4)


def distances(loss: str, pair: list[np.ndarray], mask: np.ndarray) -> float:
    """Of attention averaged over heads, over pairs of real tokens that look back."""
    s, t = (feature.mean(1) for feature in pair)
    seen = np.tril(mask[:, :, None] & mask[:, None, :])
    if loss == "attention_mse_mean":
        return float(((s - t) ** 2)[seen].sum())
    return float(-(t[seen] * np.log(s[seen])).sum())


def relations(loss: str, pair: list[np.ndarray], mask: np.ndarray) -> float:
    """KL divergence of scaled products within as many relation heads as the teacher has heads of this kind."""
    heads, total = pair[1].shape[1], 0.0
    for row, valid in enumerate(mask):
        length = int(valid.sum())
        for head in range(heads):
            logs = []
            for feature in pair:
                joined = feature[row].transpose(1, 0, 2).reshape(len(valid), -1)
                part = np.split(joined, heads, axis=1)[head][:length]
                scores = part @ part.T / np.sqrt(part.shape[1])
                scores[np.triu_indices(length, 1)] = -np.inf
                logs.append(scores - np.log(np.exp(scores).sum(1, keepdims=True)))
            s, t = logs
            seen = np.tril_indices(length)
            total += float((np.exp(t) * (np.where(np.isfinite(t), t, 0) - np.where(np.isfinite(s), s, 0)))[seen].sum())
    return total / heads


def test_the_terms_train_the_projections_of_queries_and_keys():
    student, teacher = student_and_teacher()
    total = sum(term.total for term in terms(student, teacher, MATCHES).values())
    total.backward()
    for block in student.model.layers:
        assert block.self_attn.q_proj.weight.grad.abs().sum() > 0 and block.self_attn.k_proj.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_is_its_teacher_is_at_the_minimum():
    teacher = make("llama", "language", seed=2)
    student = make("llama", "language", seed=2)
    matches = [match.model_copy(update={"student": match.teacher}) for match in MATCHES if "ce" not in match.loss]
    assert all(
        float(term.total.detach()) == pytest.approx(0.0, abs=1e-5) for term in terms(student, teacher, matches).values()
    )


def test_head_by_head_unequal_numbers_are_refused_before_training():
    student, teacher = student_and_teacher()
    match = Match(loss="attention_mse", on="scores", student=1, teacher=1)
    with pytest.raises(LmcompressError, match="got 4 heads of the student and 8 of the teacher"):
        terms(student, teacher, [match])
    match = Match(loss="minilm_value", student=1, teacher=1)
    with pytest.raises(LmcompressError, match="got 2 heads of the student and 4 of the teacher"):
        terms(student, teacher, [match])
    assert HEAD_SIZE == student.model.layers[0].self_attn.head_dim
