"""What users of ``Trainer`` bring: losses, models, optimizers, callbacks and searches of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import make, outputs, set_dropout
from torch import nn
from torch.utils.data import IterableDataset
from training import rows, tiny_arguments
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from lmcompress import LmcompressError, UnknownFamilyError
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.pruning import Gradual, HardConcrete, Movement, PruningConfig, Target
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.students import by_shape
from lmcompress.trainers import CompressionTrainer, DistillationTrainer, PruningTrainer, QuantizationTrainer

FEATURES = DistillationConfig(matches=(Match(loss="hidden_mse", student=1, teacher=1, projection="linear"),))
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def still(*args: Any, **config: Any) -> Any:
    """A model without dropout, so that runs with other batches can be compared."""
    model = make(*args, **config)
    set_dropout(model, 0.0)
    return model


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def weighted(outputs, labels, num_items_in_batch=None):
    """A loss with class weights, normalized for the whole optimizer step."""
    loss = nn.functional.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def trained(kind, folder, model, batch=8, steps=3, **given):
    optimization = dict(optim="sgd", learning_rate=0.1, max_grad_norm=1e9)
    changes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, max_steps=steps)
    args = tiny_arguments(folder, **(optimization | changes | given.pop("changes", {})))
    trainer = kind(model, args, train_dataset=rows(), **given)
    trainer.train()
    return trainer


class Weighted(DistillationTrainer):
    """As examples of Transformers do it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Penalized(DistillationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 0.5 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Stock(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 0.5 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("given", [{"compute_loss_func": weighted}, {"changes": {"label_smoothing_factor": 0.3}}])
def test_losses_of_the_users_own_are_those_of_trainer(tmp_path, given):
    stock = trained(Trainer, tmp_path / "a", still("bert"), **copy.deepcopy(given))
    ours = trained(CompressionTrainer, tmp_path / "b", still("bert"), **copy.deepcopy(given))
    torch.testing.assert_close(logged(ours), logged(stock), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(ours.model.eval()), outputs(stock.model.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DistillationTrainer, Weighted, Penalized])
@pytest.mark.parametrize("given", [{}, {"compute_loss_func": weighted}, {"changes": {"label_smoothing_factor": 0.3}}])
def test_eight_times_one_is_one_times_eight_with_any_loss(tmp_path, kind, given):
    if kind is not DistillationTrainer and given:
        pytest.skip("a compute_loss of one's own decides by itself")
    runs = [
        trained(kind, tmp_path / str(batch), still("bert"), batch=batch, teacher=still("bert", seed=1), **given)
        for batch in (8, 2)
    ]
    for name in ("loss", "loss_label", "loss_kd"):
        torch.testing.assert_close(logged(runs[0], name), logged(runs[1], name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(runs[0].model.eval()), outputs(runs[1].model.eval()), rtol=1e-3, atol=1e-4)


def test_a_compute_loss_of_a_subclass_is_the_loss_on_the_labels_and_methods_add_theirs(tmp_path):
    teacher = still("bert", seed=1)
    plain = trained(DistillationTrainer, tmp_path / "a", still("bert"), teacher=teacher)
    own = trained(Weighted, tmp_path / "b", still("bert"), teacher=teacher)
    # the same function as the model's, so the same run
    torch.testing.assert_close(logged(own), logged(plain), rtol=1e-5, atol=1e-6)
    assert min(logged(own, "loss_kd")) > 0
    alone = trained(Stock, tmp_path / "c", still("bert"))
    config = DistillationConfig(weight=1e-9)
    more = trained(Penalized, tmp_path / "d", still("bert"), teacher=teacher, distillation=config)
    torch.testing.assert_close(logged(more), logged(alone), rtol=1e-4, atol=1e-5)
    assert own.evaluate(rows())["eval_loss"] > 0


def test_a_compute_loss_that_does_not_run_the_model_is_named(tmp_path):
    class Wrong(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.zeros((), requires_grad=True)

    with pytest.raises(LmcompressError, match="compute_loss of Wrong did not run the model"):
        trained(Wrong, tmp_path, still("bert"), teacher=still("bert", seed=1))


def test_smoothing_needs_classes(tmp_path):
    model = make("bert", num_labels=1)
    data = [row | {"labels": row["labels"].float()} for row in rows()]
    args = tiny_arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1)
    with pytest.raises(LmcompressError, match="label_smoothing_factor is for classes, got labels of float32"):
        CompressionTrainer(model, args, train_dataset=data).train()


def test_a_model_init_makes_a_new_student_and_new_methods_each_time(tmp_path):
    students = []

    def init():
        students.append(still("bert"))
        return students[-1]

    pruning = PruningConfig(target=Target(sparsity=0.3), schedule=Gradual(end=0.5, every=1))
    args = tiny_arguments(tmp_path, max_steps=6, learning_rate=1e-3)
    trainer = PruningTrainer(
        model_init=init, args=args, train_dataset=rows(), pruning=pruning, teacher=still("bert", seed=1)
    )
    answers = []
    for _ in range(2):
        trainer.train()
        assert trainer.model is trainer.student is students[-1] is trainer.compressed_model.model
        answers.append(outputs(trainer.model.eval()))
    assert len(students) == 3 and students[0] is not students[1]
    torch.testing.assert_close(*answers, rtol=0, atol=0)
    assert sum(len(m._forward_hooks) for m in students[0].modules()) == 0


def test_a_search_with_optuna(tmp_path):
    pytest.importorskip("optuna")
    args = tiny_arguments(tmp_path, max_steps=2, learning_rate=1e-3)
    trainer = QuantizationTrainer(
        model_init=lambda trial: still("bert"), args=args, train_dataset=rows(), eval_dataset=rows(),
        quantization=QuantizationConfig(weights=WeightScheme(bits=4)), teacher=still("bert", seed=1),
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        n_trials=3, backend="optuna", direction="minimize",
    )  # fmt: skip
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-2 and best.objective > 0


SCHEDULERS = {
    "linear": lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, 10),
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=12),
    "two in a row": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        [2],
    ),
}


