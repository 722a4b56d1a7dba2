"""Values of a recipe that no run could do anything with are refused before it begins."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_recipe import RECIPE, write_task

from lmcompress.data import Task
from lmcompress.errors import LmcompressError
from lmcompress.recipes import parse_recipe, plan
from lmcompress.recipes.checks import check_training
from lmcompress.recipes.schema import Training

TASK = Task("tone", "classification", ("text",), "label", ("bad", "good"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return RECIPE.replace("DATA", str(write_task(tmp_path_factory.mktemp("odd") / "task")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number, got Infinity"),
        ("training.num_train_epochs=.inf", "training.num_train_epochs: input should be a finite number"),
        ("training.logging_steps=.inf", "training.logging_steps: input should be a finite number"),
        ("training.adam_beta1=.nan", "training.adam_beta1: input should be a finite number"),
        ("training.adam_beta1=fast", "training.adam_beta1: input should be a valid number"),
        ("training.gradient_checkpointing=deep", "training.gradient_checkpointing: input should be a valid boolean"),
        ("stages.student.distillation.temperature=.inf", "temperature: input should be a finite number"),
        ("model.config.layer_norm_eps=.nan", "model.config.layer_norm_eps: input should be a finite number"),
        ("evaluation.latency_batches=[0]", "latency_batches.0: input should be greater than or equal to 1, got 0"),
        ("evaluation.latency_batches=[100000000]", "latency_batches.0: input should be less than or equal to 65536"),
        ("stages.teacher.name=results.json", "name: must be letters, .* not end in '-control', '.json', '.yaml'"),
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor cannot be set in a recipe: smooth the teacher"),
        ("seed=4294967296", "seed: input should be less than 4294967296"),
    ],
)
def test_numbers_and_names_are_refused_as_they_are_read(text, override, message):
    with pytest.raises(LmcompressError, match=message):
        parse_recipe(text, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.config.hidden_act=foo", "stage 'teacher': model.config makes no bert: KeyError: 'foo'"),
        ("model.config.hidden_dropout_prob=7", "model.config makes no bert: .*has to be between 0 and 1, but got 7"),
        ("model.config.hidden_dropout_prob=much", "model.config makes no bert: .*hidden_dropout_prob"),
        ("model.config.vocab_size=5", "model.config.vocab_size: follows from the rest of the recipe; leave it out"),
        ("model.config.num_labels=7", "model.config.num_labels: follows from the rest of the recipe"),
        ("training.dataloader_num_workers=-1", "stage 'teacher', training: num_workers option should be non-negative"),
    ],
)
def test_what_makes_no_model_or_trainer_is_refused_by_the_plan(text, override, message):
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(text, [override]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adam_beta1": 2}, "Invalid beta parameter"),
        ({"adam_epsilon": -1}, "Invalid epsilon value"),
        ({"seed": -1}, "Seed must be between 0 and"),
        ({"fsdp": "full_shard"}, "fsdp only works in distributed training"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "unexpected keyword argument 'cycles'"),
        ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor can only be set when"),
    ],
)
def test_training_that_transformers_would_refuse_later_is_refused(fields, message):
    with pytest.raises(LmcompressError, match=message):
        check_training(Training(**fields), TASK)


def test_the_check_of_training_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    wanted = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    check_training(Training(full_determinism=True, optim="adafactor"), TASK)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == wanted
    assert not list(tmp_path.iterdir()) and not torch.are_deterministic_algorithms_enabled()


def test_of_very_many_problems_twenty_are_told(text):
    with pytest.raises(LmcompressError, match="more than 20 problems") as caught:
        parse_recipe(text + "".join(f"key{i}: 1\n" for i in range(1000)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1].strip() == "… and 980 more"


def test_tags_are_refused_even_those_of_yaml(text):
    with pytest.raises(LmcompressError, match="line 1: the tag .*binary' has no place in a recipe"):
        parse_recipe(text.replace("name: tiny", "name: !!binary aGVsbG8="))
