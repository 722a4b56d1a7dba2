"""Subclasses that override one method of ``Trainer``, wrappers in wrappers, interrupts in the midst of finishing."""

from __future__ import annotations

import copy

import pytest
import torch
from families import BY_NAME, make, outputs, set_dropout
from torch import nn
from torch.utils.data import default_collate
from training import rows, tiny_arguments
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification, BertForMultipleChoice, Trainer

from lmcompress import CompressedModel, LmcompressError
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.model import unwrapped
from lmcompress.pruning import OneShot, PruningConfig, Target
from lmcompress.pruning.unstructured import SparsityConfig
from lmcompress.quantization import QuantizationConfig
from lmcompress.trainers import (
    CompressionTrainer,
    DistillationTrainer,
    MultiTaskStudent,
    MultiTaskTrainer,
    QuantizationTrainer,
)

FEATURES = DistillationConfig(matches=(Match(loss="hidden_mse", student=1, teacher=1, projection="linear"),))
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def weighted(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """As examples of Transformers do it."""
    labels = inputs.pop("labels")
    answer = model(**inputs)
    loss = nn.functional.cross_entropy(answer.logits, labels, weight=CLASS_WEIGHTS)
    return (loss, answer) if return_outputs else loss


class Penalized:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, answer = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.5 * answer.logits.square().mean()
        return (loss, answer) if return_outputs else loss


@pytest.mark.parametrize("above", [type("Weighted", (), {"compute_loss": weighted}), Penalized])
def test_evaluation_measures_the_loss_of_a_subclass_as_trainer_does(tmp_path, above):
    """The best model would be chosen by another loss than the one that is trained."""
    stock = type("Stock", (above, Trainer), {})(make("bert"), tiny_arguments(tmp_path), eval_dataset=rows())
    own = type("Own", (above, DistillationTrainer), {})(
        make("bert"), tiny_arguments(tmp_path, max_steps=1, learning_rate=0.0), train_dataset=rows(),
        eval_dataset=rows(), teacher=make("bert", seed=1),
    )  # fmt: skip
    plain = Trainer(make("bert"), tiny_arguments(tmp_path), eval_dataset=rows()).evaluate()["eval_loss"]
    wanted = stock.evaluate()["eval_loss"]
    assert abs(wanted - plain) > 1e-2
    assert own.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    own.train()
    assert own.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-6)


def gradient_descent(self, model=None):
    self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
    return self.optimizer


def none_returned(self, model=None):
    gradient_descent(self)


