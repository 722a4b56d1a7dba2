"""A teacher with another tokenizer: sorted probabilities, shared tokens, and the alignment of answers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import make
from scipy.special import softmax
from training import tiny_arguments
from two_tokenizers import TEXTS, language_model, renumbered, tokenizer_of

from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import Contrast, Distillation, DistillationConfig, LiveTeacher, Match
from lmcompress.distillation.crossing import aligned, shared_tokens
from lmcompress.distillation.losses.vocabularies import over_shared_tokens, universal_logit_distance
from lmcompress.errors import LmcompressError
from lmcompress.trainers import DistillationTrainer

TALK = [
    {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]}
    for one, two in zip(TEXTS, reversed(TEXTS), strict=True)
]
CONFIGS = {
    "uld": DistillationConfig(loss="uld", temperature=2.0),
    "with_rest": DistillationConfig(shared_tokens="with_rest", temperature=2.0),
    "renormalized": DistillationConfig(shared_tokens="renormalized", loss="jsd", temperature=2.0),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rows_for(mine, theirs, *, chat: bool):
    rows = TALK if chat else [{"text": text} for text in TEXTS]
    task = load_task("mine", data={"train": rows, "validation": rows[:1]}, chat=chat)
    found = tokenize(task, mine, max_length=60, teacher_tokenizer=theirs)
    return found.train, collator(found.task, mine, theirs)


def trained(folder, config, student, teacher, mine, theirs, *, chat=True, rows=None, **args):
    """The trainer after its first optimizer step, and what it logged."""
    data, collate = rows_for(mine, theirs, chat=chat) if rows is None else rows
    sizes = {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    trainer = DistillationTrainer(
        student, tiny_arguments(folder, **(sizes | args)), teacher=LiveTeacher(teacher, theirs), distillation=config,
        train_dataset=data, data_collator=collate, processing_class=mine,
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.state.log_history[0]


def sorted_distance(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """ULD of two vectors of logits, in plain NumPy."""
    q, p = (np.sort(softmax(z.astype(np.float64) / temperature))[::-1] for z in (student, teacher))
    size = max(len(p), len(q))
    p, q = (np.concatenate([x, np.zeros(size - len(x))]) for x in (p, q))
    return float(np.abs(p - q).sum())


@pytest.mark.parametrize("sizes", [(7, 11), (11, 7), (5, 5)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_uld_agrees_with_its_definition(sizes, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 2, size, generator=generator) for size in sizes)
    found = universal_logit_distance(student, teacher, temperature=temperature)
    for place in np.ndindex(4, 2):
        expected = temperature**2 * sorted_distance(student[place].numpy(), teacher[place].numpy(), temperature)
        assert float(found[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_uld_is_zero_for_permuted_vocabularies_and_needs_equal_rows():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(universal_logit_distance(logits, logits[:, order]), torch.zeros(3), atol=1e-6, rtol=0)
    with pytest.raises(LmcompressError, match=r"must have the same rows, got \(3, 9\) and \(2, 9\)"):
        universal_logit_distance(logits, logits[:2])


def test_over_shared_tokens_the_rest_has_the_probability_of_all_others():
    student, teacher = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    mine, theirs = torch.tensor([0, 3]), torch.tensor([6, 2])
    for temperature in (1.0, 2.5):
        with_rest = over_shared_tokens(student, teacher, mine, theirs, temperature=temperature)
        for found, logits, ids in zip(with_rest, (student, teacher), (mine, theirs), strict=True):
            p = softmax(logits.numpy() / temperature, axis=-1)
            expected = np.concatenate([p[:, ids], 1 - p[:, ids].sum(-1, keepdims=True)], axis=-1)
            np.testing.assert_allclose(found.softmax(-1), expected, atol=1e-6)
    renormalized, _ = over_shared_tokens(student, teacher, mine, theirs, rest=False)
    p = softmax(student.numpy(), axis=-1)[:, mine]
    np.testing.assert_allclose(renormalized.softmax(-1), p / p.sum(-1, keepdims=True), atol=1e-6)
    # nothing is left of the student's vocabulary, so the teacher's rest has no counterpart
    full, _ = over_shared_tokens(student[:, :2], teacher, torch.tensor([0, 1]), theirs)
    assert full.shape == (2, 2)


def test_answers_are_aligned_token_by_token():
    student = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0]]).bool()
    teacher = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 1]]).bool()
    numbers, counted = aligned(student, teacher)
    # row 0: answers of 2 and 2 tokens against 1 and 3; row 1: 3 against 4 (and an answer that the student lacks)
    assert counted.tolist() == [True, False, True, True, True, True, True]
    assert numbers.tolist() == [0, 0, 3, 4, 8 + 1, 8 + 2, 8 + 3]
    numbers, counted = aligned(student, torch.zeros_like(teacher))
    assert not counted.any() and not numbers.any()


def test_tokens_are_shared_by_the_text_that_they_stand_for():
    mine, theirs = tokenizer_of(300), tokenizer_of(270)
    shared = shared_tokens(mine, theirs)
    for one, two in zip(shared.student.tolist(), shared.teacher.tolist(), strict=True):
        assert mine.convert_ids_to_tokens(one) == theirs.convert_ids_to_tokens(two)
    # the merges of the smaller one are the first of the larger
    assert len(shared.student) == len(theirs)
    assert (mine.eos_token_id, theirs.eos_token_id) in zip(
        shared.student.tolist(), shared.teacher.tolist(), strict=True
    )
    with pytest.raises(
        LmcompressError, match="must share tokens to be compared by them, got 1 in common; use loss='uld'"
    ):
        shared_tokens(mine, _other_alphabet())


def _other_alphabet():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"<|endoftext|>": 0, "ᚠᚢ": 1, "ᚦᚨ": 2}, unk_token="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<|endoftext|>")


@each_config
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_the_loss_is_zero_at_a_teacher_whose_ids_are_permuted(tmp_path, config, chat):
    mine = tokenizer_of(300)
    student = language_model(mine)
    theirs, teacher = renumbered(mine, copy.deepcopy(student))
    _, log = trained(tmp_path, config, student, teacher, mine, theirs, chat=chat)
    assert log["loss_kd"] == pytest.approx(0, abs=1e-5)
    assert log["loss_label"] > 1


@pytest.mark.parametrize("loss", ["kl", "reverse_kl"])
def test_shared_tokens_of_a_permuted_teacher_are_a_plain_distillation(tmp_path, loss):
    mine = tokenizer_of(300)
    teacher = language_model(mine, seed=1)
    plain = DistillationConfig(loss=loss, temperature=2.0)
    # SGD: Adam's first step is the gradient's sign, also where that is noise
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    whole, expected = trained(tmp_path, plain, language_model(mine), teacher, mine, mine, **sgd)
    theirs, other = renumbered(mine, copy.deepcopy(teacher))
    config = DistillationConfig(loss=loss, temperature=2.0, shared_tokens="with_rest")
    crossed, log = trained(tmp_path, config, language_model(mine), other, mine, theirs, **sgd)
    assert log["loss_kd"] == pytest.approx(expected["loss_kd"], rel=1e-5)
    torch.testing.assert_close(crossed.student.state_dict(), whole.student.state_dict(), atol=1e-5, rtol=1e-4)


def test_uld_of_a_step_is_that_of_the_aligned_answers_over_the_labels(tmp_path):
    mine, theirs = tokenizer_of(300), tokenizer_of(262)
    student, teacher = language_model(mine), language_model(theirs, seed=1)
    data, collate = rows_for(mine, theirs, chat=True)
    batch = collate([data[n] for n in range(len(data))])
    with torch.no_grad():
        logits = [
            model(input_ids=batch[f"{side}input_ids"], attention_mask=batch[f"{side}attention_mask"]).logits.numpy()
            for model, side in ((student, ""), (teacher, "teacher_"))
        ]
    total, count = 0.0, 0
    for row in range(len(data)):
        places = [(batch[name][row] != -100).nonzero().flatten().tolist() for name in ("labels", "teacher_labels")]
        count += len(places[0])
        for one, two in zip(*places, strict=False):
            total += sorted_distance(logits[0][row, one - 1], logits[1][row, two - 1], 1.0)
    config = DistillationConfig(loss="uld", temperature=1.0)
    for size, accumulation in ((8, 1), (2, 4)):
        _, log = trained(
            tmp_path, config, copy.deepcopy(student), teacher, mine, theirs, rows=(data, collate),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        assert log["loss_kd"] == pytest.approx(total / count, rel=1e-4)


@each_config
@pytest.mark.parametrize(
    "more, what",
    [
        ({"matches": (Match(loss="hidden_mse", student=1, teacher=1),)}, "matches: features"),
        ({"contrast": Contrast()}, "contrast: features"),
        ({"token_scaling": 1.0}, "token_scaling needs one vocabulary"),
    ],
    ids=["matches", "contrast", "token_scaling"],
)
def test_what_needs_equal_positions_or_one_vocabulary_is_refused(tmp_path, config, more, what):
    mine, theirs = tokenizer_of(300), tokenizer_of(270)
    with pytest.raises(LmcompressError, match=what):
        trained(tmp_path, config.model_copy(update=more), language_model(mine), language_model(theirs), mine, theirs)


def test_missing_tokenizers_and_inputs_are_refused(tmp_path):
    mine, theirs = tokenizer_of(300), tokenizer_of(270)
    student, teacher = language_model(mine), language_model(theirs)
    rows = rows_for(mine, None, chat=True)
    with pytest.raises(
        LmcompressError, match="shared_tokens compares a teacher that has another tokenizer, but the batch"
    ):
        trained(tmp_path, CONFIGS["with_rest"], student, teacher, mine, theirs, rows=rows)
    with pytest.raises(LmcompressError, match="vocabulary of 300 tokens .* tokenize for the teacher too"):
        trained(tmp_path, CONFIGS["uld"], student, teacher, mine, theirs, rows=rows)
    with pytest.raises(LmcompressError, match="shared_tokens needs both tokenizers"):
        Distillation(CONFIGS["with_rest"], teacher).attach(student, torch.device("cpu"), None, mine)
    with pytest.raises(LmcompressError, match=r"must share one, got vocabularies of \[270, 300\]"):
        Distillation(CONFIGS["uld"], [teacher, language_model(mine, seed=1)]).attach(student, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="loss uld compares whole vocabularies: leave shared_tokens out"):
        DistillationConfig(loss="uld", shared_tokens="with_rest")
    with pytest.raises(
        LmcompressError, match="shared_tokens with_rest is of causal language models; the student's head"
    ):
        bert = make("bert", "language")
        Distillation(CONFIGS["with_rest"], bert).attach(make("bert", "language"), torch.device("cpu"), None)
