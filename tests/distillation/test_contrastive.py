"""Contrast of tokens and sequences, the memory, and what they are in a training run."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import inputs, make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainingArguments

from lmcompress import LmcompressError, anatomy_of
from lmcompress.activations.capture import extract
from lmcompress.distillation import (
    Contrast,
    Distillation,
    DistillationConfig,
    StoredTeacher,
    TeacherStore,
    quantgpt,
    ternarybert,
)
from lmcompress.distillation.contrastive.losses import homogeneity, sampled, sequence_contrast, token_contrast
from lmcompress.distillation.contrastive.term import MemoryBank
from lmcompress.distillation.losses.outputs import token_scaling
from lmcompress.method import Step, Term
from lmcompress.trainers import DistillationTrainer
from lmcompress.trainers.multitask import _renamed

BATCH, LENGTH, WIDTH = 3, 5, 8
# padding on the right, on the left and in none
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
IDS = torch.tensor([[4, 5, 4, 1, 1], [1, 6, 6, 6, 7], [2, 3, 4, 5, 6]])


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH, WIDTH)), generator=torch.Generator().manual_seed(seed))


def cosine(a, b) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def by_hand(student, teacher, mask, temperature, negatives=None, ids=None) -> np.ndarray:
    """Token contrast as the formula is read, a token at a time."""
    loss = np.zeros(mask.shape)
    pool = teacher if negatives is None else negatives
    for b, i in np.argwhere(mask.numpy()):
        score = math.exp(cosine(student[b, i], teacher[b, i]) / temperature)
        total = score
        for j in range(mask.shape[1]):
            if j != i and mask[b, j] and (ids is None or ids[b, j] != ids[b, i]):
                total += math.exp(cosine(student[b, i], pool[b, j]) / temperature)
        loss[b, i] = -math.log(score / total)
    return loss


@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "other-ids"])
@pytest.mark.parametrize("own", [False, True], ids=["teacher", "student"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_contrast_of_tokens_is_its_formula(temperature, own, ids):
    student, teacher = states(0), states(1)
    negatives = student if own else None
    loss = token_contrast(student, teacher, MASK, temperature=temperature, negatives=negatives, input_ids=ids)
    assert loss.shape == MASK.shape and loss.dtype == torch.float32
    expected = torch.from_numpy(by_hand(student, teacher, MASK, temperature, negatives, ids))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_contrast_looks_at_directions_only():
    student, teacher = states(0), states(1)
    lengths = states(2, BATCH, LENGTH, 1).exp()
    torch.testing.assert_close(
        token_contrast(student * lengths, teacher / lengths, MASK), token_contrast(student, teacher, MASK)
    )


def test_a_step_against_the_gradient_moves_a_token_to_its_teacher_and_from_the_others():
    student, teacher = states(0).requires_grad_(), states(1)
    before = token_contrast(student, teacher, MASK).sum()
    before.backward()
    # the loss knows directions only: along the state itself there is nothing to gain
    torch.testing.assert_close((student.grad * student.detach()).sum(-1), torch.zeros(BATCH, LENGTH), atol=1e-5, rtol=0)
    moved = student.detach() - 0.01 * student.grad
    assert token_contrast(moved, teacher, MASK).sum() < before


@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
def test_what_stands_at_padding_does_not_matter(value):
    plain, teacher = states(0), states(1)
    padding = ~MASK.bool()
    spoilt, taught = plain.clone(), teacher.clone()
    spoilt[padding], taught[padding] = value, value
    spoilt.requires_grad_()
    total = 0.0
    for loss in (token_contrast, sequence_contrast, lambda s, t, m: token_contrast(s, t, m, negatives=s)):
        torch.testing.assert_close(loss(spoilt, taught, MASK), loss(plain, teacher, MASK))
        total = total + loss(spoilt, taught, MASK).sum()
    total.backward()
    assert spoilt.grad.isfinite().all() and not spoilt.grad[padding].any()
    torch.testing.assert_close(homogeneity(spoilt, MASK), homogeneity(plain, MASK))


def test_a_token_without_negatives_costs_nothing():
    student = states(0).requires_grad_()
    alone = torch.zeros(BATCH, LENGTH).index_fill(1, torch.tensor(2), 1)
    for loss in (
        token_contrast(student, states(1), alone),
        token_contrast(student, states(1), torch.zeros(BATCH, LENGTH)),
        token_contrast(student, states(1), MASK, input_ids=torch.full_like(IDS, 9)),
    ):
        assert not loss.any()
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isfinite().all() and not gradient.any()


def test_a_batch_is_its_sequences_and_arithmetic_is_float32_under_autocast():
    student, teacher = states(0), states(1)
    whole = token_contrast(student, teacher, MASK, input_ids=IDS)
    alone = [
        token_contrast(student[b : b + 1], teacher[b : b + 1], MASK[b : b + 1], input_ids=IDS[b : b + 1])
        for b in range(BATCH)
    ]
    torch.testing.assert_close(whole, torch.cat(alone))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(token_contrast(student, teacher, MASK, input_ids=IDS), whole)
    assert token_contrast(student.bfloat16(), teacher.bfloat16(), MASK).dtype == torch.float32


@given(st.integers(1, 12), st.integers(0, 1000))
def test_negatives_are_drawn_among_those_allowed(count, seed):
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(4, 10, generator=generator) > 0.5
    chosen = sampled(allowed, count, generator=generator)
    assert not (chosen & ~allowed).any()
    assert torch.equal(chosen.sum(-1), allowed.sum(-1).clamp(max=count))


def test_every_negative_is_drawn_as_often_as_any_other():
    allowed = torch.tensor([True, False, True, True, True]).expand(4000, 5)
    share = sampled(allowed, 2, generator=torch.Generator().manual_seed(0)).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.5, 0, 0.5, 0.5, 0.5]), atol=0.03, rtol=0)


def test_sequences_are_contrasted_as_the_means_of_their_tokens():
    student, teacher = states(0), states(1, BATCH, 4, WIDTH)
    told = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    mine, theirs = (
        np.stack([s[m.bool()].double().mean(0).numpy() for s, m in zip(side, mask, strict=True)])
        for side, mask in ((student, MASK), (teacher, told))
    )
    scores = np.array([[cosine(a, b) / 0.5 for b in theirs] for a in mine])
    expected = np.log(np.exp(scores).sum(1)) - scores.diagonal()
    loss = sequence_contrast(student, teacher, MASK, temperature=0.5, teacher_mask=told)
    torch.testing.assert_close(loss.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert not sequence_contrast(student[:1], teacher[:1], MASK[:1], teacher_mask=told[:1]).any()


def test_homogeneity_is_the_mean_cosine_of_two_tokens():
    given_states = states(0)
    expected = [
        np.mean([cosine(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (row[m.bool()] for row, m in zip(given_states, MASK, strict=True))
    ]
    torch.testing.assert_close(homogeneity(given_states, MASK).double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    collapsed = states(1, BATCH, 1, WIDTH) * states(2, BATCH, LENGTH, 1).exp()
    torch.testing.assert_close(homogeneity(collapsed, MASK), torch.ones(BATCH))
    assert not homogeneity(given_states, torch.eye(BATCH, LENGTH)).any()


@given(st.floats(0.01, 1e4), st.integers(0, 1000))
def test_weights_of_tokens_have_the_mean_one(temperature, seed):
    surprise = states(seed, BATCH, LENGTH).exp() * 3
    weights = token_scaling(surprise, MASK, temperature=temperature)
    torch.testing.assert_close(weights.sum(-1), MASK.sum(-1).float(), rtol=1e-4, atol=1e-4)
    assert not weights[MASK == 0].any() and (weights >= 0).all()
    for row, mask, mine in zip(surprise, MASK.bool(), weights, strict=True):
        order = row[mask].argsort()
        assert (mine[mask][order].diff() >= -1e-6).all()
    torch.testing.assert_close(token_scaling(surprise, MASK, temperature=1e9), MASK.float(), rtol=1e-4, atol=1e-4)


def test_the_memory_is_a_moving_mean():
    bank = MemoryBank(8, 2, momentum=0.75)
    ids = torch.tensor([[3, 5]])
    expected = None
    for step in range(4):
        now = states(step, 1, 2, 2)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
        read = bank.read(ids, now)
        torch.testing.assert_close(read, expected)
        bank.add(ids.flatten(), read.flatten(0, 1))
        bank.commit()
    torch.testing.assert_close(bank.slots[[3, 5]], expected[0])
    assert bank.written.nonzero().flatten().tolist() == [3, 5]


def test_all_occurrences_read_the_slot_before_the_step_and_their_mean_is_written():
    bank = MemoryBank(8, 2)
    bank.slots[3], bank.written[3] = torch.tensor([8.0, 0.0]), True
    ids = torch.tensor([3, 3, 6])
    now = torch.tensor([[0.0, 2.0], [4.0, 4.0], [1.0, 1.0]], requires_grad=True)
    first = bank.read(ids[:1], now[:1])
    bank.add(ids[:1], first)
    rest = bank.read(ids[1:], now[1:])
    bank.add(ids[1:], rest)
    torch.testing.assert_close(torch.cat([first, rest]), torch.tensor([[4.0, 1.0], [6.0, 2.0], [1.0, 1.0]]))
    assert bank.slots[3].tolist() == [8.0, 0.0] and not bank.written[6]
    bank.commit()
    assert bank.slots[[3, 6]].tolist() == [[5.0, 1.5], [1.0, 1.0]] and bank.written[6]
    bank.commit()
    assert bank.slots[3].tolist() == [5.0, 1.5] and not bank.slots.requires_grad
    # gradient flows through what is new, also where the slot was empty
    (gradient,) = torch.autograd.grad(torch.cat([first, rest]).sum(), now)
    assert (gradient == 0.5).all()


def test_a_memory_that_is_saved_between_two_steps_is_up_to_date():
    bank = MemoryBank(8, 2)
    bank.add(torch.tensor([4, 4]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    saved = copy.deepcopy(bank).state_dict()
    assert saved["slots"][4].tolist() == [2.0, 0.0]
    other = MemoryBank(8, 2)
    other.load_state_dict(saved)
    torch.testing.assert_close(other.state_dict(), bank.state_dict(), rtol=0, atol=0)


def test_slots_are_drawn_among_those_that_were_written():
    bank = MemoryBank(50, 2)
    assert [len(part) for part in bank.draw(7)] == [0, 0]
    bank.add(torch.tensor([4, 9]), states(0, 2, 2))
    bank.commit()
    ids, drawn = bank.draw(100)
    assert set(ids.tolist()) == {4, 9} and torch.equal(drawn, bank.slots[ids])


KINDS = {"encoder": ("bert", "classification"), "causal": ("gpt2", "language")}
each_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind: str, **student):
    family, head = KINDS[kind]
    models = make(family, head, seed=1, **student), make(family, head, seed=2)
    for model in models:
        set_dropout(model, 0.0)
    return models


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def batch_for(kind: str, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # few different ids: the same token stands in several rows and several times in one
    ids = torch.randint(3, 20, (rows, 9), generator=generator)
    mask = (torch.arange(9) < torch.arange(3, 3 + rows)[:, None]).long()
    labels = torch.randint(0, 3, (rows,), generator=generator)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return batch | {"labels": ids.masked_fill(mask == 0, -100) if kind == "causal" else labels}


def rows_for(kind: str, count: int = 8) -> list[dict[str, Tensor]]:
    batch = batch_for(kind, count)
    return [{name: column[row] for name, column in batch.items()} for row in range(count)]


def arguments(tmp_path, **changes) -> TrainingArguments:
    values = dict(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.05, optim="sgd", per_device_train_batch_size=4,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return TrainingArguments(**(values | changes))


def attached(student, teacher, **config) -> Distillation:
    method = Distillation(DistillationConfig(**config), teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    return method


def run(method: Distillation, student, batch, progress: float = 0.0) -> dict[str, Term]:
    """One forward pass of the student as the trainer makes it."""
    plain = {k: v for k, v in batch.items() if not k.startswith("teacher_") and k != "labels"}
    step = Step(student, batch, plain, progress)
    method.before_forward(step)
    step.outputs = student(**step.student_inputs)
    return method.loss_terms(step)


def output(model, batch) -> Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]


def test_what_the_head_is_given_is_a_feature(family):
    model = make(family, "language")
    batch = inputs(model)
    _, features = extract(model, batch, [("output", 3)])
    assert torch.equal(features["output", 3], output(model, batch))


@each_kind
@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["contrast-alone", "with-logits"])
def test_the_contrast_is_of_what_the_heads_are_given(kind, weight):
    student, teacher = pair(kind)
    batch = batch_for(kind)
    calls = []
    teacher.base_model.register_forward_hook(lambda *_: calls.append(1))
    made = run(
        attached(student, teacher, weight=weight, label_weight=0.0, contrast=Contrast(momentum=0.0)), student, batch
    )
    assert len(calls) == 1
    mine, theirs, mask = output(student, batch), output(teacher, batch), batch["attention_mask"]
    expected = by_hand(mine, theirs, mask, 0.1, ids=batch["input_ids"]).sum()
    assert made["contrast"].total.item() == pytest.approx(expected, rel=1e-4)
    assert (made["contrast"].unit, made["contrast"].weight) == ("tokens", 0.1)
    for side, tensor in (("student", mine), ("teacher", theirs)):
        term = made[f"homogeneity_{side}"]
        torch.testing.assert_close(term.total, homogeneity(tensor, mask).sum())
        assert (term.unit, term.weight, term.measured) == ("examples", 0.0, True)


VARIANTS = {
    "default": Contrast(),
    "no-memory": Contrast(memory="none"),
    "own-negatives": Contrast(negatives="student", exclude_same_id=False),
    "few": Contrast(num_negatives=2),
    "vocabulary": Contrast(negatives="vocabulary", num_negatives=16),
    "sequence": Contrast(level="sequence"),
    "layers": Contrast(student=1, teacher=-1),
    "linear": Contrast(projection="linear", projection_learning_rate=0.1),
    "both-projected": Contrast(projection=4),
}
CUTTABLE = {"default", "no-memory", "own-negatives", "layers", "linear", "both-projected"}


@each_kind
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_the_student_and_can_be_cut_into_micro_batches(tmp_path, kind, variant):
    contrast = VARIANTS[variant].model_copy(update={"weight": 1.0})
    config = DistillationConfig(weight=0.0, label_weight=0.0, contrast=contrast)
    trained = []
    for size, accumulation in [(8, 1), (2, 4)]:
        student, teacher = pair(kind)
        before = copy.deepcopy(student.state_dict())
        args = arguments(
            tmp_path, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        trainer = DistillationTrainer(student, args, teacher=teacher, distillation=config, train_dataset=rows_for(kind))
        trainer.train()
        logs = trainer.state.log_history[:3]
        assert any(log["loss_contrast"] > 0 for log in logs)
        assert all(-1 <= log[f"homogeneity_{side}"] <= 1 for log in logs for side in ("student", "teacher"))
        assert not any(name.startswith("loss_homogeneity") for name in logs[0])
        assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
        modules = {n: m.state_dict() for n, m in trainer.methods[0].modules().items()}
        trained.append((student.state_dict(), modules, [log["loss_contrast"] for log in logs]))
    if variant in CUTTABLE:
        torch.testing.assert_close(trained[0][:2], trained[1][:2], rtol=1e-4, atol=1e-5)
        assert trained[0][2] == pytest.approx(trained[1][2], rel=1e-4)


def test_negatives_from_the_vocabulary_are_slots_of_other_tokens():
    student, teacher = pair("causal")
    batch = batch_for("causal")
    contrast = Contrast(negatives="vocabulary", num_negatives=64, momentum=0.0, temperature=1.0)
    method = attached(student, teacher, weight=0.0, label_weight=0.0, contrast=contrast)
    assert run(method, student, batch)["contrast"].total == 0
    torch.manual_seed(3)
    made = run(method, student, batch, progress=0.5)["contrast"].total
    bank = method.modules()["contrast_bank"]
    torch.manual_seed(3)
    ids, drawn = bank.draw(64)
    mine, theirs = output(student, batch), output(teacher, batch)
    expected = 0.0
    for b, i in np.argwhere(batch["attention_mask"].numpy()):
        score = math.exp(cosine(mine[b, i], theirs[b, i]))
        others = [
            math.exp(cosine(mine[b, i], s)) for n, s in zip(ids, drawn, strict=True) if n != batch["input_ids"][b, i]
        ]
        expected -= math.log(score / (score + sum(others)))
    assert made.item() == pytest.approx(expected, rel=1e-4)


def test_widths_that_differ_are_brought_together():
    batch = batch_for("encoder")
    for projection, sides in (("auto", {"student": (8, 16)}), (6, {"student": (8, 6), "teacher": (16, 6)})):
        student, teacher = pair("encoder", hidden_size=8)
        method = attached(student, teacher, contrast=Contrast(projection=projection))
        found = {n: (m.student_dim, m.teacher_dim) for n, m in method.modules().items() if n != "contrast_bank"}
        assert found == {f"contrast_{side}": sizes for side, sizes in sides.items()}
        assert method.modules()["contrast_bank"].slots.shape == (64, 16 if projection == "auto" else 6)
        run(method, student, batch)["contrast"].total.backward()
        parameters = [p for group in method.parameter_groups() for p in group["params"]]
        assert len(parameters) == 2 * len(sides) and all(p.grad is not None for p in parameters)
        assert not any(p.requires_grad for p in teacher.parameters())


@each_kind
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path, kind):
    # negatives are drawn, and the memory is written after the step whose checkpoint it is in
    contrast = Contrast(weight=1.0, num_negatives=3, projection=8)

    def trainer(folder, **changes):
        student, teacher = pair(kind)
        set_dropout(student, 0.1)
        args = arguments(
            tmp_path / folder, max_steps=6, optim="adamw_torch", learning_rate=1e-3, gradient_accumulation_steps=2,
            per_device_train_batch_size=2, **changes,
        )  # fmt: skip
        return DistillationTrainer(
            student,
            args,
            teacher=teacher,
            distillation=DistillationConfig(contrast=contrast),
            train_dataset=rows_for(kind, 12),
        )

    whole = trainer("whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(resumed.student.state_dict(), whole.student.state_dict(), rtol=0, atol=0)
    ours, theirs = ({n: m.state_dict() for n, m in t.methods[0].modules().items()} for t in (resumed, whole))
    assert set(ours) == {"contrast_student", "contrast_teacher", "contrast_bank"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    whole.save_model(str(tmp_path / "final"))
    assert not [file for file in (tmp_path / "final").iterdir() if "training_state" in file.name]


@each_kind
def test_homogeneity_is_logged_without_a_contrast_too(tmp_path, kind):
    student, teacher = pair(kind)
    expected = homogeneity(output(teacher, batch_for(kind)), batch_for(kind)["attention_mask"]).mean()
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, distillation=DistillationConfig(homogeneity=True), train_dataset=rows_for(kind)
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["homogeneity_teacher"] == pytest.approx(expected.item(), rel=1e-4)
    assert "homogeneity_student" in logs and "loss_contrast" not in logs and not trainer.methods[0].modules()


def test_a_measured_term_that_is_zero_is_no_dead_loss(tmp_path):
    student, teacher = pair("encoder")
    rows = [{**row, "attention_mask": torch.eye(9, dtype=torch.long)[0]} for row in rows_for("encoder")]
    args = arguments(tmp_path, max_steps=60, logging_steps=30, learning_rate=1e-4)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, distillation=DistillationConfig(homogeneity=True), train_dataset=rows
    )
    trainer.train()
    assert trainer.state.log_history[0]["homogeneity_student"] == 0
    assert _renamed("task", Term(torch.ones(()), "examples", 0.0, measured=True)).measured


def test_a_store_holds_what_a_contrast_looks_at(tmp_path):
    student, teacher = pair("encoder")
    rows = rows_for("encoder")
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows, torch.utils.data.default_collate, extract=extract,
        features=[("output", -1)], dtype="float32", progress=False,
    )  # fmt: skip
    batch = batch_for("encoder")
    live, stored = (
        run(attached(student, source, contrast=Contrast()), student, batch)["contrast"].total
        for source in (teacher, StoredTeacher(store))
    )
    torch.testing.assert_close(live, stored)
    with pytest.raises(LmcompressError, match="has no hidden of layer 2, it has output 3"):
        attached(student, StoredTeacher(store), contrast=Contrast(teacher=2))


def scaled_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """TSLD's weights and the KL, a sequence at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs, wanted in zip(student.double(), teacher.double(), labels, strict=True):
        rows = wanted != -100
        if rows.any():
            p, q = theirs[rows].log_softmax(-1), mine[rows].log_softmax(-1)
            surprise = F.nll_loss(p, wanted[rows], reduction="none")
            total = total + ((surprise / temperature).softmax(0) * (p.exp() * (p - q)).sum(-1)).sum() * rows.sum()
    return total


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("kind", ["causal", "tokens"])
def test_token_scaling_weighs_what_the_teacher_is_unsure_of(kind, loss):
    family, head = ("gpt2", "language") if kind == "causal" else ("bert", "tokens")
    student, teacher = make(family, head, seed=1), make(family, head, seed=2)
    batch = batch_for("causal")
    if kind == "tokens":
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 3)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    mine, labels = student(**plain).logits, batch["labels"]
    theirs = teacher(**plain).logits.detach()
    if kind == "causal":
        mine, theirs, labels = mine[:, :-1], theirs[:, :-1], labels[:, 1:]
    expected = scaled_kd(mine, theirs, labels, 0.5)
    gradients = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    options = dict(temperature=1.0, label_weight=0.0, token_scaling=0.5, loss=loss)
    (term,) = run(attached(student, teacher, chunk_tokens=4, **options), student, batch).values()
    if loss == "kl":
        torch.testing.assert_close(term.total.double(), expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(term.total, list(student.parameters()), allow_unused=True)
    for one, other in zip(found, gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_token_scaling_without_a_single_label_is_zero():
    student, teacher = pair("causal")
    batch = batch_for("causal") | {"labels": torch.full((8, 9), -100)}
    (term,) = run(attached(student, teacher, token_scaling=10.0), student, batch).values()
    assert term.total == 0


def test_what_quantizes_the_input_of_the_head_is_seen_by_the_chunks():
    student, teacher = pair("causal")
    batch = batch_for("causal")
    head = anatomy_of(student).head
    head.register_forward_pre_hook(lambda module, args: ((args[0] * 4).round() / 4,))
    head.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    head.register_forward_pre_hook(lambda module, args: None)
    (term,) = run(attached(student, teacher, weight=0.0), student, batch).values()
    plain = {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = student(**plain).logits[:, :-1], batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(term.total, expected, rtol=1e-4, atol=1e-4)


def test_presets_train(tmp_path):
    for kind, config in (("causal", quantgpt()), ("encoder", ternarybert(3))):
        student, teacher = pair(kind)
        trainer = DistillationTrainer(
            student, arguments(tmp_path), teacher=teacher, distillation=config, train_dataset=rows_for(kind)
        )
        trainer.train()
        logged = {name.removeprefix("loss_") for name in trainer.state.log_history[0] if name.startswith("loss_")}
        hidden, scores = ({f"{m.loss}_{n}" for n, m in enumerate(config.matches) if m.loss == loss} for loss in LOSSES)
        assert logged == {"kd"} | ({"contrast"} if kind == "causal" else hidden | scores)
        if kind == "encoder":
            assert (len(hidden), len(scores)) == (4, 3)
    assert quantgpt(Contrast(weight=0.5)).contrast.weight == 0.5
    with pytest.raises(LmcompressError, match="layers must be at least 1, got 0"):
        ternarybert(0)


LOSSES = ("hidden_mse", "attention_mse")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(temperature=0.0), "greater than 0"),
        (dict(momentum=1.0), "less than 1"),
        (dict(num_negatives=0), "greater than or equal to 1"),
        (dict(negatives="vocabulary"), "need memory vocabulary and a num_negatives"),
        (dict(negatives="vocabulary", num_negatives=5, memory="none"), "got memory none and num_negatives 5"),
        (dict(level="sequence", negatives="student"), "with level sequence the negatives are all other sequences"),
        (dict(level="sequence", num_negatives=3), "leave out negatives and num_negatives"),
        (dict(projection=0), "greater than or equal to 1"),
        (dict(memori="none"), "Extra inputs"),
    ],
    ids=str,
)
def test_a_contrast_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Contrast(**values)


