"""The chunked vocabulary loss against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmcompress.distillation.losses.distributions import kl_divergence, reverse_kl
from lmcompress.distillation.vocabulary import VocabularyLoss, vocabulary_loss


def make_case(rows: int = 13, width: int = 6, vocabulary: int = 31):
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,)), torch.randn(rows, vocabulary)


def naive(hidden, weight, labels, teacher, asked: VocabularyLoss):
    logits = hidden @ weight.t()
    hard = F.cross_entropy(logits, labels, reduction="sum")
    plain_kl = kl_divergence(logits, teacher, temperature=asked.temperature, scale_by_temperature=False) * asked.scale
    soft = plain_kl.sum() if asked.soft is None else asked.soft(logits, teacher, labels).sum()
    return asked.label_weight * hard + asked.soft_weight * soft, hard, soft


def losses(student, teacher, labels):
    return reverse_kl(student, teacher, temperature=3.0)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (0.3, 0.0), (2.0, 0.7)], ids=str)
@pytest.mark.parametrize("soft", [None, losses], ids=["kl", "by-autograd"])
def test_values_and_gradients_are_those_of_the_whole_matrix(chunk, temperature, weights, soft):
    asked = VocabularyLoss(*weights, temperature=temperature, scale=temperature**2, soft=soft, chunk=chunk)
    hidden, weight, labels, teacher = make_case()
    expected, hard, kd = naive(hidden, weight, labels, teacher, asked)
    wanted = torch.autograd.grad(3.0 * expected, (hidden, weight))
    total, label_sum, soft_sum = vocabulary_loss(hidden, weight, labels, lambda a, b: teacher[a:b], asked)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    if weights[0] > 0:
        torch.testing.assert_close(label_sum, hard.detach(), rtol=1e-5, atol=1e-4)
    if weights[1] > 0:
        torch.testing.assert_close(soft_sum, kd.detach(), rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(3.0 * total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_loss_against_oneself_is_zero_and_has_no_gradient():
    hidden, weight, labels, _ = make_case()
    own = (hidden @ weight.t()).detach()
    asked = VocabularyLoss(0.0, 1.0, temperature=2.0, scale=4.0, chunk=5)
    total, _, _ = vocabulary_loss(hidden, weight, labels, lambda a, b: own[a:b], asked)
    assert abs(float(total.detach())) < 1e-4
    for gradient in torch.autograd.grad(total, (hidden, weight)):
        assert gradient.abs().max() < 1e-4


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one():
    hidden, weight, labels, teacher = make_case()
    weight.requires_grad_(False)
    total, _, _ = vocabulary_loss(hidden, weight, labels, lambda a, b: teacher[a:b], VocabularyLoss(1.0, 1.0, chunk=4))
    total.backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_teacher_is_asked_once_for_each_chunk_and_never_for_more():
    hidden, weight, labels, teacher = make_case()
    asked_for = []

    def chunks(start, stop):
        asked_for.append((start, stop))
        return teacher[start:stop]

    vocabulary_loss(hidden, weight, labels, chunks, VocabularyLoss(1.0, 1.0, chunk=5))
    assert asked_for == [(0, 5), (5, 10), (10, 13)]


def test_autocast_changes_the_products_but_not_the_losses_precision():
    hidden, weight, labels, teacher = make_case(rows=40, width=32)
    asked = VocabularyLoss(1.0, 1.0, temperature=2.0, scale=4.0, chunk=7)
    expected, *_ = naive(hidden, weight, labels, teacher, asked)
    with torch.autocast("cpu", torch.bfloat16):
        total, label_sum, soft_sum = vocabulary_loss(hidden, weight, labels, lambda a, b: teacher[a:b], asked)
    assert {total.dtype, label_sum.dtype, soft_sum.dtype} == {torch.float32}
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=0)
    total.backward()
    assert hidden.grad.dtype == torch.float32 and weight.grad.dtype == torch.float32


def test_no_rows_give_zero_and_a_zero_gradient():
    hidden = torch.zeros(0, 6, requires_grad=True)
    weight = torch.randn(31, 6, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    total, *_ = vocabulary_loss(hidden, weight, labels, lambda a, b: torch.zeros(0, 31), VocabularyLoss(1.0, 1.0))
    total.backward()
    assert total == 0 and torch.equal(weight.grad, torch.zeros_like(weight))
