"""Training runs that make weights zero: schedules, surgery, resuming, and other methods in the same run."""

from __future__ import annotations

import copy

import pytest
import torch
from families import inputs, make, outputs, set_dropout
from nets import convolutional, mlp, rows
from torch.utils.data import default_collate
from training import tiny_arguments

from lmcompress import CheckpointError, LmcompressError
from lmcompress.distillation import DistillationConfig
from lmcompress.pruning import OneShot, PruningConfig, StructuredPruning, Target
from lmcompress.pruning.unstructured import (
    Gradual,
    HardThresholding,
    Iterative,
    NOfM,
    Sparsity,
    SparsityConfig,
    SparsityRule,
    Surgery,
)
from lmcompress.quantization import Quantization, QuantizationConfig
from lmcompress.trainers import CompressionTrainer, SparsityTrainer

STEPS = 16

CONFIGS = {
    "one-shot": SparsityConfig(sparsity=0.5, schedule=OneShot(begin=0.25)),
    "iterative": SparsityConfig(sparsity=0.7, schedule=Iterative(rounds=3, end=0.6)),
    "iterative-taylor": SparsityConfig(
        sparsity=0.7, criterion="taylor", schedule=Iterative(rounds=3, end=0.6), calibration_rows=8
    ),
    "quality": SparsityConfig(quality=0.7, schedule=Iterative(rounds=2, end=0.5)),
    "gradual": SparsityConfig(sparsity=0.8, schedule=Gradual(every=2, end=0.7)),
    "gradual-regrown": SparsityConfig(sparsity=0.8, schedule=Gradual(every=2, end=0.7), train_removed=True),
    "movement": SparsityConfig(sparsity=0.6, criterion="movement", schedule=Gradual(every=2, end=0.7)),
    "surgery": SparsityConfig(sparsity=0.8, schedule=Surgery(end=0.7)),
    "surgery-global": SparsityConfig(sparsity=0.8, scope="global", schedule=Surgery(end=0.7, gamma=0.1)),
    "surgery-quality": SparsityConfig(quality=0.3, schedule=Surgery(end=0.7)),
    "iht": SparsityConfig(sparsity=0.6, schedule=HardThresholding(begin=0.1, end=0.8, cycles=2)),
    "iht-wanda": SparsityConfig(
        sparsity=0.6,
        criterion="wanda",
        scope="layer",
        calibration_rows=8,
        schedule=HardThresholding(begin=0.1, end=0.8, cycles=2),
    ),
    "n-of-m": SparsityConfig(
        pattern=NOfM(n=1, m=4), schedule=Gradual(every=2, end=0.7), rules=(SparsityRule(modules="layers.10"),)
    ),
    "sparsegpt": SparsityConfig(
        sparsity=0.5, criterion="sparsegpt", compensation=True, schedule=Iterative(rounds=2, end=0.5)
    ),
}


def trainer_of(folder, config, net=None, **given):
    changes = dict(
        max_steps=STEPS, learning_rate=1e-2, optim="adamw_torch", weight_decay=0.01, remove_unused_columns=False
    )
    net = mlp() if net is None else net
    args = tiny_arguments(folder, **(changes | given.pop("changes", {})))
    return SparsityTrainer(net, args, sparsity=config, train_dataset=rows(48), data_collator=default_collate, **given)


def config_for(name):
    config = CONFIGS[name]
    return config.model_copy(update={"rules": ()}) if name == "n-of-m" else config


