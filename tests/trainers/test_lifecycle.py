"""A trainer with its methods before, between and after steps: finishing, going on, giving back, saving."""

from __future__ import annotations

import copy
import inspect
import json
import logging

import pytest
import torch
from families import make, outputs
from training import rows, tiny_arguments
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
)

from lmcompress import CompressedModel, LmcompressError
from lmcompress.clustering import SharingConfig
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.pruning import Gradual, OneShot, PruningConfig, Target
from lmcompress.pruning.unstructured import SparsityConfig
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.trainers import (
    CompressionTrainer,
    DistillationArguments,
    DistillationTrainer,
    PruningArguments,
    PruningTrainer,
    QuantizationArguments,
    QuantizationTrainer,
    SharingTrainer,
    SparsityTrainer,
)

FEATURES = DistillationConfig(matches=(Match(loss="hidden_mse", student=1, teacher=1, projection="linear"),))
PRUNING = PruningConfig(target=Target(sparsity=0.3), schedule=OneShot())
TWO_BITS = QuantizationConfig(weights=WeightScheme(bits=2), activations=None)
ALL = {
    "distillation": lambda: {"teacher": make("bert", seed=1), "distillation": FEATURES},
    "pruning": lambda: {"pruning": PRUNING},
    "quantization": lambda: {"quantization": TWO_BITS},
    "sparsity": lambda: {"sparsity": SparsityConfig(sparsity=0.5)},
    "sharing": lambda: {"sharing": SharingConfig(clusters=4)},
}
NAMED = {
    "distillation": DistillationTrainer,
    "pruning": PruningTrainer,
    "quantization": QuantizationTrainer,
    "sparsity": SparsityTrainer,
    "sharing": SharingTrainer,
}
each_method = pytest.mark.parametrize("name", list(ALL))