@pytest.mark.parametrize("schedule", list(SCHEDULERS))
def test_parameters_of_methods_follow_a_schedule_of_the_users_own(tmp_path, schedule):
    student, teacher = by_shape(make("bert"), layers=2, hidden_size=8, num_heads=2).model, make("bert", seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    scheduler = SCHEDULERS[schedule](optimizer)
    rate = 5e-4
    match = Match(loss="hidden_mse", student=1, teacher=1, projection="linear", projection_learning_rate=rate)
    args = tiny_arguments(tmp_path, max_steps=6)
    seen: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            groups = optimizer.param_groups
            seen.append((groups[0]["lr"], groups[-1]["lr"]))

    trainer = DistillationTrainer(
        student, args, train_dataset=rows(), callbacks=[Watch()], optimizers=(optimizer, scheduler), teacher=teacher,
        distillation=DistillationConfig(matches=(match,)),
    )  # fmt: skip
    projection = next(iter(trainer.methods[0].modules().values()))
    before = copy.deepcopy(projection.state_dict())
    trainer.train()
    assert len(optimizer.param_groups) == 2 and len(seen) == 6
    ratio = rate / seen[0][0] * (seen[0][0] / optimizer.param_groups[0]["initial_lr"]) if seen[0][0] else None
    for first, last in seen:
        # the same share of its own rate
        assert last * optimizer.param_groups[0]["initial_lr"] == pytest.approx(
            first * optimizer.param_groups[-1]["initial_lr"], rel=1e-5
        )
    assert ratio is None or ratio > 0
    assert any(not torch.equal(before[key], value) for key, value in projection.state_dict().items())


@pytest.mark.parametrize("schedule", [HardConcrete(), Movement()])
def test_learned_gates_and_scales_train_with_an_optimizer_of_the_users_own(tmp_path, schedule):
    for given in (
        {"pruning": PruningConfig(target=Target(sparsity=0.3), schedule=schedule)},
        {"quantization": QuantizationConfig()},
    ):
        model = make("bert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        pair = optimizer, get_linear_schedule_with_warmup(optimizer, 0, 10)
        args = tiny_arguments(tmp_path, max_steps=8)
        CompressionTrainer(model, args, train_dataset=rows(), optimizers=pair, **given).train()


def test_callbacks_and_reports_see_what_methods_measure(tmp_path, monkeypatch):
    seen: list[dict[str, Any]] = []

    class Records(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    pruning = PruningConfig(target=Target(sparsity=0.3), schedule=Gradual(end=0.5, every=1))
    trainer = PruningTrainer(
        make("bert"), tiny_arguments(tmp_path, max_steps=4), train_dataset=rows(), callbacks=[Records()],
        pruning=pruning, quantization=QuantizationConfig(),
    )  # fmt: skip
    trainer.train()
    steps = [logs for logs in seen if "loss" in logs]
    assert len(steps) == 4
    for logs, history in zip(steps, trainer.state.log_history, strict=False):
        assert {"pruning_removed", "pruning_target", "quantization_codes_changed"} <= logs.keys() | {
            "quantization_codes_changed"
        }
        assert logs.items() <= (history | logs).items() and history["pruning_removed"] == logs["pruning_removed"]


def test_tuples_of_outputs_and_models_of_no_known_kind_train_as_with_trainer(tmp_path):
    class Bare(nn.Module):
        """No model of transformers: it returns a tuple."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(64, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.out(self.table(input_ids).mean(1))
            return (nn.functional.cross_entropy(logits, labels), logits) if labels is not None else (logits,)

    mobile = dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        embedding_size=8, intra_bottleneck_size=16, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def unknown():
        torch.manual_seed(0)
        return MobileBertForSequenceClassification(MobileBertConfig(**mobile))

    for number, made in enumerate((Bare, lambda: still("bert", return_dict=False), unknown)):
        stock = trained(Trainer, tmp_path / f"a{number}", made())
        ours = trained(CompressionTrainer, tmp_path / f"b{number}", made())
        torch.testing.assert_close(logged(ours), logged(stock), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.evaluate(rows())["eval_loss"], stock.evaluate(rows())["eval_loss"], rtol=1e-4, atol=1e-5
        )
        ours.save_model(str(tmp_path / f"saved{number}"))
        assert (tmp_path / f"saved{number}" / "model.safetensors").is_file()
    # it can be stored, and has no parts that are known
    with pytest.raises(UnknownFamilyError, match="does not know the model family 'mobilebert'"):
        _ = ours.compressed_model.structure


def test_a_headless_student_learns_hidden_states(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    student, teacher = BertModel(BertConfig(**sizes)), BertModel(BertConfig(**sizes))
    config = DistillationConfig(weight=0, label_weight=0, matches=(Match(loss="hidden_mse", student=1, teacher=2),))
    trainer = DistillationTrainer(
        student, tiny_arguments(tmp_path, max_steps=3), train_dataset=rows(labels=False), teacher=teacher,
        distillation=config,
    )  # fmt: skip
    trainer.train()
    assert len(logged(trainer, "loss_hidden_mse_0")) == 3
    trainer.save_model(str(tmp_path / "saved"))


def test_a_subclass_of_a_head_and_string_keys_of_labels(tmp_path):
    class Mine(BertForSequenceClassification):
        pass

    student = Mine(make("bert").config)
    teacher = make("bert", seed=1)
    teacher.config.id2label = {"0": "a", "1": "b", "2": "c"}
    student.config.id2label = {0: "a", 1: "b", 2: "c"}
    args = tiny_arguments(tmp_path, max_steps=2)
    trainer = DistillationTrainer(student, args, train_dataset=rows(), teacher=teacher)
    trainer.train()
    assert len(logged(trainer, "loss_kd")) == 2


def test_compiled_students_and_teachers_are_unwrapped(tmp_path):
    student, teacher = still("bert"), still("bert", seed=1)
    plain = trained(DistillationTrainer, tmp_path / "a", copy.deepcopy(student), teacher=teacher, distillation=FEATURES)
    compiled = trained(
        DistillationTrainer, tmp_path / "b", torch.compile(student, backend="eager"),
        teacher=torch.compile(teacher, backend="eager"), distillation=FEATURES,
    )  # fmt: skip
    assert compiled.model is student
    torch.testing.assert_close(logged(compiled), logged(plain), rtol=1e-5, atol=1e-6)


def test_a_batch_that_does_not_fit_is_made_smaller(tmp_path):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.train_batch_size > 4:
                raise RuntimeError("CUDA out of memory.")

    args = tiny_arguments(tmp_path, max_steps=4, auto_find_batch_size=True)
    trainer = PruningTrainer(
        make("bert"), args, train_dataset=rows(), callbacks=[Full()], teacher=make("bert", seed=1),
        pruning=PruningConfig(target=Target(sparsity=0.3), schedule=Gradual(end=0.5, every=1)),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.train_batch_size == 4 and trainer.finished and trainer.report.removed >= 0.3


def test_iterable_rows_and_evaluation_by_name(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from rows()

    trainer = DistillationTrainer(
        make("bert"), tiny_arguments(tmp_path, max_steps=4), train_dataset=Stream(),
        eval_dataset={"first": rows(9), "second": rows(5)}, teacher=make("bert", seed=1),
    )  # fmt: skip
    trainer.train()
    assert {"eval_first_loss", "eval_second_loss"} <= trainer.evaluate().keys()


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, None])
def test_activation_checkpoints_change_nothing(tmp_path, checkpointing):
    # renamed in transformers 5.2x
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    runs = []
    for on in (False, True):
        student = still("bert")
        changes = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": checkpointing} if on else {}
        args = tiny_arguments(tmp_path / str(on), max_steps=2, **changes)
        trainer = DistillationTrainer(
            student, args, train_dataset=rows(), teacher=still("bert", seed=1), distillation=FEATURES
        )
        trainer.train()
        runs.append(logged(trainer))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
class TestAdapters:
    """LoRA students."""

    def student(self, family="bert", head="classification", task="SEQ_CLS", targets=("query", "value")):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type=task, target_modules=list(targets), init_lora_weights="gaussian", fan_in_fan_out=family == "gpt2"
        )
        return peft.get_peft_model(still(family, head), config)

    def test_all_inputs_reach_the_model(self, tmp_path):
        student = self.student()
        seen: list[set[str]] = []
        student.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
        )
        data = [row | {"token_type_ids": torch.ones_like(row["input_ids"])} for row in rows()]
        args = tiny_arguments(tmp_path, max_steps=1, remove_unused_columns=False)
        trainer = CompressionTrainer(student, args, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        assert all("token_type_ids" in names for names in seen) and len(seen) > 1

    def test_a_language_model_counts_the_tokens_it_predicts(self, tmp_path):
        runs = []
        for batch in (8, 2):
            student = self.student("gpt2", "language", "CAUSAL_LM", ["c_attn"])
            data = [row | {"labels": row["input_ids"].clone()} for row in rows()]
            for number, row in enumerate(data):
                row["labels"][: number % 5] = -100
            args = tiny_arguments(
                tmp_path / str(batch), max_steps=3, per_device_train_batch_size=batch,
                gradient_accumulation_steps=8 // batch, optim="sgd", learning_rate=1.0, max_grad_norm=1e9,
            )  # fmt: skip
            trainer = CompressionTrainer(student, args, train_dataset=data)
            trainer.train()
            runs.append(torch.tensor([float(p.detach().double().sum()) for p in student.parameters()]))
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)

    def test_it_is_distilled_saved_and_merged(self, tmp_path):
        peft = pytest.importorskip("peft")
        student = self.student()
        trainer = trained(
            DistillationTrainer, tmp_path, student, teacher=still("bert", seed=1), distillation=FEATURES,
            changes={"learning_rate": 0.5},
        )  # fmt: skip
        assert len(logged(trainer, "loss_hidden_mse_0")) == 3
        trainer.save_model(str(tmp_path / "adapter"))
        loaded = peft.PeftModel.from_pretrained(still("bert"), tmp_path / "adapter")
        torch.testing.assert_close(outputs(loaded.eval()), outputs(student.eval()), rtol=0, atol=0)
        merged = student.merge_and_unload()
        torch.testing.assert_close(outputs(merged.eval()), outputs(loaded.eval()), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "given",
        [
            {"pruning": PruningConfig(target=Target(sparsity=0.3))},
            {"quantization": QuantizationConfig()},
        ],
    )
    def test_what_changes_shapes_or_codes_is_refused_before(self, tmp_path, given):
        student = self.student()
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(LmcompressError, match="merge_and_unload"):
            CompressionTrainer(student, tiny_arguments(tmp_path), train_dataset=rows(), **given)
        torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