def weights(net):
    return [p for p in net.parameters() if p.dim() > 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_ends_with_the_zeros_that_were_asked_for_and_learns(tmp_path, name):
    config = config_for(name)
    trainer = trainer_of(tmp_path, config)
    trainer.train()
    trained = copy.deepcopy(trainer.student.state_dict())
    trainer.finish()
    for key, tensor in trainer.student.state_dict().items():
        assert torch.equal(tensor, trained[key]), "the model that was trained is the one that is finished"
    report = trainer.report
    if config.sparsity is not None:
        assert report.sparsity == pytest.approx(config.sparsity, abs=0.01)
    elif config.quality is None:
        assert report.sparsity == 0.75
    else:
        assert 0.2 < report.sparsity < 0.9
    for row, weight in zip(report.matrices, weights(trainer.student), strict=True):
        assert row.zeros == int((weight == 0).sum())
        assert not bool((torch.signbit(weight) & (weight == 0)).any())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["sparsity"] == pytest.approx(report.sparsity, abs=0.01)
    if config.schedule.kind != "iht" and not config.removed_is_trained:
        assert [row["sparsity"] for row in logs] == sorted(row["sparsity"] for row in logs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path, name):
    config = config_for(name)
    whole = trainer_of(tmp_path / "whole", config)
    whole.train()
    whole.finish()
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_of(tmp_path / "killed", config, changes=saving)

    class Killed(Exception):
        pass

    def kill(*args, **kwargs):
        raise Killed

    original = first.training_step
    first.training_step = lambda *a, **k: kill() if first.state.global_step == 8 else original(*a, **k)
    with pytest.raises(Killed):
        first.train()
    second = trainer_of(tmp_path / "killed", config, changes=saving)
    second.train(resume_from_checkpoint=True)
    second.finish()
    for (key, one), two in zip(whole.student.state_dict().items(), second.student.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    assert whole.report.matrices == second.report.matrices


def test_what_is_gone_for_good_is_not_moved_and_does_not_count_in_clipping(tmp_path):
    # a network that has only the weights that stay is trained as the masked one, to the bit of its rounding
    net = mlp()
    config = SparsityConfig(rules=(SparsityRule(modules="layers.0", sparsity=0.5),))
    with torch.no_grad():
        # what is least is a whole half of the inputs
        net.layers[0].weight[:, 6:] *= 1e-6
    narrow = copy.deepcopy(net)
    narrow.layers[0] = torch.nn.Linear(6, 16)
    narrow.layers[0].weight.data, narrow.layers[0].bias = net.layers[0].weight.data[:, :6].clone(), net.layers[0].bias
    narrow = copy.deepcopy(narrow)
    changes = {"max_grad_norm": 0.1, "optim": "sgd", "learning_rate": 0.5}
    trainer_of(tmp_path, config, net, changes=changes).train()
    halved = [dict(row, pixel_values=row["pixel_values"][:6]) for row in rows(48)]
    args = tiny_arguments(tmp_path, max_steps=STEPS, remove_unused_columns=False, weight_decay=0.01, **changes)
    CompressionTrainer(narrow, args, train_dataset=halved, data_collator=default_collate).train()
    assert (net.layers[0].weight[:, 6:] == 0).all()
    torch.testing.assert_close(net.layers[0].weight[:, :6], narrow.layers[0].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.layers[2].weight, narrow.layers[2].weight, rtol=1e-4, atol=1e-5)


def test_surgery_follows_the_equations_of_the_paper(tmp_path):
    # plain SGD by hand: W - rate * dL/d(W * T) for all W, then the two thresholds
    config = SparsityConfig(quality=0.2, schedule=Surgery(begin=0.0, end=1.0, gamma=0.0))
    net = mlp()
    by_hand = copy.deepcopy(net)
    changes = {"optim": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "lr_scheduler_type": "constant",
               "max_grad_norm": 0.0, "max_steps": 6, "per_device_train_batch_size": 48}  # fmt: skip
    trainer = trainer_of(tmp_path, config, net, changes=changes)
    trainer.train()
    batch = default_collate(rows(48))
    dense = [w.detach().clone() for w in weights(by_hand)]
    masks = [torch.ones_like(w) for w in dense]
    limits = [w.abs().mean() + 0.2 * w.abs().std(correction=0) for w in dense]
    spliced = 0
    for _ in range(6):
        for w, d, m in zip(weights(by_hand), dense, masks, strict=True):
            w.data = d * m
        by_hand.zero_grad()
        by_hand(**batch)["loss"].backward()
        for p in by_hand.parameters():
            if p.dim() == 1:
                p.data -= 0.3 * p.grad
        for i, w in enumerate(weights(by_hand)):
            dense[i] = dense[i] - 0.3 * w.grad
            new = torch.where(dense[i].abs() < 0.9 * limits[i], 0.0, masks[i])
            new = torch.where(dense[i].abs() >= 1.1 * limits[i], 1.0, new)
            spliced += int(((new == 1) & (masks[i] == 0)).sum())
            masks[i] = new
    assert spliced > 0, "the test must see weights come back"
    for w, d, m in zip(weights(net), dense, masks, strict=True):
        torch.testing.assert_close(w.detach(), d * m, rtol=1e-4, atol=1e-5)


# by wanda some units end without any weight, and do not fire again
@pytest.mark.parametrize("name, back", [("iht", 0.4), ("iht-wanda", 0.3)])
def test_hard_thresholding_restarts_from_zero_and_trains_all(tmp_path, name, back):
    config = CONFIGS[name]
    seen = []
    trainer = trainer_of(tmp_path, config)
    method = trainer.sparsity
    advance = method.advance

    def watching(step):
        advance(step)
        seen.append(float((trainer.student.layers[0].weight == 0).float().mean()))

    method.advance = watching
    trainer.train()
    # dense, then pruned, dense again after a step, pruned
    assert seen[0] == 0 and max(seen) == pytest.approx(0.6, abs=0.01)
    drops = [b - a for a, b in zip(seen, seen[1:], strict=False)]
    assert min(drops) < -back and seen[-1] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("name", ["gradual", "surgery"])
@pytest.mark.parametrize("family_name, head", [("gpt2", "language"), ("bert", "classification")])
def test_a_student_is_made_sparse_while_it_learns_from_its_teacher(tmp_path, family_name, head, name):
    student, teacher = make(family_name, head, seed=1), make(family_name, head, seed=1)
    set_dropout(student, 0.1)
    args = tiny_arguments(tmp_path, max_steps=10, learning_rate=1e-3)
    examples = [{k: v[0] for k, v in inputs(student, rows=1, seed=i).items()} for i in range(16)]
    for number, row in enumerate(examples):
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        row["labels"] = row["input_ids"] if head == "language" else torch.tensor(number % 3)
    trainer = SparsityTrainer(
        student,
        args,
        sparsity=CONFIGS[name],
        teacher=teacher,
        distillation=DistillationConfig(temperature=1.0),
        train_dataset=examples,
    )
    trainer.train()
    trainer.finish()
    assert trainer.report.sparsity == pytest.approx(0.8, abs=0.01)
    assert any("loss_kd" in row for row in trainer.state.log_history)
    if head == "language":
        assert student.lm_head.weight is student.transformer.wte.weight
    student.save_pretrained(tmp_path / "final")
    again = type(student).from_pretrained(tmp_path / "final")
    assert torch.equal(outputs(again), outputs(student.eval()))


def examples_for(student, count=16):
    made = [{k: v[0] for k, v in inputs(student, rows=1, seed=i).items()} for i in range(count)]
    for number, row in enumerate(made):
        row["attention_mask"], row["labels"] = torch.ones_like(row["input_ids"]), torch.tensor(number % 3)
    return made


@pytest.mark.parametrize("name", ["gradual", "surgery"])
@pytest.mark.parametrize("first", [True, False], ids=["sparsity-first", "pruning-first"])
def test_with_structured_pruning_the_model_is_masked_and_then_cut(tmp_path, name, first):
    student = make("bert", seed=1)
    sparsity = Sparsity(CONFIGS[name])
    pruning = StructuredPruning(PruningConfig(target=Target(sparsity=0.3), criterion="l1", schedule=OneShot(begin=0.3)))
    methods = [sparsity, pruning] if first else [pruning, sparsity]
    args = tiny_arguments(tmp_path, max_steps=10, learning_rate=1e-3)
    trainer = CompressionTrainer(student, args, methods=methods, train_dataset=examples_for(student))
    trainer.train()
    masked = outputs(student.eval())
    trainer.finish()
    torch.testing.assert_close(outputs(student), masked, rtol=1e-4, atol=1e-5)
    assert sparsity.report.sparsity == pytest.approx(0.8, abs=0.01)
    width = student.bert.encoder.layer[0].intermediate.dense.weight
    assert width.shape[0] < 24 or student.bert.encoder.layer[0].attention.self.query.weight.shape[0] < 16
    assert 0.2 < float((width == 0).float().mean()) < 1


@pytest.mark.parametrize("name", ["gradual", "surgery"])
@pytest.mark.parametrize("first", [True, False], ids=["sparsity-first", "quantization-first"])
def test_with_quantization_what_is_packed_is_sparse(tmp_path, name, first):
    student = make("bert", seed=1)
    sparsity, quantization = Sparsity(CONFIGS[name]), Quantization(QuantizationConfig())
    args = tiny_arguments(tmp_path, max_steps=10, learning_rate=1e-3)
    methods = [sparsity, quantization] if first else [quantization, sparsity]
    trainer = CompressionTrainer(student, args, methods=methods, train_dataset=examples_for(student))
    trainer.train()
    trainer.finish()
    assert sparsity.report.sparsity == pytest.approx(0.8, abs=0.01)
    packed = student.bert.encoder.layer[0].intermediate.dense
    assert float((packed.dequantized() == 0).float().mean()) >= 0.79


def test_convolutions_are_pruned_by_rules_of_their_own(tmp_path):
    net = convolutional()
    config = SparsityConfig(
        sparsity=0.9, rules=(SparsityRule(modules="layers.[03]", sparsity=0.5),), schedule=Gradual(every=2)
    )
    args = tiny_arguments(tmp_path, max_steps=STEPS, remove_unused_columns=False)
    trainer = SparsityTrainer(
        net, args, sparsity=config, train_dataset=rows(24, image=True), data_collator=default_collate
    )
    trainer.train()
    trainer.finish()
    assert [round(row.sparsity, 1) for row in trainer.report.matrices] == [0.5, 0.5, 0.9, 0.9]


def test_a_run_that_stops_early_is_finished_all_the_same(tmp_path):
    for name in ("gradual", "surgery", "iht", "movement"):
        trainer = trainer_of(tmp_path, CONFIGS[name])
        original = trainer.training_step

        def step(*args, trainer=trainer, original=original, **kwargs):
            trainer.control.should_training_stop = trainer.state.global_step == 5
            return original(*args, **kwargs)

        trainer.training_step = step
        trainer.train()
        assert trainer.state.global_step < STEPS
        trainer.finish()
        assert trainer.report.sparsity == pytest.approx(CONFIGS[name].sparsity, abs=0.01)


def test_what_cannot_be_trained_is_refused_before(tmp_path):
    with pytest.raises(LmcompressError, match="sparsity must give the share to prune, got None"):
        trainer_of(tmp_path, None)
    with pytest.raises(LmcompressError, match="distillation needs a teacher"):
        trainer_of(tmp_path, CONFIGS["gradual"], distillation=DistillationConfig())
    with pytest.raises(LmcompressError, match="finish.. must come after train"):
        trainer_of(tmp_path, CONFIGS["gradual"]).finish()
    with pytest.raises(LmcompressError, match="there is no report before finish"):
        _ = trainer_of(tmp_path, CONFIGS["gradual"]).report
    with pytest.raises(LmcompressError, match="movement must see some steps before weights are pruned"):
        trainer_of(tmp_path, SparsityConfig(sparsity=0.5, criterion="movement")).train()
    with pytest.raises(LmcompressError, match="surgery must have optimizer steps between begin and end, got 0 of 16"):
        trainer_of(tmp_path, SparsityConfig(sparsity=0.5, schedule=Surgery(end=0.01))).train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer_of(tmp_path, CONFIGS["gradual"], changes={"save_strategy": "steps", "save_steps": 8}).train()
    with pytest.raises(CheckpointError, match="holds the state of other methods"):
        trainer_of(tmp_path, CONFIGS["surgery"]).train(resume_from_checkpoint=True)
