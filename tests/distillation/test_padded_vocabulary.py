"""Distillation between tables that are padded to different sizes for one tokenizer: the padding teaches nothing."""

import copy
from contextlib import nullcontext

import pytest
import torch
from families import VOCAB, inputs, make

from lmcompress import LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig
from lmcompress.method import Step

HEADS = {"causal_lm": "gpt2", "masked_lm": "bert"}


def _padded(model, rows):
    """A copy with more rows in table and head, of random weights."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(VOCAB + rows, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[VOCAB:].normal_()
        if (bias := padded.get_output_embeddings().bias) is not None:
            bias[VOCAB:].normal_()
    return padded.eval()


def _batch(model):
    batch = inputs(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def _gradients(student, teachers, **config):
    """The loss on the logits, and its gradients by parameter."""
    method = Distillation(DistillationConfig(**config), teachers)
    method.attach(student, torch.device("cpu"), nullcontext)
    batch = _batch(student)
    plain = {name: value for name, value in batch.items() if name != "labels"}
    step = Step(student, batch, plain, 0.0)
    try:
        method.before_forward(step)
        step.outputs = student(**step.student_inputs)
        (term,) = method.loss_terms(step).values()
        student.zero_grad()
        term.total.backward()
    finally:
        method.finish()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return term.total.detach(), {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("loss", ["auto", "reverse_kl"])
@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(0, 6), (6, 0), (3, 6)])
@pytest.mark.parametrize("problem", HEADS)
def test_the_gradient_is_that_of_tables_of_equal_size(problem, student_rows, teacher_rows, loss):
    student, teacher = (make(HEADS[problem], "language", seed=seed) for seed in (1, 2))
    config = dict(loss=loss, label_weight=0.5 if problem == "causal_lm" else 0.0)
    expected, wanted = _gradients(copy.deepcopy(student), teacher, **config)
    padded = _padded(student, student_rows) if student_rows else student
    other = _padded(teacher, teacher_rows) if teacher_rows else teacher
    value, got = _gradients(padded, other, vocab_size=VOCAB, **config)
    torch.testing.assert_close(value, expected)
    assert wanted.keys() == got.keys()
    for name, gradient in got.items():
        if gradient.shape != wanted[name].shape:
            assert not gradient[VOCAB:].any()
            gradient = gradient[:VOCAB]
        torch.testing.assert_close(gradient, wanted[name])


def test_two_teachers_of_different_padding_are_averaged_over_what_they_share():
    student, first, second = (make("gpt2", "language", seed=seed) for seed in (1, 2, 3))
    expected, _ = _gradients(student, [first, second])
    value, _ = _gradients(student, [_padded(first, 6), _padded(second, 2)], vocab_size=VOCAB)
    torch.testing.assert_close(value, expected)


def test_equal_sizes_are_compared_whole_whatever_the_tokenizer():
    student, teacher = (_padded(make("gpt2", "language", seed=seed), 6) for seed in (1, 2))
    whole, _ = _gradients(student, teacher)
    assert torch.equal(_gradients(student, teacher, vocab_size=VOCAB)[0], whole)


def test_padding_of_a_teacher_of_classes_is_no_other_vocabulary():
    student, teacher = make("bert", seed=1), _padded_inputs(make("bert", seed=2), 6)
    batch = inputs(student)
    batch["labels"] = torch.tensor([0, 1, 2])
    method = Distillation(DistillationConfig(vocab_size=VOCAB), teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    method.check_batch(batch)
    method.finish()
    without = Distillation(DistillationConfig(), teacher)
    without.attach(student, torch.device("cpu"), nullcontext)
    with pytest.raises(LmcompressError, match="64 tokens and the teacher one of 70"):
        without.check_batch(batch)
    without.finish()


def _padded_inputs(model, rows):
    model.resize_token_embeddings(VOCAB + rows, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("problem", HEADS)
def test_sizes_that_disagree_are_refused_without_the_tokenizers_and_with_a_larger_one(problem):
    student = make(HEADS[problem], "language", seed=1)
    teacher = _padded(make(HEADS[problem], "language", seed=2), 6)
    with pytest.raises(LmcompressError, match=r"must share a vocabulary: .* padded .* set vocab_size to the tokenizer"):
        _gradients(student, teacher)
    with pytest.raises(
        LmcompressError, match="vocab_size is the number of tokens .* got 66, but one of them has only 64"
    ):
        _gradients(student, teacher, vocab_size=66)
