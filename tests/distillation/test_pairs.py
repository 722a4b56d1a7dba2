"""Distillation of an encoder–decoder: labels that are not shifted, layers of both stacks, contrast of the decoder."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import BartConfig, BertConfig, PrinterCallback, T5Config, TrainingArguments

from lmcompress.activations.capture import resolve
from lmcompress.distillation import Distillation, DistillationConfig
from lmcompress.distillation.presets import quantgpt
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step
from lmcompress.proof import tiny_model
from lmcompress.proof.tiny import tiny_inputs
from lmcompress.students import by_layers
from lmcompress.trainers import DistillationTrainer

CONFIGS = {"bart": BartConfig(), "t5": T5Config()}


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


def rows(model, count=8):
    found = []
    for seed in range(count):
        batch = tiny_inputs(model, rows=1, length=7 + seed % 3, seed=seed, padded=False)
        found.append({"input_ids": batch["input_ids"][0], "labels": batch["decoder_input_ids"][0]})
    return found


def padded(batch):
    """A batch of rows whose inputs and targets have several lengths."""
    inputs = nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], True, 1)
    labels = nn.utils.rnn.pad_sequence([row["labels"] for row in batch], True, -100)
    return {"input_ids": inputs, "attention_mask": (inputs != 1).long(), "labels": labels}


def trainer_of(model, teacher, tmp_path, config, **settings):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    made = DistillationTrainer(
        model, args, train_dataset=rows(model), teacher=teacher, distillation=config, data_collator=padded
    )
    made.remove_callback(PrinterCallback)
    return made


def test_every_loss_is_zero_at_the_teacher(model, tmp_path):
    matches = [
        {"student": f"{stack}.{layer}", "teacher": f"{stack}.{layer}", "loss": "hidden_mse"}
        for stack in ("encoder", "decoder") for layer in (1, 3)
    ] + [
        {"student": "decoder.2", "teacher": "decoder.2", "loss": "attention_mse", "on": "scores"},
        {"student": "encoder.1", "teacher": "encoder.1", "loss": "attention_mse_mean", "on": "probabilities"},
    ]  # fmt: skip
    config = DistillationConfig(matches=matches, label_weight=0.0)
    trainer = trainer_of(model, copy.deepcopy(model), tmp_path, config, learning_rate=0.0)
    assert float(trainer.train().training_loss) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_on_logits_is_that_of_the_targets_without_a_shift(model):
    teacher, batch = tiny_model(model.config, seed=1), padded(rows(model)[:4])
    with torch.no_grad():
        mine, theirs = (one(**batch).logits.log_softmax(-1) for one in (model, teacher))
    real = batch["labels"] != -100
    expected = (theirs.exp() * (theirs - mine)).sum(-1)[real].sum()
    method = Distillation(DistillationConfig(label_weight=0.0, temperature=1.0), teacher)
    method.attach(model, torch.device("cpu"), nullcontext)
    step = Step(model=model, inputs=batch, student_inputs=batch, progress=0.0, outputs=model(**batch))
    term = method.loss_terms(step)["kd"]
    method.release()
    assert term.unit == "labels"
    torch.testing.assert_close(term.total, expected, atol=1e-4, rtol=1e-4)


def test_the_contrast_is_of_the_decoder_and_moves_the_student(model, tmp_path):
    student = by_layers(copy.deepcopy(model), [0, 2, 3, 5]).model
    before = copy.deepcopy(student.state_dict())
    trainer = trainer_of(student, model, tmp_path, quantgpt(), learning_rate=1e-3)
    assert trainer.train().training_loss < float("inf")
    logged = [entry for entry in trainer.state.log_history if "loss_contrast" in entry]
    assert len(logged) == 2 and all(entry["loss_contrast"] > 0 for entry in logged)
    assert anatomy_of(student).starts == (0, 2)
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert any(".encoder." in f".{name}" for name in moved) and any(".decoder." in f".{name}" for name in moved)


def test_an_encoder_is_not_compared_with_a_decoder(model, tmp_path):
    config = DistillationConfig(matches=[{"student": "encoder.1", "teacher": "decoder.1", "loss": "hidden_mse"}])
    with pytest.raises(LmcompressError, match=r"two encoders, or of two decoders"):
        trainer_of(model, copy.deepcopy(model), tmp_path, config).train()


def test_earth_movers_are_refused(model, tmp_path):
    with pytest.raises(LmcompressError, match="emd compares every layer with every other"):
        trainer_of(model, copy.deepcopy(model), tmp_path, DistillationConfig(emd={})).train()


def test_a_layer_of_one_stack_has_no_name_by_stack():
    with pytest.raises(LmcompressError, match="encoder.i or decoder.i of a model with both"):
        resolve(tiny_model(BertConfig()), "hidden", "decoder.1")