@pytest.mark.parametrize("function", [gradient_descent, none_returned])
def test_a_create_optimizer_of_a_subclass_trains_what_methods_have_too(tmp_path, function):
    """Projections and scales would stay as they began, and nobody would be told."""
    kind = type("Own", (CompressionTrainer,), {"create_optimizer": function})
    trainer = kind(
        make("bert"), tiny_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), train_dataset=rows(),
        teacher=make("bert", seed=1), distillation=FEATURES,
    )  # fmt: skip
    (projection,) = trainer.methods[0].modules().values()
    before = copy.deepcopy(projection.state_dict())
    for groups in (2, 2):
        trainer.train()
        assert len(trainer.optimizer.param_groups) == groups
    after = projection.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_adapters_on_a_compressed_model_train_like_those_on_the_inner_one(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    found = []
    for wrap in (CompressedModel, lambda model: model):
        models = []
        for seed in (0, 1):
            model = make("bert", seed=seed)
            set_dropout(model, 0.0)
            torch.manual_seed(seed)
            models.append(peft.get_peft_model(wrap(model), config))
        student, teacher = models
        args = tiny_arguments(tmp_path, max_steps=2, learning_rate=0.1, optim="sgd")
        DistillationTrainer(student, args, train_dataset=rows(), teacher=teacher, distillation=FEATURES).train()
        assert type(student.get_base_model()) is type(teacher.get_base_model()) is type(model)
        found.append(outputs(student.eval()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_compressed_model_inside_of_other_modules_is_unwrapped():
    model = make("bert")
    assert unwrapped(model) is model and unwrapped(CompressedModel(model)) is model and unwrapped("text") == "text"
    outer = nn.Sequential(nn.Sequential(CompressedModel(model)), nn.Identity())
    assert unwrapped(outer) is outer and outer[0][0] is model and type(outer[0][0]) is type(model)


def test_saving_as_the_examples_of_accelerate_do(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(CompressedModel(make("bert")))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "model",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
        variant=None,
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=0)
    with pytest.raises(LmcompressError, match="does not take variant='fp16'"):
        model.save_pretrained(tmp_path / "other", variant="fp16")


@pytest.mark.parametrize(
    ("student", "given", "message"),
    [
        ("bert-base-uncased", {}, "the student must be a model, got str; load the model with AutoModelFor"),
        (None, {"quantization": {"weights": {"bits": 4}}}, "quantization must be a QuantizationConfig, got dict"),
        (None, {"pruning": SparsityConfig(sparsity=0.5)}, "pruning must be a PruningConfig, got SparsityConfig"),
        (
            None,
            {"teacher": {"a": 1}},
            "a teacher must be a PreTrainedModel, or a source.*got dict",
        ),
        (None, {"teacher": [None]}, "a teacher must be a PreTrainedModel.*got NoneType"),
        (None, {"teacher": "bert-base"}, "a teacher must be a PreTrainedModel.*got str; load a path with load_teacher"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(tmp_path, student, given, message):
    with pytest.raises(LmcompressError, match=message):
        CompressionTrainer(student or make("bert"), tiny_arguments(tmp_path), train_dataset=rows(), **given)


class Interrupted:
    """Calls a function and is interrupted after it, the first time."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self):
        self.function()
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "given",
    [
        {"pruning": PruningConfig(target=Target(sparsity=0.3), schedule=OneShot())},
        {"quantization": QuantizationConfig()},
    ],
    ids=["pruning", "quantization"],
)
def test_an_interrupt_in_finish_lets_it_be_finished_and_not_trained(tmp_path, given):
    runs = []
    for interrupted in (False, True):
        args = tiny_arguments(tmp_path / "run", max_steps=2)
        trainer = CompressionTrainer(make("bert"), args, train_dataset=rows(), **given)
        if interrupted:
            trainer.methods[0].finish = Interrupted(trainer.methods[0].finish)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            with pytest.raises(LmcompressError, match=r"was interrupted in finish\(\), the model may be cut or packed"):
                trainer.train()
            with pytest.raises(LmcompressError, match="is not finished"):
                trainer.save_model(str(tmp_path / "early"))
            trainer.finish()
        else:
            trainer.train()
        runs.append(outputs(trainer.model.eval()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(outputs(loaded), runs[1], rtol=0, atol=0)


def test_multiple_choice_is_quantized_and_saved(tmp_path):
    """Its rows are choices, also those of the random batches that saving compares on."""
    model = BertForMultipleChoice(BY_NAME["bert"].make_config()).eval()
    CompressedModel(model).save_pretrained(tmp_path / "dense")
    data = [
        {"input_ids": torch.stack([row["input_ids"], row["input_ids"].flip(0)]), "labels": row["labels"] % 2}
        for row in rows()
    ]
    args = tiny_arguments(tmp_path / "run", max_steps=2)
    trainer = QuantizationTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForMultipleChoice.from_pretrained(tmp_path / "model").eval()
    batch = torch.stack([row["input_ids"] for row in data])
    torch.testing.assert_close(loaded(batch).logits, trainer.model.eval()(batch).logits, rtol=0, atol=0)


def test_a_file_is_no_folder_to_save_in(tmp_path):
    trainer = CompressionTrainer(make("bert"), tiny_arguments(tmp_path / "run"), train_dataset=rows())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(LmcompressError, match="file must be a folder to save a model in, it is a file"):
        trainer.save_model(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


def test_the_best_of_several_tasks_is_loaded(tmp_path):
    """Evaluation is the user's; the best checkpoint has a folder for each task."""
    losses, seen = iter([3.0, 1.0, 2.0, 2.0]), []

    class Evaluated(MultiTaskTrainer):
        def evaluate(self, *args, **kwargs):
            seen.append(copy.deepcopy(self.student.state_dict()))
            return {"eval_loss": next(losses)}

    args = tiny_arguments(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, learning_rate=0.01,
    )  # fmt: skip
    tasks = ("a", "b")
    trainer = Evaluated(
        MultiTaskStudent({task: make("bert", seed=seed) for seed, task in enumerate(tasks)}), args,
        train_datasets=dict.fromkeys(tasks, rows()), collators=dict.fromkeys(tasks, default_collate), eval_dataset=[0],
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(trainer.student.state_dict(), seen[1], rtol=0, atol=0)
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
