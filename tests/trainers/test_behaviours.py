"""What Transformers' own tests ask of a ``Trainer``, asked of ours without and with methods."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make, outputs, set_dropout
from torch import nn
from training import rows, tiny_arguments
from transformers import BertTokenizerFast, EarlyStoppingCallback, Trainer, TrainerCallback

from lmcompress.distillation import DistillationConfig, Match
from lmcompress.pruning import Gradual, PruningConfig, Target
from lmcompress.pruning.unstructured import SparsityConfig
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.trainers import CompressionTrainer

FEATURES = DistillationConfig(matches=(Match(loss="hidden_mse", student=1, teacher=1, projection="linear"),))
METHODS: dict[str, Any] = {
    "none": dict,
    "distillation": lambda: {"teacher": make("bert", seed=1), "distillation": FEATURES},
    "pruning": lambda: {
        "pruning": PruningConfig(
            target=Target(sparsity=0.3), schedule=Gradual(begin=0.0, end=0.5, every=1), criterion="l1"
        )
    },
    "quantization": lambda: {"quantization": QuantizationConfig(weights=WeightScheme(bits=4), activations=None)},
    "sparsity": lambda: {"sparsity": SparsityConfig(sparsity=0.5, criterion="magnitude")},
}
every_method = pytest.mark.parametrize("name", list(METHODS))


def trainer_for(name: str, folder: Path, model: Any = None, callbacks: Any = None, kind: Any = None, **changes: Any):
    more = {key: changes.pop(key) for key in ("compute_metrics", "processing_class", "optimizers") if key in changes}
    model = make("bert") if model is None else model
    args = tiny_arguments(folder, **({"learning_rate": 1e-3, "max_steps": 6} | changes))
    kind = CompressionTrainer if kind is None else kind
    return kind(
        model, args, train_dataset=rows(21), eval_dataset=rows(9), callbacks=callbacks, **METHODS[name](), **more
    )


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@every_method
@pytest.mark.parametrize(
    ("changes", "steps", "epochs"),
    [
        # 21 rows in batches of 8: two whole ones and a short one
        ({"max_steps": -1, "num_train_epochs": 2}, 6, 2),
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, 4, 2),
        ({"max_steps": 4}, 4, 4 / 3),
        ({"max_steps": -1, "num_train_epochs": 3, "dataloader_drop_last": True}, 6, 3),
    ],
)
def test_steps_and_epochs_are_counted(name, tmp_path, changes, steps, epochs):
    trainer = trainer_for(name, tmp_path, **changes)
    output = trainer.train()
    assert trainer.state.global_step == output.global_step == steps == len(logged(trainer))
    assert trainer.state.epoch == pytest.approx(epochs, abs=0.01) and math.isfinite(output.training_loss)


@every_method
def test_the_same_seed_gives_the_same_model_and_arguments_are_untouched(name, tmp_path):
    answers = []
    for number in range(2):
        trainer = trainer_for(name, tmp_path / str(number))
        before = copy.deepcopy(trainer.args.to_dict())
        trainer.train()
        assert trainer.args.to_dict() == before
        answers.append(outputs(trainer.model.eval()))
    torch.testing.assert_close(*answers, rtol=0, atol=0)


@every_method
def test_evaluation_prediction_and_several_sets_agree(name, tmp_path):
    trainer = trainer_for(name, tmp_path)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(rows(9))
    assert predicted.metrics["test_loss"] == pytest.approx(loss, rel=1e-6) and predicted.predictions.shape == (9, 3)
    by_name = trainer.evaluate({"one": rows(9), "other": rows(5)})
    assert by_name["eval_one_loss"] == pytest.approx(loss, rel=1e-6) and "eval_other_loss" in by_name


@every_method
def test_losses_that_are_no_numbers_are_filtered_from_the_log(name, tmp_path):
    class Breaks(CompressionTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            return loss * (math.nan if self.state.global_step == 2 else 1)

    trainer = trainer_for(name, tmp_path, kind=Breaks, logging_nan_inf_filter=True)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer))


@every_method
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_optimizers_by_name_and_no_decay_of_biases_and_norms(name, tmp_path, optimizer):
    trainer = trainer_for(name, tmp_path, optim=optimizer, weight_decay=0.1, max_steps=3)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for module in trainer.student.modules():
        if isinstance(module, nn.LayerNorm):
            assert id(module.weight) not in decayed and id(module.bias) not in decayed
    assert decayed and all(group["weight_decay"] == 0 for group in groups[2:])
    trainer.train()
    assert len(logged(trainer)) == 3


@every_method
def test_frozen_parameters_stay(name, tmp_path):
    model = make("bert")
    model.bert.embeddings.requires_grad_(False)
    before = model.bert.embeddings.position_embeddings.weight.clone()
    trainer = trainer_for(name, tmp_path, model)
    trainer.train()
    table = model.bert.embeddings.position_embeddings
    after = table.weight if isinstance(getattr(table, "weight", None), nn.Parameter) else None
    if after is not None and after.dtype == before.dtype and name != "quantization":
        kept = before != 0 if name != "sparsity" else after != 0
        torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0)


@every_method
@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"bf16": True, "bf16_full_eval": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"neftune_noise_alpha": 1.0},
        {"include_num_input_tokens_seen": "all"},
        {"skip_memory_metrics": False},
        {"eval_accumulation_steps": 1},
        {"torch_empty_cache_steps": 1},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*should not be instantiated:DeprecationWarning")
def test_settings_of_a_training(name, tmp_path, changes):
    trainer = trainer_for(name, tmp_path, **changes)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer)) and len(logged(trainer)) == 6
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    if "neftune_noise_alpha" in changes:
        assert not trainer.model.get_input_embeddings()._forward_hooks


@every_method
def test_metrics_by_batch_and_at_once_are_the_same(name, tmp_path):
    class Accuracy:
        def __init__(self):
            self.right = self.seen = 0

        def __call__(self, prediction, compute_result=True):
            right = torch.as_tensor(prediction.predictions).argmax(-1) == torch.as_tensor(prediction.label_ids)
            self.right, self.seen = self.right + int(right.sum()), self.seen + len(right)
            found = {"accuracy": self.right / self.seen}
            if compute_result:
                self.right = self.seen = 0
            return found

    found = []
    for by_batch in (False, True):
        trainer = trainer_for(
            name, tmp_path / str(by_batch), batch_eval_metrics=by_batch, compute_metrics=Accuracy(),
            per_device_eval_batch_size=4,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.evaluate()["eval_accuracy"])
    assert found[0] == found[1]


@every_method
def test_checkpoints_rotate_and_the_best_is_kept(name, tmp_path):
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1])
    trainer = trainer_for(
        name, tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=lambda prediction: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    # pruning is as small as asked from step 4 on
    assert best == (4 if name == "pruning" else 3)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}


@every_method
def test_early_stopping_ends_with_a_finished_model(name, tmp_path):
    trainer = trainer_for(
        name, tmp_path, max_steps=20, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=lambda prediction: {"score": 0.5}, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 20 and trainer.finished
    trainer.save_model(str(tmp_path / "saved"))


@every_method
def test_the_tokenizer_is_saved_with_checkpoints_and_models(name, tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(59))]), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(words))
    trainer = trainer_for(
        name, tmp_path / "run", processing_class=tokenizer, save_strategy="steps", save_steps=3, max_steps=3
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "checkpoint-3", tmp_path / "saved"):
        assert (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@every_method
def test_an_interrupted_training_goes_on_to_the_same_model(name, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    whole = trainer_for(name, tmp_path / "whole", **saving)
    whole.train()
    broken = trainer_for(name, tmp_path / "run", callbacks=[Fails()], **saving)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_for(name, tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    torch.testing.assert_close(outputs(resumed.model.eval()), outputs(whole.model.eval()), rtol=0, atol=0)
    # the same trainer, in a notebook: interrupted, and called again
    broken.remove_callback(Fails)
    broken.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(outputs(broken.model.eval()), outputs(whole.model.eval()), rtol=0, atol=0)


@every_method
def test_a_resumed_run_may_have_another_batch_size_or_begin_anew(name, tmp_path):
    trainer = trainer_for(name, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    more = trainer_for(name, tmp_path / "more", per_device_train_batch_size=4, max_steps=8)
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert more.state.global_step == 8 and len(logged(more)) == 8
    anew = trainer_for(name, tmp_path / "anew", max_steps=2)
    anew.train(resume_from_checkpoint=False)
    assert anew.state.global_step == 2


@every_method
def test_training_is_that_of_trainer_where_a_method_adds_nothing(name, tmp_path):
    """Without methods the same weights, bit for bit; with one, losses on the labels of the same size."""
    stock_model, own_model = make("bert"), make("bert")
    for model in (stock_model, own_model):
        set_dropout(model, 0.0)
    args = tiny_arguments(tmp_path / "stock", learning_rate=1e-3, max_steps=6)
    stock = Trainer(stock_model, args, train_dataset=rows(21))
    stock.train()
    ours = trainer_for(name, tmp_path / "ours", own_model)
    ours.train()
    if name == "none":
        torch.testing.assert_close(own_model.state_dict(), stock_model.state_dict(), rtol=0, atol=0)
    assert logged(ours, "loss_label")[0] == pytest.approx(logged(stock)[0], rel=0.5)
    assert logged(ours, "learning_rate") == logged(stock, "learning_rate")
    assert all(norm > 0 for norm in logged(ours, "grad_norm"))
