"""The distillation method: values of its terms, sources of its teachers, and what it refuses before training."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families import cut_unevenly, inputs, make
from torch import Tensor, nn
from transformers import TrainingArguments

from lmcompress import CompressedModel, LmcompressError, anatomy_of
from lmcompress.activations.capture import extract
from lmcompress.distillation import (
    Distillation,
    DistillationConfig,
    EmdMatch,
    LiveTeacher,
    Match,
    StoredTeacher,
    TeacherStore,
    TemperatureSchedule,
)
from lmcompress.distillation.causal import next_token_labels
from lmcompress.distillation.losses import LOGIT_LOSSES
from lmcompress.distillation.matches import MATCHES
from lmcompress.distillation.schedules import cwsm, flsw
from lmcompress.method import Step, Term
from lmcompress.trainers import DistillationTrainer

T = 3.0
HEADS = {
    "single_label_classification": ("classification", {}),
    "regression": ("classification", {"num_labels": 1}),
    "multi_label_classification": ("classification", {"problem_type": "multi_label_classification"}),
    "token_classification": ("tokens", {}),
    "masked_lm": ("language", {}),
    "causal_lm": ("language", {}),
}


def pair(problem: str, **student):
    head, options = HEADS[problem]
    family = "gpt2" if problem == "causal_lm" else "bert"
    return make(family, head, seed=1, **(options | student)), make(family, head, seed=2, **options)


def labels_for(problem: str, batch: dict[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows, length = batch["input_ids"].shape
    if problem == "regression":
        return torch.rand(rows, generator=generator)
    if problem == "multi_label_classification":
        return torch.randint(0, 2, (rows, 3), generator=generator).float()
    if problem == "single_label_classification":
        return torch.randint(0, 3, (rows,), generator=generator)
    if problem == "causal_lm":
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = torch.randint(0, 3, (rows, length), generator=generator)
    return labels.masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] % 3 == 0), -100)


def run(method: Distillation, student, batch, progress: float = 0.0) -> dict[str, Term]:
    """One forward pass of the student as the trainer makes it."""
    plain = {k: v for k, v in batch.items() if not k.startswith("teacher_") and k != "labels"}
    step = Step(student, batch, plain, progress)
    method.before_forward(step)
    step.outputs = student(**step.student_inputs)
    return method.loss_terms(step)


def terms(student, teachers, batch, progress: float = 0.0, **config) -> dict[str, Term]:
    method = Distillation(DistillationConfig(**config), teachers)
    method.attach(student, torch.device("cpu"), nullcontext)
    try:
        return run(method, student, batch, progress)
    finally:
        method.finish()


def expected_kd(problem: str, student: Tensor, teacher: Tensor, batch) -> tuple[Tensor, str]:
    """The sum of the soft loss and its unit, written down anew with losses of torch."""
    labels = batch["labels"]
    if problem == "regression":
        return (student - teacher).square().sum(), "examples"
    if problem == "multi_label_classification":
        p, q = (torch.stack([(z / T).sigmoid(), 1 - (z / T).sigmoid()]) for z in (teacher, student))
        return T * T * (p * (p / q).log()).sum(0).mean(-1).sum(), "examples"
    if problem == "causal_lm":
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    if problem != "single_label_classification":
        student, teacher = student[labels != -100], teacher[labels != -100]
    p, q = (torch.distributions.Categorical(logits=z.double() / T) for z in (teacher, student))
    unit = "examples" if problem == "single_label_classification" else "labels"
    return T * T * torch.distributions.kl_divergence(p, q).sum(), unit


@pytest.mark.parametrize("problem", HEADS)
def test_the_soft_loss_is_that_of_the_kind_of_head(problem):
    student, teacher = pair(problem)
    batch = inputs(student)
    batch["labels"] = labels_for(problem, batch)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        expected, unit = expected_kd(problem, student(**plain).logits, teacher(**plain).logits, batch)
    made = terms(student, teacher, batch, temperature=T, chunk_tokens=4)
    (name,) = made
    value = made[name].parts["kd"] if problem == "causal_lm" else made[name].total
    assert made[name].unit == unit and made[name].total.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=1e-5)
    if problem == "causal_lm":
        logits = student(**plain).logits[:, :-1]
        hard = F.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        torch.testing.assert_close(made[name].parts["label"], hard.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made[name].total, hard + made[name].parts["kd"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["ce", "reverse_kl", "jsd", "mse"])
@pytest.mark.parametrize("problem", ["single_label_classification", "token_classification", "causal_lm"])
def test_every_logit_loss_can_be_asked_for(problem, loss):
    student, teacher = pair(problem)
    batch = inputs(student)
    batch["labels"] = labels_for(problem, batch)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    mine, theirs = (model(**plain).logits.detach() for model in (student, teacher))
    if problem != "single_label_classification":
        rows = (next_token_labels(batch) if problem == "causal_lm" else batch["labels"]) != -100
        mine, theirs = mine[rows], theirs[rows]
    expected = LOGIT_LOSSES[loss](mine, theirs, temperature=T, scale_by_temperature=False).sum()
    made = terms(student, teacher, batch, temperature=T, loss=loss, scale_by_temperature=False, label_weight=0.0)
    (term,) = made.values()
    torch.testing.assert_close(term.total.detach(), expected, rtol=1e-4, atol=1e-4)


def test_left_padding_without_labels_predicts_only_what_follows_a_real_token():
    ids = torch.tensor([[0, 0, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert next_token_labels({"input_ids": ids, "attention_mask": mask}).tolist() == [[-100, -100, 6, 7, -100]]


def arguments(tmp_path, **changes) -> TrainingArguments:
    values = dict(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.01, optim="sgd", per_device_train_batch_size=4,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return TrainingArguments(**(values | changes))


def rows_for(problem: str, count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (count, 9), generator=generator)
    mask = (torch.arange(9) < torch.arange(4, 4 + count)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    batch["labels"] = labels_for(problem, batch)
    return [{name: column[row] for name, column in batch.items()} for row in range(count)]


def match_of(name: str, heads: bool = True) -> Match:
    known = MATCHES[name]
    layers = ((1, 2), (1, 3)) if known.layers == 2 else (2, 3)
    on = "probabilities" if known.feature is None else None
    # 2 relation heads cut 8 and 16 alike
    options = {"relation_heads": 2} if name.startswith("minilmv2") else {}
    return Match(loss=name, student=layers[0], teacher=layers[1], on=on, options=options)


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_match_trains_a_narrower_student(tmp_path, name, family):
    problem = "causal_lm" if family == "gpt2" else "single_label_classification"
    narrow = {"n_embd": 8} if family == "gpt2" else {"hidden_size": 8}
    student, teacher = pair(problem, **narrow)
    config = DistillationConfig(weight=0.0, label_weight=0.0, matches=[match_of(name)])
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, distillation=config, train_dataset=rows_for(problem)
    )
    before = copy.deepcopy(student.state_dict())
    trainer.train()
    assert trainer.state.log_history[0][f"loss_{name}_0"] > 0
    assert [bool(m.projection) for m in trainer.methods[0]._parts] == [MATCHES[name].projectable]
    moved = [n for n, tensor in student.state_dict().items() if not torch.equal(tensor, before[n])]
    assert moved and all(".3." not in n for n in moved)


HEAD_BY_HEAD = ["attention_mse", "attention_ce", "minilm_attention", "minilm_value"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", HEAD_BY_HEAD)
def test_unequal_heads_are_refused_where_heads_are_compared(tmp_path, name, family):
    problem = "causal_lm" if family == "gpt2" else "single_label_classification"
    student, teacher = pair(problem, **({"n_head": 2} if family == "gpt2" else {"num_attention_heads": 2}))
    with pytest.raises(
        LmcompressError, match="student layer 2, teacher layer 3.*2 heads of the student and 4 of the teacher"
    ):
        DistillationTrainer(
            student, arguments(tmp_path), teacher=teacher, distillation=DistillationConfig(matches=[match_of(name)])
        )


@pytest.mark.parametrize("name", ["attention_mse_mean", "attention_ce_mean", "minilmv2_query", "minilmv2_value"])
@pytest.mark.parametrize("on", ["scores", "probabilities"])
def test_unequal_heads_pass_where_heads_are_averaged_or_cut_anew(name, on):
    student, teacher = pair("single_label_classification", num_attention_heads=2)
    match = match_of(name).model_copy(update={"on": on if "attention" in name else None})
    made = terms(student, teacher, inputs(student), matches=[match], weight=0.0)
    assert float(made[f"{name}_0"].total.detach()) > 0


def test_heads_are_counted_layer_by_layer():
    student, teacher = cut_unevenly(make("bert", seed=1)), make("bert", seed=2)
    with pytest.raises(LmcompressError, match="1 heads of the student and 4"):
        terms(
            student, teacher, inputs(student), matches=[Match(loss="attention_mse", student=2, teacher=3, on="scores")]
        )


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float16", 5e-3)])
def test_a_store_teaches_what_its_teacher_does(tmp_path, problem, dtype, rtol):
    student, teacher = pair(problem)
    rows = rows_for(problem)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    features = [("hidden", 3), ("scores", 2)]
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows, torch.utils.data.default_collate, extract=extract, features=features,
        dtype=dtype, batch_size=3, progress=False,
    )  # fmt: skip
    matches = [
        Match(loss="hidden_mse", student=-1, teacher=-1),
        Match(loss="attention_mse", student=1, teacher=2, on="scores"),
    ]
    # other rows, in another order and shorter
    chosen = {name: column[[5, 0, 3]] for name, column in batch.items()}
    live = terms(student, teacher, chosen, matches=matches)
    stored = terms(student, StoredTeacher(store), chosen, matches=matches)
    assert live.keys() == stored.keys()
    for name, term in live.items():
        torch.testing.assert_close(stored[name].total, term.total, rtol=rtol, atol=1e-5, msg=name)


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
def test_a_store_of_all_classes_as_top_k_is_exact_and_of_fewer_is_near(tmp_path, problem):
    student, teacher = pair(problem)
    rows = rows_for(problem)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    size = 64 if problem == "causal_lm" else 3
    live = terms(student, teacher, batch, temperature=1.0, label_weight=0.0)
    for top_k, rtol in [(size, 1e-5), (size * 2 // 3, 0.2)]:
        store = TeacherStore.build(
            tmp_path / f"store{top_k}", teacher, rows, torch.utils.data.default_collate, extract=extract, top_k=top_k,
            dtype="float32", progress=False,
        )  # fmt: skip
        stored = terms(student, StoredTeacher(store), batch, temperature=1.0, label_weight=0.0)
        for name, term in live.items():
            torch.testing.assert_close(stored[name].total, term.total, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
def test_several_teachers_are_averaged_by_weight(problem):
    student, one = pair(problem)
    two = make(*(("gpt2", "language") if problem == "causal_lm" else ("bert", "classification")), seed=3)
    batch = inputs(student)
    batch["labels"] = labels_for(problem, batch)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        mean = 0.25 * one(**plain).logits + 0.75 * two(**plain).logits
        expected, _ = expected_kd(problem, student(**plain).logits, mean, batch)
    config = dict(temperature=T, label_weight=0.0, teacher_weights=(1.0, 3.0))
    (term,) = terms(student, [one, two], batch, **config).values()
    torch.testing.assert_close(term.total.detach().double(), expected.double(), rtol=1e-4, atol=1e-5)
    match = Match(loss="hidden_mse", student=2, teacher=2, which=1)
    both = terms(student, [one, two], batch, matches=[match])["hidden_mse_0"].total
    alone = terms(student, two, batch, matches=[match.model_copy(update={"which": 0})])["hidden_mse_0"].total
    torch.testing.assert_close(both, alone)


def test_a_teacher_of_another_tokenizer_reads_its_own_columns(tmp_path):
    student, _ = pair("single_label_classification")
    teacher = make("roberta", seed=4, vocab_size=90, pad_token_id=1)
    rows = rows_for("single_label_classification")
    generator = torch.Generator().manual_seed(5)
    for row in rows:
        row["teacher_input_ids"] = torch.randint(3, 90, (12,), generator=generator)
        row["teacher_attention_mask"] = torch.ones(12, dtype=torch.long)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    made = terms(student, teacher, batch, temperature=T, label_weight=0.0)
    with torch.no_grad():
        theirs = teacher(batch["teacher_input_ids"], batch["teacher_attention_mask"]).logits
        mine = student(batch["input_ids"], batch["attention_mask"]).logits
    expected, _ = expected_kd("single_label_classification", mine, theirs, batch)
    torch.testing.assert_close(made["kd"].total.detach().double(), expected.double(), rtol=1e-4, atol=1e-5)
    # the same through a trainer, which takes away columns that the student does not know
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=1)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, distillation=DistillationConfig(temperature=T), train_dataset=rows
    )
    set_dropout(student)
    trainer.train()
    assert trainer.state.log_history[0]["loss_kd"] == pytest.approx(float(expected) / 8, rel=1e-3)


def test_a_teacher_keeps_the_token_types_that_the_student_does_not_take(tmp_path):
    student, teacher = make("distilbert", seed=1), make("bert", seed=2)
    rows = rows_for("single_label_classification")
    for row in rows:
        row["token_type_ids"] = (torch.arange(9) > 2).long()
    seen = []
    hook = teacher.register_forward_pre_hook(lambda m, a, k: seen.append(k["token_type_ids"]), with_kwargs=True)
    DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=rows, eval_dataset=rows).train()
    hook.remove()
    assert len(seen) == 2 and all(int(types.sum()) > 0 for types in seen)


def test_the_earth_movers_distance_of_all_layers_is_one_term():
    pytest.importorskip("ot")
    student, teacher = pair("single_label_classification", hidden_size=8, num_hidden_layers=2)
    made = terms(
        student, teacher, inputs(student), emd=EmdMatch(weight=0.5, weight_schedule="linear_decay"), progress=0.5
    )
    assert made["emd"].unit == "tokens" and made["emd"].weight == 0.25 and float(made["emd"].total.detach()) > 0
    made["emd"].total.backward()
    assert all(block.get("query").weight.grad is not None for block in anatomy_of(student).blocks)
    same = copy.deepcopy(student)
    assert float(terms(student, same, inputs(student), emd=EmdMatch())["emd"].total.detach()) == pytest.approx(
        0, abs=1e-4
    )


@pytest.mark.parametrize("problem", ["single_label_classification", "token_classification", "causal_lm"])
def test_probability_shift_puts_the_right_class_first(problem):
    student, teacher = pair(problem)
    batch = inputs(student)
    batch["labels"] = labels_for(problem, batch)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        theirs = teacher(**plain).logits
        labels = next_token_labels(batch) if problem == "causal_lm" else batch["labels"]
        for place in (labels != -100).nonzero():
            row, label = theirs[tuple(place)], labels[tuple(place)]
            top = row.argmax()
            row[top], row[label] = row[label].clone(), row[top].clone()
        expected, _ = expected_kd(problem, student(**plain).logits, theirs, batch)
    config = dict(temperature=T, label_weight=0.0, probability_shift=True)
    (term,) = terms(student, teacher, batch, **config).values()
    torch.testing.assert_close(term.total.detach().double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flsw", "cwsm"])
@pytest.mark.parametrize("problem", ["single_label_classification", "token_classification", "causal_lm"])
def test_temperatures_may_differ_from_row_to_row(problem, kind):
    student, teacher = pair(problem)
    batch = inputs(student)
    batch["labels"] = labels_for(problem, batch)
    schedule = TemperatureSchedule(kind=kind, beta=2.0, gamma=1.5)
    made = terms(student, teacher, batch, temperature=T, label_weight=0.0, temperature_schedule=schedule)
    (term,) = made.values()
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        mine, theirs = student(**plain).logits, teacher(**plain).logits
    if problem != "single_label_classification":
        rows = (next_token_labels(batch) if problem == "causal_lm" else batch["labels"]) != -100
        mine, theirs = mine[rows], theirs[rows]
    limits = dict(beta=2.0, minimum=1.0, maximum=20.0)
    tau = flsw(mine, theirs, T, gamma=1.5, **limits) if kind == "flsw" else cwsm(mine, T, **limits)
    p, q = ((z / tau[:, None]).softmax(-1) for z in (theirs, mine))
    expected = (tau.square() * (p * (p / q).log()).sum(-1)).sum()
    torch.testing.assert_close(term.total.detach(), expected, rtol=1e-4, atol=1e-5)
    assert tau.unique().numel() > 1


def test_schedules_scale_the_weights_that_were_configured():
    student, teacher = pair("single_label_classification")
    config = dict(
        weight=4.0, weight_schedule="linear_decay",
        matches=[Match(loss="hidden_mse", student=1, teacher=1, weight=6.0, weight_schedule="linear_growth")],
    )  # fmt: skip
    for progress in (0.0, 0.25, 1.0):
        made = terms(student, teacher, inputs(student), progress, **config)
        assert (made["kd"].weight, made["hidden_mse_0"].weight) == (4.0 * (1 - progress), 6.0 * progress)
    method = Distillation(DistillationConfig(label_weight=3.0, label_weight_schedule="linear_growth"), teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    assert method.label_weight(0.5) == 1.5


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
def test_a_run_whose_weights_all_begin_at_zero_trains(tmp_path, problem):
    student, teacher = pair(problem)
    config = DistillationConfig(weight_schedule="linear_growth", label_weight=0.0)
    before = copy.deepcopy(student.state_dict())
    DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, distillation=config, train_dataset=rows_for(problem)
    ).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("weights", [{"label_weight": 0.0}, {"weight": 0.0}], ids=str)
def test_a_part_that_was_switched_off_is_no_dead_term(tmp_path, weights):
    student, teacher = pair("causal_lm")
    args = arguments(tmp_path, max_steps=60, logging_steps=30)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, distillation=DistillationConfig(**weights), train_dataset=rows_for("causal_lm")
    )
    trainer.train()
    logged = {name for name in trainer.state.log_history[0] if name.startswith("loss_")}
    assert logged == {"loss_kd" if "label_weight" in weights else "loss_label"}


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
def test_measuring_shares_leaves_the_step_as_it_was(tmp_path, problem):
    trained = []
    for every in (0, 1):
        student, teacher = pair(problem)
        set_dropout(student)
        trainer = DistillationTrainer(
            student, arguments(tmp_path), teacher=teacher, train_dataset=rows_for(problem), gradient_shares=every
        )
        trainer.train()
        trained.append(student.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)


def set_dropout(model: nn.Module, p: float = 0.0) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def test_the_teacher_runs_without_dropout_and_never_changes(tmp_path):
    student, teacher = pair("single_label_classification")
    set_dropout(teacher, 0.5)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    rows = rows_for("single_label_classification")
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=rows)
    teacher.train()  # by somebody else, between the two
    trainer.train()
    # borrowed: as it came
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    source = LiveTeacher(teacher)
    source.prepare([], logits=True, causal=False, device=torch.device("cpu"))
    answers = [source.answer(batch, nullcontext).logits for _ in range(2)]
    torch.testing.assert_close(*answers, rtol=0, atol=0)
    assert not answers[0].requires_grad


@pytest.mark.parametrize("problem", ["single_label_classification", "causal_lm"])
def test_hooks_are_gone_when_it_is_done(tmp_path, problem):
    student, teacher = pair(problem)
    match = Match(loss="hidden_mse", student=0, teacher=1)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        teacher=teacher,
        distillation=DistillationConfig(matches=[match]),
        train_dataset=rows_for(problem),
    )
    trainer.train()
    trainer.train()  # and once more with the same trainer
    trainer.finish()
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_source_serves_two_methods():
    student, teacher = pair("single_label_classification")
    source, batch = LiveTeacher(teacher), inputs(student)
    methods = [
        Distillation(
            DistillationConfig(weight=0.0, matches=[Match(loss="hidden_mse", student=1, teacher=layer)]), source
        )
        for layer in (1, 2)
    ]
    for method in methods:
        method.attach(student, torch.device("cpu"), nullcontext)
    for layer, method in zip((1, 2), methods, strict=True):
        mine, theirs = (
            extract(model, batch, [("hidden", n)])[1]["hidden", n] for model, n in ((student, 1), (teacher, layer))
        )
        mask = batch["attention_mask"]
        expected = ((mine - theirs).square().mean(-1) * mask).sum()
        torch.testing.assert_close(run(method, student, batch)["hidden_mse_0"].total, expected)


def test_a_compressed_model_can_teach_and_a_path_cannot():
    student, teacher = pair("single_label_classification")
    batch = inputs(student)
    wrapped = terms(student, CompressedModel(teacher), batch)["kd"].total
    torch.testing.assert_close(wrapped, terms(student, teacher, batch)["kd"].total)
    with pytest.raises(LmcompressError, match="got str; load a path with load_teacher"):
        Distillation(DistillationConfig(), "some/path")
    with pytest.raises(LmcompressError, match="at least one teacher"):
        Distillation(DistillationConfig(), [])


def test_a_student_cannot_be_its_own_teacher_and_is_not_harmed(tmp_path):
    student, _ = pair("single_label_classification")
    shared = make("bert", seed=3)
    shared.bert.embeddings = student.bert.embeddings
    for teacher in (student, shared):
        with pytest.raises(LmcompressError, match="share parameters.*copy.deepcopy"):
            DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
        assert all(parameter.requires_grad for parameter in student.parameters())
    DistillationTrainer(student, arguments(tmp_path), teacher=copy.deepcopy(student))


def test_features_alone_ask_for_no_agreement_of_heads():
    student = make("bert", seed=1)
    teacher = make("bert", "base", seed=2)
    made = terms(
        student, teacher, inputs(student), weight=0.0, matches=[Match(loss="hidden_mse", student=1, teacher=1)]
    )
    assert list(made) == ["hidden_mse_0"]


def refusal(problem="single_label_classification", student=None, teacher=None, message="", rows=None, **config):
    return pytest.param(problem, student or {}, teacher or {}, config, rows, message, id=message[:40])


def hidden(**changes):
    return [Match(**({"loss": "hidden_mse", "student": 1, "teacher": 1} | changes))]


REFUSED = [
    refusal("causal_lm", {"vocab_size": 70}, message="must share a vocabulary: .* has 64 tokens, .* has 70"),
    refusal("masked_lm", {"vocab_size": 70}, message="must share a vocabulary"),
    refusal(student={"vocab_size": 70}, rows=True, message="70 tokens and the teacher one of 64.*teacher_input_ids"),
    refusal(student={"num_labels": 5}, message=r"the student has 5 labels, the teacher .* has 3"),
    refusal(
        student={"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        teacher={"id2label": {0: "b", 1: "a", 2: "c"}, "label2id": {"b": 0, "a": 1, "c": 2}},
        message=r"name their labels differently: \['a', 'b', 'c'\] and \['b', 'a', 'c'\]",
    ),
    refusal(
        teacher={"problem_type": "multi_label_classification"}, message="head is for single_label.*for multi_label"
    ),
    refusal(message="no layer 7 for the feature 'hidden': it has 3 blocks", matches=hidden(student=7)),
    refusal(message="no layer -5 for the feature 'hidden'", matches=hidden(teacher=-5)),
    refusal(message="on='scores' or on='probabilities'", matches=hidden(loss="attention_mse")),
    refusal(message="cannot compare 'scores'", matches=hidden(on="scores")),
    refusal(message="takes 2 layer", matches=hidden(loss="gram")),
    refusal(message="has no options, got 'position'", matches=hidden(options={"position": 1})),
    refusal(
        message="does not fit: relation_heads must be",
        matches=hidden(loss="minilmv2_key", options={"relation_heads": 5}),
    ),
    refusal(message="does not fit", matches=hidden(loss="pkd", options={"position": "first"})),
    refusal(message="takes no projection", matches=hidden(loss="attention_transfer", projection="linear")),
    refusal(
        student={"hidden_size": 8},
        message="got student 8 and teacher 16; add a projection",
        matches=hidden(projection="none"),
    ),
    refusal(message="match 0 names teacher 1; there are 1", matches=hidden(which=1)),
    refusal(message="teacher_weights has 2 values for 1 teachers", teacher_weights=(1.0, 1.0)),
    refusal("regression", message="'kl' does not fit the problem type 'regression'", loss="kl"),
    refusal("multi_label_classification", message="does not fit the problem type 'multi_label", loss="ce"),
    refusal("regression", message="probability_shift needs one correct class", probability_shift=True),
    refusal(message="number 3 is none; there are 1", emd=EmdMatch(which=3)),
]


@pytest.mark.parametrize(("problem", "student", "teacher", "config", "rows", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_training(tmp_path, problem, student, teacher, config, rows, message):
    head, options = HEADS[problem]
    family = "gpt2" if problem == "causal_lm" else "bert"
    models = [make(family, head, seed=n, **(options | given)) for n, given in enumerate((student, teacher))]
    data = rows_for(problem) if rows else None
    with pytest.raises(LmcompressError, match=message):
        DistillationTrainer(
            models[0],
            arguments(tmp_path),
            train_dataset=data,
            teacher=models[1],
            distillation=DistillationConfig(**config),
        )


def test_a_head_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="cannot distil the logits of BertModel"):
        DistillationTrainer(make("bert", "base"), arguments(tmp_path), teacher=make("bert", "base", seed=1))


STORES = [
    ("single_label_classification", {}, dict(matches=hidden()), "has no hidden of layer 1, it has hidden 3"),
    ("single_label_classification", {}, dict(matches=hidden(teacher=-2)), "has no hidden of layer -2"),
    ("single_label_classification", {"num_labels": 4}, {}, "the student has 4 labels, the teacher store .* for 3"),
    ("token_classification", {}, {}, "needs logits per token; the teacher store .* has them per row"),
    ("multi_label_classification", {}, {}, "keeps the top 2 of 3 logits.*without top_k"),
    ("single_label_classification", {}, dict(loss="mse"), "the loss mse needs all of them"),
    ("single_label_classification", {}, dict(emd=EmdMatch()), "emd needs a teacher that runs"),
    (
        "single_label_classification",
        {"hidden_size": 8},
        dict(matches=hidden(teacher=3, projection="none")),
        "got student 8 and teacher 16",
    ),
]


@pytest.mark.parametrize(("problem", "student", "config", "message"), STORES, ids=[case[3][:40] for case in STORES])
def test_a_store_that_lacks_something_is_refused_before_training(tmp_path, problem, student, config, message):
    teacher = make("bert", seed=2)
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows_for("single_label_classification"), torch.utils.data.default_collate,
        extract=extract, top_k=2, features=[("hidden", 3)], progress=False,
    )  # fmt: skip
    head, options = HEADS[problem]
    with pytest.raises(LmcompressError, match=message):
        DistillationTrainer(
            make("bert", head, **(options | student)),
            arguments(tmp_path),
            teacher=StoredTeacher(store),
            distillation=DistillationConfig(**config),
        )


def test_a_store_knows_its_widths_and_counts_layers_from_either_end(tmp_path):
    student, teacher = make("bert", seed=1, hidden_size=8), make("bert", seed=2)
    rows = rows_for("single_label_classification")
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows, torch.utils.data.default_collate, extract=extract, features=[("hidden", 3)],
        dtype="float32", progress=False,
    )  # fmt: skip
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    matches = hidden(student=-1, teacher=-1)
    live, stored = (terms(student, source, batch, matches=matches) for source in (teacher, StoredTeacher(store)))
    torch.testing.assert_close(live["hidden_mse_0"].total, stored["hidden_mse_0"].total)


def test_batches_that_do_not_fit_are_refused():
    student, teacher = pair("single_label_classification")
    batch = inputs(student)
    with pytest.raises(LmcompressError, match="labels are floating-point numbers.*problem_type"):
        terms(student, teacher, {**batch, "labels": torch.rand(3, 3)})
    with pytest.raises(LmcompressError, match="probability_shift needs labels"):
        terms(student, teacher, batch, probability_shift=True)
    student, teacher = pair("causal_lm")
    other = {"teacher_input_ids": torch.randint(2, 60, (3, 5))}
    with pytest.raises(LmcompressError, match="sequences of 9 and 5 tokens.*one tokenisation"):
        terms(student, teacher, {**batch, **other})


def test_two_methods_with_one_term_are_refused(tmp_path):
    student, teacher = pair("single_label_classification")
    second = Distillation(DistillationConfig(), make("bert", seed=5))
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        teacher=teacher,
        methods=[second],
        train_dataset=rows_for("single_label_classification"),
    )
    with pytest.raises(LmcompressError, match="two methods have a loss term 'kd'"):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(weight=0.0, label_weight=0.0), "nothing to train on"),
        (dict(teacher_weights=(-1.0, 2.0)), "teacher_weights must be >= 0"),
        (dict(teacher_weights=()), "at least 1"),
        (dict(temperature=0.5, temperature_schedule={"kind": "flsw"}), "temperature must lie between .*minimum 1.0"),
        (dict(temperatur=2.0), "Extra inputs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_configuration_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**values)