def trainer_for(name, folder, model=None, callbacks=None, keywords=None, kind=CompressionTrainer, **changes):
    model = make("bert") if model is None else model
    args = tiny_arguments(folder, **({"max_steps": 4, "learning_rate": 1e-3} | changes))
    own = ALL[name]() if name else {}
    data = rows()
    return kind(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks, **own, **(keywords or {}))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Stops(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


def test_the_signature_begins_as_that_of_trainer_and_is_the_same_in_all():
    stock = list(inspect.signature(Trainer.__init__).parameters)
    for kind in (CompressionTrainer, *NAMED.values()):
        parameters = inspect.signature(kind.__init__).parameters
        assert list(parameters)[: len(stock)] == stock
        assert {"methods", "teacher", "distillation", "pruning", "quantization"} <= set(list(parameters)[len(stock) :])


def test_arguments_in_another_order_are_named(tmp_path):
    with pytest.raises(LmcompressError, match="args must be TrainingArguments, got BertFor.*teacher="):
        DistillationTrainer(make("bert"), make("bert"), tiny_arguments(tmp_path))


@each_method
def test_every_trainer_takes_a_compressed_model_and_gives_the_numbers_of_the_inner_one(name, tmp_path):
    answers = []
    for wrapped in (False, True):
        model = make("bert")
        trainer = trainer_for(
            name, tmp_path / str(wrapped), CompressedModel(model) if wrapped else model, kind=NAMED[name]
        )
        assert trainer.model is model and trainer.compressed_model.model is model
        assert isinstance(trainer.compressed_model, CompressedModel)
        trainer.train()
        answers.append((outputs(model.eval()), trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(*answers, rtol=0, atol=0)


def test_a_stock_trainer_takes_a_compressed_model_and_saves_it(tmp_path):
    losses, models = [], []
    for wrapped in (False, True):
        model = make("bert")
        args = tiny_arguments(tmp_path / str(wrapped), max_steps=3, save_strategy="steps", save_steps=3)
        trainer = Trainer(CompressedModel(model) if wrapped else model, args, train_dataset=rows())
        trainer.train()
        losses.append([row.get("loss") for row in trainer.state.log_history])
        models.append(model)
    assert losses[0] == losses[1]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "True" / "checkpoint-3")
    torch.testing.assert_close(saved.state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert "equivalence" in json.loads((tmp_path / "True" / "checkpoint-3" / "lmcompress.json").read_text("utf-8"))


@each_method
def test_a_second_training_goes_on_or_is_refused_before_its_first_step(name, tmp_path):
    trainer = trainer_for(name, tmp_path)
    trainer.train()
    model = trainer.student
    if name in ("pruning", "quantization"):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(LmcompressError, match=f"training cannot go on: {name} has finished.*auto_finish=False"):
            trainer.train()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        return
    zero = [p == 0 for p in model.parameters() if p.dim() > 1]
    values = [len(p.unique()) for p in model.parameters() if p.dim() > 1]
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name == "distillation":
        rates = [row for row in trainer.state.log_history if "loss_hidden_mse_0" in row]
        assert len(rates) == 4 and hooks(model) == 0
    if name == "sparsity":
        assert all(
            bool((p[z] == 0).all()) for p, z in zip([p for p in model.parameters() if p.dim() > 1], zero, strict=True)
        )
        assert trainer.methods[0].report.sparsity >= 0.5
    if name == "sharing":
        assert [len(p.unique()) for p in model.parameters() if p.dim() > 1] == values


@each_method
def test_without_automatic_finish_training_is_called_several_times(name, tmp_path):
    trainer = trainer_for(name, tmp_path, keywords={"auto_finish": False})
    trainer.train()
    trainer.train()
    assert not trainer.finished
    trainer.finish()
    trainer.finish()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(outputs(reloaded), outputs(trainer.model.eval()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pruning", "quantization"])
def test_what_is_not_finished_is_not_saved_as_a_model(name, tmp_path):
    trainer = trainer_for(name, tmp_path, keywords={"auto_finish": False})
    for _ in range(2):
        for save in (lambda: trainer.save_model(str(tmp_path / "saved")), trainer.push_to_hub):
            with pytest.raises(LmcompressError, match=f"{name} is not finished.*Call finish"):
                save()
        trainer.train()
    assert not (tmp_path / "saved").exists()


@each_method
def test_a_training_that_fails_gives_the_teacher_back_and_can_be_released(name, tmp_path):
    model, teacher = make("bert"), make("bert", seed=1).train()
    frozen = next(teacher.parameters()).requires_grad_(False)
    own = {} if name == "distillation" else {"teacher": teacher, "distillation": FEATURES}
    trainer = trainer_for(name, tmp_path, model, callbacks=[Stops(2, ValueError("boom"))], keywords=own)
    if name == "distillation":
        teacher = trainer.methods[0].teachers[0].model
    with pytest.raises(ValueError, match="boom"):
        trainer.train()
    assert hooks(teacher) == 0
    if name != "distillation":
        assert teacher.training and not frozen.requires_grad
        assert sum(not p.requires_grad for p in teacher.parameters()) == 1
    trainer.release()
    assert hooks(model) == 0
    with pytest.raises(LmcompressError, match="let go of its model"):
        trainer.train()
    # the model is ordinary again, and another trainer takes it
    trainer_for(name, tmp_path, model).train()


def test_a_context_manager_lets_go_unless_it_has_finished(tmp_path):
    model = make("bert")
    with trainer_for("quantization", tmp_path, model), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    assert hooks(model) == 0 and type(model.classifier) is torch.nn.Linear
    with trainer_for("quantization", tmp_path, model) as trainer:
        trainer.train()
    assert trainer.report.matrices if hasattr(trainer, "report") else trainer.methods[0].report.matrices


def test_a_trainer_that_is_refused_leaves_nothing_behind(tmp_path):
    model, teacher = make("bert"), make("bert", seed=1).train()
    wrong = DistillationConfig(matches=(Match(loss="hidden_mse", student=9, teacher=1),))
    with pytest.raises(LmcompressError):
        trainer_for("pruning", tmp_path, model, keywords={"teacher": teacher, "distillation": wrong})
    assert hooks(model) == hooks(teacher) == 0 and teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_frozen_student_is_refused(tmp_path):
    """A copy of a frozen model: nothing of it would be trained, and nobody would be told."""
    student = copy.deepcopy(make("bert").requires_grad_(False))
    trainer = trainer_for("quantization", tmp_path, student)
    with pytest.raises(LmcompressError, match="no weight of the student is trainable.*requires_grad_"):
        trainer.train()


def test_half_precision_weights_are_trained_in_float32(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for("distillation", tmp_path, make("bert").to(torch.bfloat16), learning_rate=2e-5)
    assert "weights are bfloat16 and are trained in float32" in caplog.text
    before = copy.deepcopy(trainer.student.state_dict())
    trainer.train()
    changed = [(before[key] != value).float().mean() for key, value in trainer.student.state_dict().items()]
    assert trainer.student.dtype == torch.float32 and min(changed[5:]) > 0.9
    as_it_is = trainer_for(None, tmp_path, make("bert").to(torch.bfloat16), keywords={"float32_weights": False})
    assert as_it_is.student.dtype == torch.bfloat16


def test_what_a_schedule_could_not_finish_is_said(tmp_path, caplog):
    schedule = Gradual(begin=0.0, end=0.9, every=2)
    pruning = PruningConfig(target=Target(sparsity=0.4), schedule=schedule)
    trainer = trainer_for(
        None, tmp_path, max_steps=20, callbacks=[Stops(3)], keywords={"pruning": pruning}, kind=PruningTrainer
    )
    trainer.train()
    said = "training ended at step 3 of 20, before the schedule of pruning had done its last step"
    assert said in caplog.text and said in trainer.report.unrecovered and said in trainer.report.__rich__().caption
    assert trainer.report.removed >= 0.4
    whole = trainer_for(None, tmp_path, max_steps=20, keywords={"pruning": pruning}, kind=PruningTrainer)
    whole.train()
    assert whole.report.unrecovered is None


def test_the_last_checkpoint_without_state_is_the_finished_model(tmp_path):
    trainer = trainer_for(
        "quantization", tmp_path, save_strategy="steps", save_steps=2, save_only_model=True, max_steps=4
    )
    trainer.train()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4").eval()
    torch.testing.assert_close(outputs(reloaded), outputs(trainer.model.eval()), rtol=0, atol=0)
    assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text("utf-8"))["quantization_config"]["encoding"]


def test_saving_keeps_what_else_is_in_the_folder_and_replaces_all_weights(tmp_path):
    trainer = trainer_for("pruning", tmp_path, save_strategy="steps", save_steps=2)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    trainer.train()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    trainer.save_model()
    assert {"notes.txt", "checkpoint-2", "checkpoint-4", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(reloaded), outputs(trainer.model.eval()), rtol=0, atol=0)
    assert trainer.compressed_model.provenance.methods == ("pruning",)


def test_argument_classes_are_read_from_command_line_and_yaml(tmp_path):
    command = ["--output_dir", str(tmp_path), "--weight_bits", "2", "--use_cpu", "--max_steps", "2"]
    (args,) = HfArgumentParser(QuantizationArguments).parse_args_into_dataclasses(
        [*command, "--quantization", '{"scale_learning_rate": 0.002}']
    )
    trainer = QuantizationTrainer(make("bert"), args, train_dataset=rows())
    assert trainer.quantization.config.weights.bits == 2
    assert trainer.quantization.config.scale_learning_rate == 0.002
    file = tmp_path / "arguments.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nmax_steps: 2\nuse_cpu: true\ntarget_sparsity: 0.3\npruning: {{parts: [heads]}}\n",
        encoding="utf-8",
    )
    (args,) = HfArgumentParser(PruningArguments).parse_yaml_file(str(file))
    trainer = PruningTrainer(make("bert"), args, train_dataset=rows())
    assert trainer.pruning.config.parts == ("heads",) and trainer.pruning.config.target.sparsity == 0.3
    # a keyword comes first
    trainer = PruningTrainer(make("bert"), args, train_dataset=rows(), pruning=PRUNING)
    assert trainer.pruning.config is PRUNING


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, r"distillation.temperature: Input should be greater than 0, got -1"),
        ({"distillation": {"temprature": 2}}, "did you mean 'temperature'"),
        ({"distillation": "/nowhere.yaml"}, "distillation must be a JSON object, or a file of YAML or JSON"),
        ({"distillation": "{nonsense"}, "distillation must be a JSON object"),
        ({"temperature": 3.0, "distillation": {"temperature": 2.0}}, "temperature=3.0 contradicts the configuration"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(tmp_path, given, message):
    with pytest.raises(LmcompressError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **given)


@each_method
def test_a_model_whose_training_was_interrupted_is_not_saved_half_done(name, tmp_path):
    model = make("bert")
    trainer = trainer_for(name, tmp_path, model, callbacks=[Stops(2, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if any(not method.goes_on for method in trainer.methods):
        with pytest.raises(LmcompressError, match=r"is not finished: masks .* call trainer.finish\(\), or trainer.rel"):
            CompressedModel(model).save_pretrained(tmp_path / "m")
        assert not (tmp_path / "m").exists()
    trainer.release()
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0


@each_method
def test_a_new_trainer_takes_a_model_over_from_one_that_was_interrupted(name, tmp_path):
    answers = []
    for interrupted in (False, True):
        model = make("bert")
        state = copy.deepcopy(model.state_dict())
        if interrupted:
            stopped = trainer_for(name, tmp_path, model, callbacks=[Stops(2, KeyboardInterrupt())])
            with pytest.raises(KeyboardInterrupt):
                stopped.train()
            del stopped
            model.load_state_dict(state)
        trainer = trainer_for(name, tmp_path, model)
        trainer.train()
        # a packed model follows its padding
        assert name == "quantization" or hooks(model) == 0
        answers.append(outputs(model.eval()))
    torch.testing.assert_close(*answers, rtol=0, atol=0)
