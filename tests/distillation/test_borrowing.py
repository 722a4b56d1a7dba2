"""Teachers are borrowed, in whatever form they come: what was changed about them is given back."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import inputs, make
from torch import nn
from training import tiny_arguments
from transformers import BertForSequenceClassification

from lmcompress import CompressedModel, LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig, Match
from lmcompress.distillation.borrowing import borrow, give_back
from lmcompress.distillation.config import Contrast
from lmcompress.distillation.teachers import LiveTeacher, logits_of
from lmcompress.method import Step
from lmcompress.quantization import quantize
from lmcompress.trainers import DistillationTrainer

CPU = torch.device("cpu")
FEATURES = DistillationConfig(
    matches=(Match(loss="hidden_mse", student=2, teacher=3), Match(loss="minilm_attention", student=2, teacher=3))
)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a training may change without changing a weight."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "devices": {parameter.device for parameter in model.parameters()},
        "config": model.config.to_dict(),  # type: ignore[operator]
        "attributes": sorted(vars(model)),
    }


def odd(family: str = "bert", head: str = "classification"):
    """A teacher with some frozen weights, and some modules in either mode."""
    model = make(family, head, seed=1).train()
    model.get_input_embeddings().requires_grad_(False)
    model.get_input_embeddings().eval()
    return model


def rows(family: str = "bert", count: int = 8):
    batch = inputs(make(family, "base"), rows=count)
    labels = batch["input_ids"] if family == "gpt2" else torch.arange(count) % 3
    return [{name: v[i] for name, v in (batch | {"labels": labels}).items()} for i in range(count)]


def trainer(folder, student, teacher, config=FEATURES, family="bert", **arguments):
    return DistillationTrainer(
        student,
        args=tiny_arguments(folder, **({"max_steps": 2} | arguments)),
        teacher=teacher,
        distillation=config,
        train_dataset=rows(family),
    )


def taught(student, teacher, batch, **config):
    method = Distillation(DistillationConfig(**config), teacher)
    method.attach(student, CPU, nullcontext)
    step = Step(student, batch, {k: v for k, v in batch.items() if k != "labels"}, 0.0)
    method.before_forward(step)
    step.outputs = student(**step.student_inputs)
    try:
        return {name: float(term.total.detach()) for name, term in method.loss_terms(step).items()}
    finally:
        method.release()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_teacher_is_given_back_as_it_was(tmp_path, family):
    head = "language" if family == "gpt2" else "classification"
    teacher, student = odd(family, head), make(family, head)
    before, mine = state(teacher), state(student)
    run = trainer(tmp_path, student, teacher, family=family)
    assert state(teacher) != before and not any(p.requires_grad for p in teacher.parameters())
    run.train()
    run.finish()
    assert state(teacher) == before
    assert state(student)["hooks"] == mine["hooks"]
    run.methods[0].release()
    assert state(teacher) == before


def test_a_distillation_that_is_released_begins_anew():
    teacher, student = odd(), make("bert")
    before, batch = state(teacher), inputs(student)
    method = Distillation(FEATURES, teacher)
    method.release()
    for _ in range(2):
        method.attach(student, CPU, nullcontext)
        method.attach(student, CPU, nullcontext)
        method.loss_terms(Step(student, batch, batch, 0.0, outputs=student(**batch)))
        method.release()
        method.release()
        assert state(teacher) == before
    with pytest.raises(LmcompressError, match="released or finished"):
        method.loss_terms(Step(student, batch, batch, 0.0, outputs=student(**batch)))
    with pytest.raises(LmcompressError, match="must be prepared before it answers"):
        method.teachers[0].answer(batch, nullcontext)
    method.set_active(False)


@pytest.mark.parametrize("first", [0, 1])
def test_a_teacher_shared_by_two_trainers_is_given_back_by_the_last(tmp_path, first):
    teacher = odd()
    before = state(teacher)
    runs = [trainer(tmp_path / str(i), make("bert", seed=i), teacher) for i in range(2)]
    runs[first].train()
    runs[first].finish()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    runs[1 - first].train()
    runs[1 - first].finish()
    assert state(teacher) == before


def test_a_source_shared_by_two_methods_works_until_both_release_it():
    source = LiveTeacher(odd())
    before, batch = state(source.model), inputs(source.model)
    students = [make("bert", seed=i) for i in range(2)]
    methods = [Distillation(FEATURES, source) for _ in students]
    for method, student in zip(methods, students, strict=True):
        method.attach(student, CPU, nullcontext)
    methods[0].release()
    step = Step(students[1], batch, batch, 0.0, outputs=students[1](**batch))
    assert set(methods[1].loss_terms(step)) == {"kd", "hidden_mse_0", "minilm_attention_1"}
    methods[1].release()
    assert state(source.model) == before


def test_a_failure_while_attaching_changes_nothing(monkeypatch):
    teachers, student = [odd(), odd()], make("bert")
    before, mine = [state(teacher) for teacher in teachers], state(student)
    method = Distillation(FEATURES, teachers)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(method.teachers[1], "prepare", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        method.attach(student, CPU, nullcontext)
    assert [state(teacher) for teacher in teachers] == before and state(student) == mine


def test_a_loan_keeps_nothing_alive_and_what_was_not_borrowed_stays():
    model = make("bert")
    borrow(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    other = make("bert").requires_grad_(False)
    give_back(other)
    assert not any(parameter.requires_grad for parameter in other.parameters())


# the forms in which a teacher comes


def packed(model):
    quantize(model, progress=False)
    return model


def compiled(model):
    model = copy.deepcopy(model)
    wrapper = nn.Module()
    wrapper._orig_mod = model  # what torch.compile(model) is
    return wrapper


class Odd(BertForSequenceClassification):
    """A class of one's own: another name, any arguments, a tuple."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).to_tuple()


