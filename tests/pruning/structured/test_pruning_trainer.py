"""Training runs that prune: schedules, resuming, accumulation, distillation, and that nothing is a silent no-op."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, make, outputs, set_dropout
from torch import Tensor
from torch.utils.data import default_collate
from training import tiny_arguments
from transformers import TrainingArguments

from lmcompress import CheckpointError, CompressedModel, LmcompressError, anatomy_of
from lmcompress.checkpoint.saving import outputs_of
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.pruning.structured import method as method_module
from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.groups import unit_norms
from lmcompress.pruning.structured.masks import survivors
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.targets import Target
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot
from lmcompress.trainers import CompressionTrainer, PruningTrainer

HALF = Target(sparsity=0.5)
STEPS = 12
SCHEDULES = {
    "one_shot": PruningConfig(target=HALF, schedule=OneShot(begin=0.25)),
    "iterative": PruningConfig(target=HALF, schedule=Iterative(rounds=3), repair="least_squares"),
    "iterative-running": PruningConfig(target=HALF, schedule=Iterative(begin=0.2, rounds=3), scores="training"),
    "gradual": PruningConfig(target=HALF, schedule=Gradual(every=2), criterion="l2"),
    "gradual-movement": PruningConfig(
        target=HALF, schedule=Gradual(every=2), criterion="movement", scores="training", score_memory=1.0
    ),
    "iht": PruningConfig(target=HALF, schedule=HardThresholding(begin=0.1, end=0.7, cycles=2)),
    "hard_concrete": PruningConfig(
        target=HALF,
        parts=("heads", "neurons", "attention", "ffn", "hidden"),
        schedule=HardConcrete(learning_rate=0.3, multiplier_learning_rate=0.3),
    ),
    "movement": PruningConfig(target=HALF, schedule=Movement(learning_rate=0.3)),
    "group_lasso": PruningConfig(target=HALF, schedule=GroupLasso(penalty=20.0)),
}


def ragged_rows(causal: bool = False, rows: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(rows):
        ids = torch.randint(5, 60, (10,), generator=generator)
        mask = (torch.arange(10) < 3 + row % 6).long()
        labels = torch.where(mask.bool(), ids, -100) if causal else torch.randint(0, 3, (), generator=generator)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def arguments(tmp_path, **changes) -> TrainingArguments:
    adam = dict(max_steps=STEPS, learning_rate=1e-3, optim="adamw_torch", weight_decay=0.1, lr_scheduler_type="linear")
    return tiny_arguments(tmp_path, **(adam | changes))


def trainer_of(tmp_path, config, family="bert", head="classification", dropout=0.0, teacher=None, **given):
    changes = given.pop("changes", {})
    student = make(family, head, seed=1)
    set_dropout(student, dropout)
    rows = ragged_rows(head == "language")
    return PruningTrainer(
        student, arguments(tmp_path, **changes), pruning=config, teacher=teacher, train_dataset=rows, **given
    )


def block_parameters(model) -> int:
    return sum(p.numel() for p in anatomy_of(model).block_list.parameters())


def schedules(*names):
    """A parametrisation over schedules by name; all of them by default."""
    return pytest.mark.parametrize("config", [pytest.param(SCHEDULES[n], id=n) for n in names or SCHEDULES])


@schedules()
def test_every_schedule_meets_the_target_and_the_result_reloads(tmp_path, config):
    trainer = trainer_of(tmp_path, config, dropout=0.1)
    dense = block_parameters(trainer.student)
    trainer.train()
    masked = outputs(trainer.student.eval())
    trainer.finish()
    removed = 1 - block_parameters(trainer.student) / dense
    assert removed >= 0.5
    if config.schedule.kind != "group_lasso":
        # hidden dimensions are large pieces in a model this small
        assert removed < (0.62 if "hidden" in config.parts else 0.53)
    torch.testing.assert_close(outputs(trainer.student), masked, rtol=1e-4, atol=1e-5)
    assert trainer.report.masked_error < 1e-5 and trainer.report.removed == pytest.approx(removed, abs=0.01)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.student.modules())
    CompressedModel(trainer.student).save_pretrained(tmp_path / "final")
    again = CompressedModel.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(outputs(again.model.eval()), outputs(trainer.student), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["hard_concrete", "gradual-movement", "group_lasso"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_pruned(tmp_path, family, schedule):
    trainer = trainer_of(tmp_path, SCHEDULES[schedule], family.name)
    trainer.train()
    trainer.finish()
    assert trainer.report.removed >= 0.49


@schedules()
def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path, config):
    def make_trainer(folder, **changes):
        return trainer_of(tmp_path / folder, config, dropout=0.1, changes=changes)

    whole = make_trainer("whole")
    whole.train()
    # in the middle of the phase, and for some after the mask is final
    for killed_at in (5, 10) if config.schedule.kind in ("hard_concrete", "iht") else (5,):
        first = make_trainer(f"killed-{killed_at}", save_strategy="steps", save_steps=killed_at)

        class Killed(Exception):
            pass

        original = first.training_step

        def step(*args, first=first, original=original, killed_at=killed_at, **kwargs):
            if first.state.global_step == killed_at + 1:
                raise Killed
            return original(*args, **kwargs)

        first.training_step = step
        with pytest.raises(Killed):
            first.train()
        second = make_trainer(f"killed-{killed_at}", save_strategy="steps", save_steps=killed_at)
        second.train(resume_from_checkpoint=True)
        for name, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, second.student.state_dict()[name]), (killed_at, name)
        for name, tensor in whole.pruning.modules()["state"].state_dict().items():
            assert torch.equal(tensor, second.pruning.modules()["state"].state_dict()[name]), (killed_at, name)
    whole.finish()
    second.finish()
    assert whole.report.after == second.report.after


def test_resuming_with_another_pruning_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["one_shot"], changes=dict(save_strategy="steps", save_steps=4))
    trainer.train()
    other = trainer_of(
        tmp_path, SCHEDULES["one_shot"].model_copy(update={"parts": ("heads",), "target": Target(sparsity=0.1)})
    )
    with pytest.raises(CheckpointError, match="state of other methods"):
        other.train(resume_from_checkpoint=True)


@schedules("gradual", "iterative-running", "movement", "group_lasso", "iht")
def test_gradient_accumulation_does_not_change_the_run(tmp_path, config):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        changes = dict(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0.0
        )
        trainer = trainer_of(tmp_path, config, changes=changes)
        trainer.train()
        results.append(trainer)
    one, other = (trainer.pruning.modules()["state"].state_dict() for trainer in results)
    assert torch.equal(one["mask"], other["mask"])
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0].student.state_dict(), results[1].student.state_dict(), rtol=1e-3, atol=1e-5)


def test_schedules_advance_by_optimizer_steps_and_noise_by_micro_batches(tmp_path):
    trainer = trainer_of(
        tmp_path,
        SCHEDULES["hard_concrete"],
        changes=dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4),
    )
    seen: list[tuple[int, int, Tensor]] = []
    original = trainer.pruning.strategy.noise

    def noise():
        drawn = original()
        seen.append((trainer.pruning.run.step, trainer.pruning.run.micro, drawn))
        return drawn

    trainer.pruning.strategy.noise = noise
    trainer.train()
    # the phase ends after 0.7 of 4 steps
    assert [(step, micro) for step, micro, _ in seen] == [(s, m) for s in range(3) for m in range(4)]
    assert len({tuple(drawn.tolist()) for _, _, drawn in seen}) == len(seen)


def test_before_anything_is_pruned_the_run_is_the_one_without(tmp_path):
    config = SCHEDULES["one_shot"].model_copy(update={"schedule": OneShot(begin=0.99)})
    pruned = trainer_of(tmp_path, config, dropout=0.1, changes=dict(max_steps=5))
    pruned.train()
    plain_student = make("bert", seed=1)
    set_dropout(plain_student, 0.1)
    plain = CompressionTrainer(plain_student, arguments(tmp_path, max_steps=5), train_dataset=ragged_rows())
    plain.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (pruned, plain)]
    assert losses[0] == losses[1]


@schedules("one_shot", "iterative", "gradual-movement", "hard_concrete")
def test_what_is_gone_stays_at_zero_under_momentum_and_weight_decay(tmp_path, config):
    trainer = trainer_of(tmp_path, config, changes=dict(learning_rate=0.01), auto_finish=False)
    trainer.train()
    state = trainer.pruning.modules()["state"]
    mask = trainer.pruning.run.mask()
    parts = [part for part in ("heads", "neurons") if part in config.parts]
    norms = unit_norms(trainer.student, parts)
    gone = 0
    for part in parts:
        for kept, norm in zip(mask.tensors(part), norms.tensors(part), strict=True):
            assert not norm[~kept].any() and norm[kept].all()
            gone += int((~kept).sum())
    assert gone > 0 and torch.equal(state.values != 0, state.mask)


def test_hard_thresholding_brings_units_back_and_they_learn(tmp_path):
    config = PruningConfig(target=HALF, schedule=HardThresholding(begin=0.0, end=1.0, cycles=2, dense_share=0.5))
    trainer = trainer_of(tmp_path, config, changes=dict(learning_rate=0.02))
    history = []
    original = trainer.training_step

    def step(*args, **kwargs):
        norms = unit_norms(trainer.student, ["heads", "neurons"], ("out",))
        zeros = sum(int((norm == 0).sum()) for _, _, norm in norms.items())
        history.append((int((~trainer.pruning.modules()["state"].mask).sum()), zeros))
        return original(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    masked, zeros = zip(*history, strict=True)
    # twice: three steps pruned, three steps dense
    assert [m > 0 for m in masked] == ([True] * 3 + [False] * 3) * 2
    assert zeros[0] == zeros[2] == masked[0]
    assert zeros[3] == masked[0] and zeros[5] == 0, "they restart from zero and are trained"
    trainer.finish()
    assert trainer.report.removed >= 0.5


def test_group_lasso_reaches_exact_zeros_and_is_steered_to_the_target(tmp_path):
    config = PruningConfig(target=HALF, schedule=GroupLasso(penalty=5.0, end=0.9))
    trainer = trainer_of(
        tmp_path,
        config,
        changes=dict(max_steps=120, learning_rate=2e-3, logging_steps=10, lr_scheduler_type="constant"),
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "pruning_penalty" in row]
    penalties = [row["pruning_penalty"] for row in logs]
    assert len(set(penalties)) > 3
    # before the cut, in the last log of the phase
    assert 0.45 <= logs[-1]["pruning_removed"] < 0.65
    trainer.finish()
    assert trainer.report.removed >= 0.5


def test_the_lagrangian_brings_the_expected_sparsity_to_the_target(tmp_path):
    schedule = HardConcrete(learning_rate=0.1, multiplier_learning_rate=0.05, end=0.9, warmup=0.5)
    config = PruningConfig(
        target=Target(sparsity=0.6), parts=("heads", "neurons", "attention", "ffn"), schedule=schedule
    )
    trainer = trainer_of(tmp_path, config, changes=dict(max_steps=200, logging_steps=10))
    trainer.train()
    logs = [row for row in trainer.state.log_history if "pruning_lambda_1" in row]
    assert logs[-1]["pruning_removed"] == pytest.approx(0.6, abs=0.08)
    assert logs[-1]["pruning_target"] == pytest.approx(0.6)
    assert {"loss_label", "loss_sparsity"} <= logs[0].keys()
    trainer.finish()
    assert 0.6 <= trainer.report.removed < 0.65


def test_movement_closes_units_on_its_way(tmp_path):
    config = PruningConfig(target=HALF, schedule=Movement(learning_rate=0.1, end=0.9))
    trainer = trainer_of(tmp_path, config, changes=dict(max_steps=200, logging_steps=10))
    trainer.train()
    removed = [row["pruning_removed"] for row in trainer.state.log_history if "pruning_penalty" in row]
    assert removed[0] == 0 and removed[-1] == pytest.approx(0.5, abs=0.2)
    trainer.finish()


def test_gates_learn_at_their_own_constant_rate_without_decay_and_multipliers_ascend(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["hard_concrete"], auto_finish=False)
    trainer.train()
    state = trainer.pruning.modules()["state"]
    groups = {id(g["params"][0]): g for g in trainer.optimizer.param_groups}
    gates, multipliers = groups[id(state.learned)], groups[id(state.multipliers)]
    assert gates["weight_decay"] == multipliers["weight_decay"] == 0
    assert multipliers["maximize"] and not gates.get("maximize")
    assert not any("mask" in name or "learned" in name for name in trainer.student.state_dict())


def test_an_optimizer_that_cannot_ascend_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["hard_concrete"], changes=dict(optim="adafactor"))
    with pytest.raises(LmcompressError, match="must be able to ascend .* got Adafactor"):
        trainer.train()


def test_evaluation_sees_gates_without_noise_and_leaves_training_as_it_was(tmp_path):
    rows = ragged_rows()
    for name in ("hard_concrete", "movement", "gradual-movement"):
        final = []
        for every in (None, 2):
            changes = {} if every is None else dict(eval_strategy="steps", eval_steps=every)
            # no dropout: the loader of an evaluation draws from the generator that dropout draws from
            trainer = trainer_of(tmp_path, SCHEDULES[name], changes=changes, eval_dataset=rows[:5])
            trainer.train()
            final.append(trainer.student.state_dict())
            assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        for key, tensor in final[0].items():
            assert torch.equal(tensor, final[1][key]), (name, key)


@pytest.mark.parametrize("head, family", [("classification", "bert"), ("language", "gpt2")])
@pytest.mark.parametrize("name", ["hard_concrete", "gradual-movement"])
def test_distillation_and_labels_train_in_the_same_run(tmp_path, head, family, name):
    teacher = make(family, head, seed=1)
    config = SCHEDULES[name]
    trainer = trainer_of(
        tmp_path, config, family, head, teacher=teacher,
        distillation=DistillationConfig(
            matches=(
                Match(loss="hidden_mse", student="nearest", teacher=1),
                Match(loss="hidden_mse", student="nearest", teacher=3),
            )
        ),
        dropout=0.1,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history[0]
    assert {"loss_label", "loss_kd", "loss_hidden_mse_0", "loss_hidden_mse_1"} <= logs.keys()
    assert logs["loss_label"] > 0
    trainer.finish()
    assert trainer.report.removed >= 0.5


def test_a_teacher_without_more_keeps_the_labels(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["one_shot"], teacher=make("bert", seed=2))
    trainer.train()
    assert {"loss_label", "loss_kd"} <= trainer.state.log_history[0].keys()


def test_nearest_layers_are_in_order_and_among_those_that_are_left(tmp_path):
    config = PruningConfig(
        target=Target(sparsity=0.3), parts=("layers",), criterion="block_influence", schedule=OneShot(begin=0.5)
    )
    distillation = DistillationConfig(
        matches=tuple(Match(loss="hidden_mse", student="nearest", teacher=layer) for layer in (1, 3))
    )
    teacher = make("bert", seed=1)
    # the teacher's second block is the student's third: without order and pruning it would be chosen
    trainer = trainer_of(tmp_path, config, teacher=teacher, distillation=distillation)
    distiller = trainer.methods[1]
    chosen = []
    original = distiller.loss_terms

    def loss_terms(step):
        terms = original(step)
        chosen.append(([m.student[0][1] for m in distiller._parts], step.shared.get("surviving_layers")))
        return terms

    distiller.loss_terms = loss_terms
    trainer.train()
    # equal models: every layer is nearest to itself
    assert chosen[0] == ([1, 3], None)
    layers, left = chosen[-1]
    assert len(left) == 2 and layers == left


def test_nearest_is_for_hidden_states_of_one_layer(tmp_path):
    distillation = DistillationConfig(matches=(Match(loss="attention_mse", student="nearest", teacher=1, on="scores"),))
    with pytest.raises(LmcompressError, match="nearest is for hidden states"):
        trainer_of(tmp_path, SCHEDULES["one_shot"], teacher=make("bert", seed=2), distillation=distillation)


def test_a_projection_of_a_nearest_match_begins_as_the_identity(tmp_path):
    match = Match(loss="hidden_mse", student="nearest", teacher=2, projection="linear")
    trainer = trainer_of(
        tmp_path, SCHEDULES["one_shot"], teacher=make("bert", seed=2), distillation=DistillationConfig(matches=(match,))
    )
    (projection,) = trainer.methods[1].modules().values()
    assert torch.equal(projection.weight, torch.eye(16))


@pytest.mark.parametrize("name", ["hard_concrete", "movement", "iterative-running"])
def test_gate_arithmetic_is_float32_under_bf16(tmp_path, name):
    trainer = trainer_of(tmp_path, SCHEDULES[name], changes=dict(bf16=True))
    original = trainer.pruning.run.gates.set
    dtypes = set()

    def watch(values):
        dtypes.update(tensor.dtype for _, _, tensor in values.items())
        original(values)

    trainer.pruning.run.gates.set = watch
    trainer.train()
    assert dtypes == {torch.float32}
    trainer.finish()
    assert trainer.report.removed >= 0.5


# nothing is a silent no-op


def test_a_target_out_of_reach_is_refused_before_training(tmp_path):
    with pytest.raises(LmcompressError, match="no shape meets the target sparsity=0.99"):
        trainer_of(tmp_path, PruningConfig(target=Target(sparsity=0.99)))


def test_finish_before_training_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["one_shot"])
    with pytest.raises(LmcompressError, match=r"finish\(\) must come after train\(\)"):
        trainer.finish()
    with pytest.raises(LmcompressError, match=r"no report before finish\(\)"):
        _ = trainer.report


def test_a_mask_that_keeps_everything_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, SCHEDULES["one_shot"])
    keeping = lambda config, scores, *args, **kwargs: scores.map(lambda t: torch.ones(len(t), dtype=torch.bool))  # noqa: E731
    monkeypatch.setattr(method_module, "choose", keeping)
    with pytest.raises(LmcompressError, match="nothing was pruned, but the target is sparsity=0.5"):
        trainer.train()


def test_gates_that_did_not_learn_are_refused(tmp_path):
    config = SCHEDULES["hard_concrete"].model_copy(update={"schedule": HardConcrete(learning_rate=1e-30)})
    trainer = trainer_of(tmp_path, config)
    with pytest.raises(LmcompressError, match="scores of .* must differ"):
        trainer.train()


def test_a_run_that_stops_early_is_cut_to_the_target_all_the_same(tmp_path):
    trainer = trainer_of(tmp_path, SCHEDULES["gradual"])
    original = trainer.training_step

    def step(*args, **kwargs):
        if trainer.state.global_step == 2:
            trainer.control.should_training_stop = True
        return original(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    assert trainer.state.global_step < 6
    trainer.finish()
    assert 0.5 <= trainer.report.removed < 0.53


def test_what_is_missing_is_said(tmp_path):
    student = make("bert")
    with pytest.raises(LmcompressError, match="pruning must say what to prune"):
        PruningTrainer(student, arguments(tmp_path))
    with pytest.raises(LmcompressError, match="distillation needs a teacher, got none"):
        PruningTrainer(student, arguments(tmp_path), pruning=SCHEDULES["one_shot"], distillation=DistillationConfig())

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ragged_rows())

    with pytest.raises(LmcompressError, match="can be indexed, got Stream; pass calibration="):
        PruningTrainer(student, arguments(tmp_path), pruning=SCHEDULES["iterative"], train_dataset=Stream())


def test_given_calibration_batches_are_used(tmp_path):
    rows = ragged_rows()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    masks = []
    for calibration in (None, [batch]):
        trainer = trainer_of(tmp_path, SCHEDULES["one_shot"], calibration=calibration)
        trainer.train()
        masks.append(trainer.pruning.modules()["state"].mask)
    # the same rows, in other batches
    assert torch.equal(*masks)


@pytest.mark.parametrize("parts", [("heads", "neurons"), ("heads", "neurons", "hidden")], ids=len)
@pytest.mark.parametrize("criterion", ["taylor_gates", "fisher"])
def test_running_scores_are_those_of_the_gradients_at_a_standstill(tmp_path, criterion, parts):
    # with a learning rate of 0 the running mean of |gradient|, or of its square, is the calibration's on the same rows
    rows = ragged_rows(rows=16)
    schedule = Iterative(begin=0.5, end=0.9, rounds=1)
    config = PruningConfig(
        target=HALF, parts=parts, criterion=criterion, schedule=schedule, scores="training", score_memory=1.0
    )
    trainer = trainer_of(tmp_path, config, changes=dict(learning_rate=1e-12, max_steps=4, weight_decay=0.0))
    trainer.train()
    running = trainer.pruning.modules()["state"].scores
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    scores = score(make("bert", seed=1), criterion, parts, [batch])
    expected = trainer.pruning.run.layout.join(scores)
    ratio = running / expected
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.median())), rtol=1e-3, atol=0)


def test_the_method_works_beside_others_in_the_plain_trainer(tmp_path):
    student = make("bert", seed=1)
    method = StructuredPruning(SCHEDULES["gradual"])
    trainer = CompressionTrainer(student, arguments(tmp_path), methods=[method], train_dataset=ragged_rows())
    trainer.train()
    before = outputs_of(student, [ragged_batch()])
    trainer.finish()
    torch.testing.assert_close(outputs_of(student, [ragged_batch()]), before, rtol=1e-4, atol=1e-5)
    assert method.report is not None
    trainer.finish()


def ragged_batch() -> dict[str, Tensor]:
    rows = ragged_rows()
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("repair", ["bias", "least_squares_in_order"])
def test_repair_after_running_scores_takes_batches_of_another_size(tmp_path, repair):
    schedule = Iterative(begin=0.2, rounds=2)
    config = PruningConfig(target=HALF, schedule=schedule, scores="training", repair=repair, calibration_batch_size=5)
    trainer = trainer_of(tmp_path, config)
    trainer.train()
    trainer.finish()
    assert len(trainer.report.repaired) > 0 and all(
        r["error_after"] <= r["error_before"] for r in trainer.report.repaired
    )


def test_rows_without_labels_are_refused_before_training(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in ragged_rows()]
    config = PruningConfig(target=HALF, schedule=OneShot(begin=0.5))
    with pytest.raises(LmcompressError, match="fisher must have labels, the calibration rows have none"):
        PruningTrainer(make("bert"), arguments(tmp_path), pruning=config, train_dataset=rows)
    own = config.model_copy(update={"labels": "self"})
    PruningTrainer(make("bert"), arguments(tmp_path), pruning=own, train_dataset=rows)


def test_rows_that_cannot_be_had_are_refused_before_training(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ragged_rows())

    with pytest.raises(LmcompressError, match="must come from a training set that can be indexed, got Stream"):
        PruningTrainer(make("bert"), arguments(tmp_path), pruning=PruningConfig(target=HALF), train_dataset=Stream())
    by_weights = PruningConfig(target=HALF, criterion="l1")
    PruningTrainer(make("bert"), arguments(tmp_path), pruning=by_weights, train_dataset=Stream())


def test_what_a_collator_draws_for_calibration_does_not_depend_on_when(tmp_path):
    def noisy(rows):
        batch = default_collate(rows)
        return batch | {"input_ids": batch["input_ids"] + torch.randint(0, 3, batch["input_ids"].shape)}

    found = []
    for seed in (1, 2):
        trainer = trainer_of(tmp_path, PruningConfig(target=HALF), data_collator=noisy)
        trainer.pruning.run.calibration_data = None
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found.append(trainer.pruning.run.calibration()[0]["input_ids"])
        assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["hard_concrete", "movement"])
@pytest.mark.parametrize("drawn", [-6.0, 0.0, 3.0])
def test_the_blocks_that_are_open_are_those_of_the_whole_mask(tmp_path, name, drawn):
    parts = ("heads", "neurons", "attention", "ffn", "layers")
    method = trainer_of(tmp_path, SCHEDULES[name].model_copy(update={"parts": parts})).pruning
    run, strategy = method.run, method.strategy
    run.first, run.step, run.last = 0, STEPS, STEPS
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        run.state.learned.copy_(torch.randn(run.layout.size, generator=generator) + drawn)
    assert strategy.learning
    of_blocks, of_all = (survivors(mask, run.sizes.structure) for mask in (strategy.open_blocks(), strategy.mask()))
    assert of_blocks == of_all


def test_gates_are_set_once_for_a_whole_evaluation(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path, SCHEDULES["movement"], eval_dataset=ragged_rows(), changes={"per_device_eval_batch_size": 4}
    )
    method = trainer.pruning
    method.run.first, method.run.last = 0, STEPS
    calls = []
    monkeypatch.setattr(method.run.gates, "set", lambda values: calls.append(values))
    trainer.evaluate()
    assert len(calls) == 1
