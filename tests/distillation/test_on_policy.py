"""Texts that the student writes: reproducible, judged by the teacher only, and nothing changes without them."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make
from training import tiny_arguments
from two_tokenizers import TEXTS, language_model, tokenizer_of

from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import Distillation, DistillationConfig, OnPolicy
from lmcompress.distillation.on_policy import StudentTexts
from lmcompress.errors import LmcompressError
from lmcompress.trainers import DistillationArguments, DistillationTrainer

WRITES = OnPolicy(fraction=1.0, max_new_tokens=6, prompt_tokens=4)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(300)


@pytest.fixture(scope="module")
def talk(tokenizer):
    """Conversations as rows, and their collator."""
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]}
        for one, two in zip(TEXTS, reversed(TEXTS), strict=True)
    ]
    found = tokenize(
        load_task("mine", data={"train": rows, "validation": rows[:1]}, chat=True), tokenizer, max_length=50
    )
    return found.train, collator(found.task, tokenizer)


def trained(folder, talk, tokenizer, on_policy, *, student=None, teacher=None, resume=None, options=None, **args):
    student = language_model(tokenizer) if student is None else student
    teacher = language_model(tokenizer, seed=1) if teacher is None else teacher
    config = DistillationConfig(**({"loss": "jsd", "temperature": 1.0} | (options or {})), on_policy=on_policy)
    sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    trainer = DistillationTrainer(
        student, tiny_arguments(folder, **(sizes | args)), teacher=teacher, distillation=config, train_dataset=talk[0],
        data_collator=talk[1],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss_kd"] for entry in trainer.state.log_history if "loss_kd" in entry]


def equal(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True))


def test_a_share_of_none_is_supervised_distillation_to_the_bit(tmp_path, talk, tokenizer):
    none = trained(tmp_path, talk, tokenizer, None)
    zero = trained(tmp_path, talk, tokenizer, OnPolicy(fraction=0.0))
    assert equal(none, zero) and losses(none) == losses(zero)


def test_a_run_can_be_repeated_and_resumed_to_the_bit(tmp_path, talk, tokenizer):
    half = WRITES.model_copy(update={"fraction": 0.5})
    whole = trained(tmp_path / "whole", talk, tokenizer, half, save_strategy="steps", save_steps=2)
    again = trained(tmp_path / "again", talk, tokenizer, half)
    assert equal(whole, again) and losses(whole) == losses(again)
    resumed = trained(tmp_path / "whole", talk, tokenizer, half, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(whole, resumed)
    other = trained(tmp_path / "other", talk, tokenizer, half.model_copy(update={"seed": 11}))
    assert not equal(whole, other)


@pytest.mark.parametrize("loss", ["jsd", "kl", "reverse_kl"])
def test_the_loss_is_zero_at_the_teacher(tmp_path, talk, tokenizer, loss):
    teacher = language_model(tokenizer)
    found = trained(
        tmp_path, talk, tokenizer, WRITES, student=copy.deepcopy(teacher), teacher=teacher, options={"loss": loss},
        max_steps=1,
    )  # fmt: skip
    assert losses(found) == pytest.approx([0.0], abs=1e-5)


def test_what_the_student_writes_is_no_target(tmp_path, talk, tokenizer):
    with_labels = trained(tmp_path, talk, tokenizer, WRITES, options={"label_weight": 1.0})
    without = trained(tmp_path, talk, tokenizer, WRITES, options={"label_weight": 0.0})
    assert equal(with_labels, without)
    assert not any("loss_label" in entry for entry in with_labels.state.log_history)


def test_the_student_continues_the_prompt_before_the_last_answer(talk, tokenizer):
    model = language_model(tokenizer)
    batch = talk[1]([talk[0][n] for n in range(4)])
    # so cold that it always takes the likeliest token
    cold = WRITES.model_copy(update={"temperature": 1e-4})
    state = torch.random.get_rng_state()
    written = StudentTexts(cold, model, 0, 0, torch.no_grad).written(batch, 3, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for row in range(4):
        length = int(written["attention_mask"][row].sum())
        ids, labels = written["input_ids"][row, :length], written["labels"][row]
        answer = (batch["labels"][row] != -100).nonzero()[0].item()
        expected = batch["input_ids"][row, :answer].tolist()
        for _ in range(WRITES.max_new_tokens):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            if expected[-1] == tokenizer.eos_token_id:
                break
        assert ids.tolist() == expected
        assert labels[:length].tolist() == [-100] * answer + expected[answer:]
        assert set(labels[length:].tolist()) <= {-100}


def test_text_that_is_learned_from_its_first_token_on_begins_with_a_prompt(tokenizer):
    writer = StudentTexts(WRITES, language_model(tokenizer), 0, 0, torch.no_grad)
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    written = writer.written({"input_ids": ids, "labels": ids}, 0, 0)
    assert torch.equal(written["input_ids"][:, :4], ids[:, :4])
    assert (written["labels"][:, :4] == -100).all() and (written["labels"][:, 4] != -100).all()
    # without labels all real tokens count
    again = writer.written({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0, 0)
    assert torch.equal(again["input_ids"], written["input_ids"])
    other = writer.written({"input_ids": ids}, 1, 0)["input_ids"]
    assert other.shape != written["input_ids"].shape or not torch.equal(other, written["input_ids"])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_share_of_steps_is_the_fraction(tokenizer, fraction):
    writer = StudentTexts(
        WRITES.model_copy(update={"fraction": fraction}), language_model(tokenizer), 5, 0, torch.no_grad
    )
    share = sum(writer.chosen(step) for step in range(2000)) / 2000
    assert share == pytest.approx(fraction, abs=0.04 if 0 < fraction < 1 else 0)


def test_what_cannot_be_on_policy_is_refused(tmp_path, talk, tokenizer):
    with pytest.raises(LmcompressError, match="max_new_tokens must be less than the student's 64 positions, got 64"):
        trained(tmp_path, talk, tokenizer, OnPolicy(max_new_tokens=64))
    with pytest.raises(ValueError, match="on_policy needs a weight > 0"):
        trained(tmp_path, talk, tokenizer, WRITES, options={"weight": 0.0})
    with pytest.raises(LmcompressError, match="the student's head is for single_label_classification: leave it out"):
        config = DistillationConfig(on_policy=WRITES)
        Distillation(config, make("bert", seed=1)).attach(make("bert"), torch.device("cpu"), None)
    writer = StudentTexts(WRITES, language_model(tokenizer), 0, 0, torch.no_grad)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(LmcompressError, match="needs one text in each row, .* several documents packed"):
        writer.written({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}, 0, 0)
    with pytest.raises(LmcompressError, match="one tokenizer for student and teacher: got teacher_input_ids"):
        writer.written({"input_ids": ids, "teacher_input_ids": ids}, 0, 0)


def test_arguments_of_the_command_line_name_the_share(tmp_path):
    args = DistillationArguments(
        str(tmp_path), on_policy_fraction=0.25, max_new_tokens=9, report_to="none", use_cpu=True
    )
    assert args.config_of("distillation").on_policy == OnPolicy(fraction=0.25, max_new_tokens=9)


def test_a_distillation_whose_student_writes_nothing_leaves_batches_as_they_are():
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    method = Distillation(DistillationConfig(), make("bert", seed=1))
    assert not method.replaces_batches(0) and method.replace_batches(batches, 0) is batches
