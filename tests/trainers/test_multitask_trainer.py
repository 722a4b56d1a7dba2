"""Several tasks in one run: one body, a teacher each, batches of one task."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import make, set_dropout
from ragged import arguments, ragged_rows
from torch.utils.data import default_collate
from transformers import AutoModelForSequenceClassification

from lmcompress import CheckpointError, LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig, Match, OnPolicy
from lmcompress.trainers import MultiTaskDistillation, MultiTaskStudent, MultiTaskTrainer

KINDS = {"topic": "classification", "score": "regression"}
CONFIG = DistillationConfig(matches=[Match(loss="hidden_mse", student=1, teacher=2, projection="linear")])


def heads(seed: int) -> dict:
    models = {task: make("bert", seed=seed, num_labels=3 if task == "topic" else 1) for task in KINDS}
    for model in models.values():
        set_dropout(model, 0.0)
    return models


def trainer(folder, models=None, config=CONFIG, tau=0.5, dropout=0.0, **changes) -> MultiTaskTrainer:
    student = MultiTaskStudent(models or heads(1))
    set_dropout(student, dropout)
    method = MultiTaskDistillation({task: Distillation(config, teacher) for task, teacher in heads(2).items()})
    rows = {"topic": ragged_rows("classification", 24), "score": ragged_rows("regression", 8)}
    return MultiTaskTrainer(
        student, arguments(folder, per_device_train_batch_size=4, **changes), methods=[method],
        train_datasets=rows, tau=tau, collators=dict.fromkeys(KINDS, default_collate),
    )  # fmt: skip


def test_all_heads_train_one_body_and_every_task_is_logged(tmp_path):
    models = heads(1)
    before = {task: model.classifier.weight.detach().clone() for task, model in models.items()}
    run = trainer(tmp_path, models, max_steps=8, logging_steps=8)
    assert models["topic"].bert is models["score"].bert
    run.train()
    logs = run.state.log_history[0]
    assert {f"loss_{task}/{term}" for task in KINDS for term in ("kd", "hidden_mse_0")} <= set(logs)
    assert all(not torch.equal(model.classifier.weight, before[task]) for task, model in models.items())
    run.finish()
    assert not any(module._forward_hooks for module in run.student.modules())


def test_one_task_alone_trains_as_without_the_others(tmp_path):
    from lmcompress.trainers import DistillationTrainer

    # the same batches for both: all rows, whose order does not matter to a sum
    args = arguments(tmp_path, per_device_train_batch_size=16)
    rows, trained = ragged_rows("classification"), []
    student = heads(1)["topic"]
    method = MultiTaskDistillation({"topic": Distillation(CONFIG, heads(2)["topic"])})
    MultiTaskTrainer(
        MultiTaskStudent({"topic": student}),
        args,
        methods=[method],
        train_datasets={"topic": rows},
        collators={"topic": default_collate},
    ).train()
    trained.append(student.state_dict())
    student = heads(1)["topic"]
    DistillationTrainer(student, args, teacher=heads(2)["topic"], distillation=CONFIG, train_dataset=rows).train()
    trained.append(student.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)


def test_each_task_is_saved_to_a_folder_that_loads(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "final"))
    for task, model in run.student.models.items():
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final" / task)
        torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path):
    changes = dict(max_steps=12, optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="linear", dropout=0.1)
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    first = trainer(tmp_path / "cut", save_strategy="steps", save_steps=5, **changes)
    first.train()
    second = trainer(tmp_path / "cut", heads(9), **changes)
    # 8 batches are an epoch: 5 lies in the middle of one, 10 in that of the next
    for step in (5, 10):
        second = trainer(tmp_path / "cut", heads(9), **changes)
        second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        torch.testing.assert_close(second.student.state_dict(), whole.student.state_dict(), rtol=0, atol=0)
        for one, other in zip(whole.methods[0].modules().values(), second.methods[0].modules().values(), strict=True):
            torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    (tmp_path / "checkpoint-2" / "score").rename(tmp_path / "checkpoint-2" / "other")
    with pytest.raises(CheckpointError, match="no folder 'score'"):
        trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="at least one task"):
        MultiTaskStudent({})
    with pytest.raises(LmcompressError, match="letters, digits, - and _, got '../a'"):
        MultiTaskStudent({"../a": make("bert")})
    with pytest.raises(LmcompressError, match="one class and shape only.*share_backbone=False"):
        MultiTaskStudent({"a": make("bert"), "b": make("bert", hidden_size=8)})
    apart = MultiTaskStudent({"a": make("bert"), "b": make("bert", hidden_size=8)}, share_backbone=False)
    with pytest.raises(LmcompressError, match="there is no task 'c'"):
        apart(task="c")
    with pytest.raises(LmcompressError, match=r"tasks are \['a', 'b'\], those of collators \['a'\]"):
        MultiTaskTrainer(apart, train_datasets={"a": [{}], "b": [{}]}, collators={"a": default_collate})
    with pytest.raises(LmcompressError, match="task 'score': .*no layer 9"):
        config = DistillationConfig(matches=[Match(loss="hidden_mse", student=1, teacher=9)])
        student = MultiTaskStudent({"score": heads(1)["score"]})
        method = MultiTaskDistillation({"score": Distillation(config, heads(2)["score"])})
        MultiTaskTrainer(
            student, arguments(tmp_path), methods=[method], train_datasets={"score": ragged_rows("regression")},
            collators={"score": default_collate},
        )  # fmt: skip
    with pytest.raises(LmcompressError, match="task 'topic': on_policy lets the student of one task write texts"):
        trainer(tmp_path, config=CONFIG.model_copy(update={"on_policy": OnPolicy()}))
    with pytest.raises(
        LmcompressError, match=r"the student's tasks are \['score', 'topic'\], the teachers' \['topic'\]"
    ):
        method = MultiTaskDistillation({"topic": Distillation(CONFIG, heads(2)["topic"])})
        rows = {"topic": ragged_rows("classification"), "score": ragged_rows("regression")}
        MultiTaskTrainer(
            MultiTaskStudent(heads(1)), arguments(tmp_path), methods=[method], train_datasets=rows,
            collators=dict.fromkeys(KINDS, default_collate),
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_runs_and_saves_both_tasks(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "multitask.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert "intent: teacher" in capsys.readouterr().out
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "question")
    assert (loaded.config.num_labels, loaded.config.num_hidden_layers) == (2, 2)
