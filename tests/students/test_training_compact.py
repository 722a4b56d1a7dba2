"""Compact models are trained by distillation like any other, stop and go on, and keep what makes them compact."""

import copy

import pytest
import torch
from compacting import everything
from families import make, outputs
from training import tiny_arguments

from lmcompress import CompressedModel
from lmcompress.checkpoint.layers import layers_of
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.students import factorize_embeddings
from lmcompress.trainers import DistillationTrainer


def rows(count=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def trainer(family, folder, **changes):
    student, teacher = everything(make(family, seed=1)), make(family, seed=1)
    config = DistillationConfig(matches=[Match(loss="hidden_mse", student=-1, teacher=-1)])
    args = tiny_arguments(folder, max_steps=6, learning_rate=1e-2, **changes)
    return DistillationTrainer(student, args, teacher=teacher, distillation=config, train_dataset=rows())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_distillation_trains_them_and_they_reload(tmp_path, family):
    run = trainer(family, tmp_path)
    before = outputs(run.student)
    run.train()
    run.finish()
    run.student.eval()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and not torch.equal(outputs(run.student), before)
    layers = layers_of(run.student)
    assert layers[-1].sources == (0, 0, 0)
    CompressedModel(run.student).save_pretrained(tmp_path / "m")
    again = type(run.student).from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(again), outputs(run.student)) and layers_of(again) == layers


def test_the_chunked_loss_of_a_causal_model_trains_the_factors_of_its_head(tmp_path):
    student, teacher = make("gpt2", "language", seed=1), make("gpt2", "language", seed=2)
    plain = copy.deepcopy(student)
    factorize_embeddings(student, 3)
    with torch.no_grad():
        # the same matrix, full
        plain.get_input_embeddings().weight.copy_(student.get_input_embeddings().matrix())
    ids = torch.randint(2, 60, (4, 8))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    losses = []
    for model in (student, plain):
        args = tiny_arguments(tmp_path, max_steps=1, learning_rate=1e-2)
        run = DistillationTrainer(model, args, teacher=teacher, train_dataset=data)
        before = copy.deepcopy(model.state_dict())
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and "transformer.wte.weight" in moved
    assert student.get_output_embeddings().weight.shape == (64, 16)


def test_a_run_that_stopped_goes_on_from_its_checkpoint_and_that_is_a_model_too(tmp_path):
    whole = trainer("bert", tmp_path / "whole")
    whole.train()
    first = trainer("bert", tmp_path / "cut", save_strategy="steps", save_steps=3)
    first.train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    second = trainer("bert", tmp_path / "cut")
    second.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name]), name
    assert layers_of(type(whole.student).from_pretrained(checkpoint)) == layers_of(whole.student)
