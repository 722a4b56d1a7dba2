"""Training runs that share weights: resuming, a teacher, pruned models."""

from __future__ import annotations

import pytest
import torch
from families import cut_unevenly, make, set_dropout
from torch import Tensor
from training import tiny_arguments

from lmcompress import CheckpointError, LmcompressError
from lmcompress.clustering import SharingConfig
from lmcompress.distillation import DistillationConfig
from lmcompress.families.weights import weighted_modules
from lmcompress.trainers import SharingTrainer

STEPS = 6


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        ids = torch.randint(5, 60, (10,), generator=generator)
        mask = (torch.arange(10) < 4 + row % 6).long()
        made.append({"input_ids": ids * mask + 1 - mask, "attention_mask": mask, "labels": torch.tensor(row % 3)})
    return made


def trainer_of(folder, config=None, teacher=None, family="bert", **given):
    student = given.pop("student", None) or make(family, seed=1)
    set_dropout(student, 0.1)
    changes = {"max_steps": STEPS, "learning_rate": 1e-2, "weight_decay": 0.1} | given.pop("changes", {})
    config = SharingConfig(clusters=6) if config is None else config
    return SharingTrainer(
        student, tiny_arguments(folder, **changes), sharing=config, teacher=teacher, train_dataset=rows(), **given
    )


def counts(model) -> list[int]:
    return [len(one.weight.detach().unique()) for one in weighted_modules(model) if one.default]


def test_a_run_with_a_teacher_trains_the_values_and_the_rest(tmp_path, family):
    student = make(family, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    trainer = trainer_of(tmp_path, teacher=make(family, seed=1), student=student)
    with pytest.raises(LmcompressError, match="no report before finish"):
        _ = trainer.report
    trainer.train()
    trainer.finish()
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.endswith("bias") for name in moved)
    assert max(counts(student)) <= 33
    assert max(row.clusters for row in trainer.report.matrices if row.part != "embeddings") <= 6
    assert any("loss_kd" in entry for entry in trainer.state.log_history)


def test_a_pruned_model_with_uneven_heads_shares_too(tmp_path):
    student = make("gpt2", seed=1)
    cut_unevenly(student)
    trainer = trainer_of(tmp_path, student=student)
    trainer.train()
    trainer.finish()
    assert max(row.clusters for row in trainer.report.matrices if row.part != "embeddings") <= 6


def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    saving = dict(save_strategy="steps", save_steps=4)
    first = trainer_of(tmp_path / "killed", changes=saving)
    original = first.training_step

    class Killed(Exception):
        pass

    def step(*args, **kwargs):
        if first.state.global_step == 5:
            raise Killed
        return original(*args, **kwargs)

    first.training_step = step
    with pytest.raises(Killed):
        first.train()
    second = trainer_of(tmp_path / "killed", changes=saving)
    second.train(resume_from_checkpoint=True)
    for mine, theirs in (
        (whole.student, second.student),
        (whole.sharing.modules()["shared"], second.sharing.modules()["shared"]),
    ):
        state = theirs.state_dict()
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    second.finish()
    assert counts(second.student) == counts(whole.student)


def test_resuming_with_another_number_of_clusters_is_refused(tmp_path):
    trainer_of(tmp_path, changes=dict(save_strategy="steps", save_steps=4)).train()
    with pytest.raises(CheckpointError, match="state of other methods"):
        trainer_of(tmp_path, SharingConfig(clusters=7)).train(resume_from_checkpoint=True)


def test_a_distillation_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="distillation needs a teacher, got none"):
        trainer_of(tmp_path, distillation=DistillationConfig())
