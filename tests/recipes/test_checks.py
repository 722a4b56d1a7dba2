"""What would stop a run later is refused before it begins."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, RobertaConfig

from lmcompress.data import Task
from lmcompress.errors import LmcompressError
from lmcompress.families.positions import positions_of
from lmcompress.recipes.checks import check_training, check_writable
from lmcompress.recipes.lookup import check_model_folder, found
from lmcompress.recipes.training import Training

TASK = Task("tone", "classification", ("text",), "label", ("bad", "good"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"report_to": "wandb"}, "report_to: wandb is not installed"),
        ({"report_to": ["tensorbord"]}, "report_to has no value 'tensorbord'; did you mean 'tensorboard'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type has no value 'cosin'; did you mean 'cosine'"),
        ({"optim": "adamw"}, "optim has no value 'adamw'; did you mean 'adamw_8bit'|optim has no value 'adamw'"),
        ({"optim": "lion_32bit"}, "optim: .*lion.* is not installed"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end requires the save and eval strategy to match"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": "acuracy"},
            "metric_for_best_model 'acuracy' is not measured; did you mean 'accuracy'",
        ),
        ({"bf16": True, "fp16": True, "use_cpu": True}, "At most one of fp16 and bf16"),
    ],
)
def test_what_transformers_refuses_in_training_is_refused_before(fields, message):
    with pytest.raises(LmcompressError, match=message):
        check_training(Training(**fields), TASK)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_auto_is_decided_by_the_machine(monkeypatch, fast):
    monkeypatch.setattr("lmcompress.recipes.training.bfloat16_is_fast", lambda **_: fast)
    training = Training(bf16="auto")
    check_training(training, TASK)
    assert training.computes_in_bfloat16() is training.trainer_arguments("unused").bf16 is fast
    # what is hashed to decide whether a run goes on is what was asked, on every machine
    assert training.bf16 == "auto" and Training().computes_in_bfloat16() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is used")
def test_bf16_on_a_machine_without_a_gpu_is_of_the_cpu():
    arguments = Training(bf16=True).trainer_arguments("unused")
    assert arguments.bf16 and arguments.use_cpu and arguments.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fp16 is possible")
def test_half_precision_needs_a_gpu():
    with pytest.raises(LmcompressError, match="fp16 needs a GPU, which this machine lacks"):
        check_training(Training(fp16=True), TASK)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bf16": True, "use_cpu": True},
        {"report_to": "none"},
        {"optim": "adafactor", "lr_scheduler_type": "cosine"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": "accuracy"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch"},
    ],
)
def test_what_can_be_trained_passes(fields):
    check_training(Training(**fields), TASK)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(LmcompressError, match=r"cannot write to .*: .*file is a file, and the output is a folder"):
            check_writable(place)
    check_writable(tmp_path / "new" / "folder")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LmcompressError, match="no permission to write to"):
        check_writable(tmp_path / "out")


def test_permission_is_asked_of_the_nearest_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(LmcompressError, match=f"no permission to write to {tmp_path}"):
        check_writable(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(max_position_embeddings=64), 64),
        (DistilBertConfig(max_position_embeddings=32), 32),
        (RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64),
    ],
)
def test_positions_are_tokens_that_a_model_takes(config, positions):
    assert positions_of(config) == positions


def test_folders_without_a_model_are_refused_by_what_they_are(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "config.json").touch()
    for name, message in (
        ("file", "file is a file; a model is a folder"),
        ("nowhere", "no such folder: .*nowhere"),
        ("run", r"run holds no model \(no config.json\); its models are: .*student"),
    ):
        with pytest.raises(LmcompressError, match=message):
            check_model_folder(tmp_path / name)
    check_model_folder("user/name")
    check_model_folder("bert-base-uncased")


def test_other_trouble_of_loading_keeps_its_first_line():
    with pytest.raises(LmcompressError, match="could not load the model of 'bert': unrecognized$"):
        with found("bert", "model"):
            raise ValueError("\nunrecognized\nand more")