@pytest.mark.parametrize(
    ("student", "config", "message"),
    [
        ({}, dict(contrast=Contrast(which=1)), "contrast names teacher 1; there are 1, from 0"),
        ({}, dict(contrast=Contrast(student=7)), "no layer 7 for the feature 'hidden'"),
        (
            {"hidden_size": 8},
            dict(contrast=Contrast(projection="none")),
            "student 8 and teacher 16: use projection",
        ),
        ({}, dict(contrast=Contrast(level="sequence")), "per_device_train_batch_size must be at least 2, got 1"),
        ({}, dict(token_scaling=10.0), "token_scaling weighs the tokens .* head is for single_label_classification"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, student, config, message):
    args = arguments(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(LmcompressError, match=message):
        model, teacher = pair("encoder", **student)
        DistillationTrainer(model, args, teacher=teacher, distillation=DistillationConfig(**config))


def test_batches_that_do_not_fit_are_refused():
    student, teacher = pair("encoder")
    batch = batch_for("encoder")
    other = {"teacher_input_ids": torch.randint(2, 60, (8, 5)), "teacher_attention_mask": torch.ones(8, 5)}
    method = attached(student, teacher, contrast=Contrast())
    with pytest.raises(LmcompressError, match="sequences of 9 and 5 tokens.*one tokenisation"):
        run(method, student, batch | other)
    contrast = Contrast(level="sequence")
    assert run(attached(student, teacher, contrast=contrast), student, batch | other)["contrast"].total > 0
    without_ids = {k: v for k, v in batch.items() if k != "input_ids"}
    contrast = method._parts[0]
    features = ({contrast.student[0]: output(student, batch)}, {contrast.teacher[0]: output(teacher, batch)})
    with pytest.raises(LmcompressError, match="needs the batch's input_ids"):
        contrast.terms(*features, Step(student, without_ids, without_ids, 0.0), batch["attention_mask"])
    tokens = make("bert", "tokens", seed=1), make("bert", "tokens", seed=2)
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(LmcompressError, match="token_scaling needs labels; the batch has none"):
        run(attached(*tokens, token_scaling=1.0), tokens[0], unlabelled)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_contrast(states(0), states(1), MASK, temperature=0.0), "temperature must be > 0, got 0"),
        (lambda: token_contrast(states(0), states(1)[:, :3], MASK), "of the same tokens.*different tokenisations"),
        (lambda: token_contrast(states(0), states(1), MASK[:, :3]), r"mask must have shape .* got \(3, 3\)"),
        (lambda: token_contrast(states(0), states(1)[..., :4], MASK), "a projection brings different widths together"),
        (lambda: token_contrast(states(0), states(1), MASK, num_negatives=0), "at least 1, got 0"),
        (lambda: sequence_contrast(states(0), states(1)[:2], MASK), r"of one batch .* got \(2, 5, 8\)"),
        (lambda: token_scaling(states(0, 3, 5), MASK, temperature=0.0), "temperature must be > 0"),
        (lambda: token_scaling(states(0, 3, 4), MASK), r"shape of the cross-entropies \(3, 4\), got \(3, 5\)"),
        (lambda: MemoryBank(3, 2, momentum=1.0), r"must be in \[0, 1\), got 1.0; at 1 no gradient"),
    ],
    ids=range(9),
)
def test_arguments_that_make_no_sense_are_refused(call, message):
    with pytest.raises(LmcompressError, match=message):
        call()