def renamed(model):
    model = copy.deepcopy(model)
    model.__class__ = Odd
    return model


def as_tuple(model):
    model = copy.deepcopy(model)
    model.config.return_dict = False
    return model


FORMS = {"compiled": compiled, "return_dict": as_tuple, "renamed": renamed, "wrapped": CompressedModel}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "config", [{}, {"matches": FEATURES.matches, "weight": 0}, {"matches": FEATURES.matches}], ids=str
)
def test_a_teacher_teaches_the_same_in_every_form(form, config):
    student, teacher = make("bert"), make("bert", seed=1)
    batch = inputs(student) | {"labels": torch.tensor([0, 1, 2])}
    right = taught(student, teacher, batch, **config)
    assert taught(student, FORMS[form](teacher), batch, **config) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("form", ["compiled", "return_dict", "wrapped"])
def test_so_does_a_causal_one(form):
    student, teacher = make("gpt2", "language"), make("gpt2", "language", seed=1)
    batch = inputs(student)
    config = {"matches": FEATURES.matches, "contrast": Contrast()}
    right = taught(student, teacher, batch, **config)
    assert taught(student, FORMS[form](teacher), batch, **config) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "language"), ("bert", "tokens")])
def test_a_packed_teacher_teaches_what_it_answers(family, head):
    student, teacher = make(family, head), make(family, head, seed=1)
    batch = inputs(student)
    if head == "tokens":
        batch["labels"] = batch["input_ids"] % 3
    config = {"matches": FEATURES.matches[:1]}
    dense = taught(student, teacher, batch, **config)
    found = taught(student, packed(teacher), batch, **config)
    # 8 bits change it a little, and not at all where the features are compared
    assert found == pytest.approx(dense, rel=0.1) and found != dense


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "language"), ("bert", "tokens")])
def test_a_teacher_in_half_precision_teaches_in_float32(family, head):
    student, teacher = make(family, head), make(family, head, seed=1)
    batch = inputs(student)
    config = {"matches": FEATURES.matches, "contrast": Contrast()}
    right = taught(student, teacher, batch, **config)
    assert taught(student, teacher.bfloat16(), batch, **config) == pytest.approx(right, rel=0.1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("labels", [True, False])
def test_headless_models_compare_hidden_states(tmp_path, family, labels):
    student, teacher = make(family, "base"), make(family, "base", seed=1)
    config = DistillationConfig(weight=0, matches=FEATURES.matches)
    data = (
        rows(family) if labels and family == "gpt2" else [{k: v for k, v in r.items() if k != "labels"} for r in rows()]
    )
    before = copy.deepcopy(student.state_dict())
    run = DistillationTrainer(
        student,
        args=tiny_arguments(tmp_path, max_steps=1),
        teacher=teacher,
        distillation=config,
        train_dataset=data,
    )
    run.train()
    assert {"loss_hidden_mse_0", "loss_minilm_attention_1"} <= run.state.log_history[0].keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    with pytest.raises(LmcompressError, match="cannot distil the logits of .*weight: 0"):
        trainer(tmp_path, make(family, "base"), teacher, DistillationConfig(matches=FEATURES.matches), family)


def test_a_headless_teacher_teaches_a_student_with_a_head():
    student, teacher = make("bert"), make("bert", "base", seed=1)
    batch = inputs(student)
    assert set(taught(student, teacher, batch, weight=0, matches=FEATURES.matches)) == {
        "hidden_mse_0",
        "minilm_attention_1",
    }
    with pytest.raises(LmcompressError, match="cannot distil the logits of BertModel"):
        taught(student, teacher, batch)


def test_a_subclass_is_what_it_is_derived_from(tmp_path):
    class Weighted(BertForSequenceClassification):
        pass

    student = make("bert")
    student.__class__ = Weighted
    run = trainer(tmp_path, student, make("bert", seed=1), DistillationConfig())
    run.train()
    assert run.state.log_history[0]["loss_kd"] > 0


@pytest.mark.parametrize("side", [0, 1])
def test_labels_are_compared_by_number_even_if_their_keys_are_strings(side):
    models = make("bert"), make("bert", seed=1)
    for number, model in enumerate(models):
        names = {0: "no", 1: "maybe", 2: "yes"}
        model.config.id2label = {str(k): v for k, v in names.items()} if number == side else names
    batch = inputs(models[0])
    assert taught(*models, batch)["kd"] > 0
    models[1].config.id2label = {"0": "yes", "1": "maybe", "2": "no"}
    with pytest.raises(LmcompressError, match="name their labels differently"):
        taught(*models, batch)


def test_reentrant_checkpointing_is_refused_where_features_are_compared(tmp_path):
    teacher = odd()
    before = state(teacher)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.warns(FutureWarning), pytest.raises(LmcompressError, match="use_reentrant must be False"):
        trainer(tmp_path, make("bert"), teacher, **options)
    assert state(teacher) == before


@pytest.mark.parametrize("given", [{"loss": torch.ones(())}, (), None, ({"hidden": torch.ones(1)},)], ids=str)
def test_a_teacher_without_logits_is_refused(given):
    with pytest.raises(LmcompressError, match="a teacher must return logits"):
        logits_of(given)


@pytest.mark.parametrize("given", ["a/path", nn.Linear(2, 2)], ids=str)
def test_what_is_no_model_cannot_teach(given):
    with pytest.raises(LmcompressError, match="must be a PreTrainedModel.*load_teacher"):
        Distillation(DistillationConfig(), given)
