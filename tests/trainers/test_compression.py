"""The training loop: denominators, logging, checkpoints, and that nothing changes where nothing is asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import make, set_dropout
from ragged import ALL_UNITS, arguments, ragged_rows
from torch import Tensor
from transformers import Trainer

from lmcompress import CheckpointError, CompressedModel, LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig, Match
from lmcompress.method import Method, Step, Term
from lmcompress.trainers import CompressionTrainer, DistillationTrainer


def student_and_teacher(kind: str):
    if kind == "causal":
        models = [make("gpt2", "language", seed=seed) for seed in (1, 2)]
    else:
        labels = {"num_labels": 1} if kind == "regression" else {}
        models = [make("bert", "classification", seed=seed, **labels) for seed in (1, 2)]
    for model in models:
        set_dropout(model, 0.0)
    return models


@pytest.mark.parametrize("kind", ["classification", "regression", "causal"])
@pytest.mark.parametrize("soft", [0.0, 1.0], ids=["labels-only", "all-terms"])
def test_gradient_accumulation_does_not_change_the_step(tmp_path, kind, soft):
    trained, logged = [], []
    for batch_size, accumulation in [(8, 1), (1, 8)]:
        student, teacher = student_and_teacher(kind)
        args = arguments(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        config = DistillationConfig(weight=soft, matches=ALL_UNITS if soft else (), chunk_tokens=3)
        trainer = DistillationTrainer(
            student, args, teacher=teacher, distillation=config, train_dataset=ragged_rows(kind)
        )
        trainer.train()
        trained.append(student.state_dict())
        logged.append({k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss")})
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_without_methods_it_trains_as_trainer_does(tmp_path, kind):
    trained = []
    for cls in (Trainer, CompressionTrainer):
        student, _ = student_and_teacher(kind)
        cls(student, arguments(tmp_path), train_dataset=ragged_rows(kind)).train()
        trained.append(student.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


@pytest.mark.parametrize("method", [(), "distillation with weight 0"], ids=["plain", "weight-0"])
def test_a_language_model_is_trained_on_the_mean_over_predicted_tokens(tmp_path, method):
    # stock Trainer (5.23) divides GPT-2's loss by the labels before the shift, so it is no reference here
    rows = ragged_rows("causal", rows=8)
    student, teacher = student_and_teacher("causal")
    if method:
        DistillationTrainer(
            student,
            arguments(tmp_path),
            teacher=teacher,
            distillation=DistillationConfig(weight=0.0, chunk_tokens=5),
            train_dataset=rows,
        ).train()
    else:
        CompressionTrainer(student, arguments(tmp_path), train_dataset=rows).train()
    plain, _ = student_and_teacher("causal")
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(2):
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, student.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_every_term_is_logged_by_name_with_its_share_of_the_gradient(tmp_path):
    student, teacher = student_and_teacher("classification")
    config = DistillationConfig(matches=ALL_UNITS)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        teacher=teacher,
        distillation=config,
        train_dataset=ragged_rows("classification"),
        gradient_shares=1,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    names = {"label", "kd", "hidden_mse_0", "nst_1", "pkd_2", "attention_ce_3"}
    assert {k.removeprefix("loss_") for k in logs if k.startswith("loss_")} == names
    assert {k.removeprefix("share_") for k in logs if k.startswith("share_")} == names
    assert sum(v for k, v in logs.items() if k.startswith("share_")) == pytest.approx(1.0)
    assert logs["loss"] == pytest.approx(sum(v for k, v in logs.items() if k.startswith("loss_")), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "sampling"), [("classification", "random"), ("classification", "group_by_length"), ("causal", "random")]
)
def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path, kind, sampling):
    config = DistillationConfig(
        matches=[Match(loss="hidden_mse", student=1, teacher=2, projection="linear", projection_learning_rate=0.01)],
        weight_schedule="linear_decay",
    )

    def trainer(folder, **changes):
        student, teacher = student_and_teacher(kind)
        set_dropout(student, 0.1)
        args = arguments(
            tmp_path / folder, max_steps=6, optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0,
            lr_scheduler_type="linear", train_sampling_strategy=sampling, **changes,
        )  # fmt: skip
        return DistillationTrainer(student, args, teacher=teacher, distillation=config, train_dataset=ragged_rows(kind))

    whole = trainer("whole")
    whole.train()
    first = trainer("killed", save_strategy="steps", save_steps=2)

    class Killed(Exception):
        pass

    def kill(*args, **kwargs):
        raise Killed

    original = first.training_step
    first.training_step = lambda *a, **k: kill() if first.state.global_step == 4 else original(*a, **k)
    with pytest.raises(Killed):
        first.train()
    second = trainer("killed", save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=True)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name]), name
    for one, other in zip(whole.methods[0].modules().values(), second.methods[0].modules().values(), strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_resuming_with_other_methods_is_refused(tmp_path):
    student, teacher = student_and_teacher("classification")
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    CompressionTrainer(student, args, train_dataset=ragged_rows("classification")).train()
    config = DistillationConfig(matches=[Match(loss="hidden_mse", student=1, teacher=1, projection="tanh")])
    student, teacher = student_and_teacher("classification")
    trainer = DistillationTrainer(
        student, arguments(tmp_path, max_steps=4), teacher=teacher, distillation=config, train_dataset=ragged_rows("c")
    )
    with pytest.raises(CheckpointError, match="was written without these methods"):
        trainer.train(resume_from_checkpoint=True)


def test_projections_are_trained_clipped_and_never_saved_with_the_student(tmp_path):
    student, teacher = student_and_teacher("classification")
    match = Match(
        loss="hidden_mse", student=1, teacher=1, projection="linear", projection_learning_rate=1.0, weight=100.0
    )
    config = DistillationConfig(matches=[match], max_projection_norm=1e-3)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, distillation=config, train_dataset=ragged_rows("c")
    )
    (projection,) = trainer.methods[0].modules().values()
    before = [p.detach().clone() for p in projection.parameters()]
    trainer.train()
    moved = torch.stack([(p - b).norm() for p, b in zip(projection.parameters(), before, strict=True)]).norm()
    assert 0 < moved <= 2 * 1e-3 * 1.001  # two SGD steps of at most the clipped norm at a learning rate of 1
    trainer.save_model(str(tmp_path / "final"))
    assert not any("projection" in name for name in student.state_dict())
    assert {p.name for p in (tmp_path / "final").iterdir()} & {"lmcompress_training_state.safetensors"} == set()


class Constant(Method):
    """A method whose only term does not depend on the student."""

    name = "constant"

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def loss_terms(self, step: Step) -> dict[str, Term]:
        return {"constant": Term(self.total, "examples")}


def test_a_term_without_gradient_is_refused(tmp_path):
    student, _ = student_and_teacher("classification")
    trainer = CompressionTrainer(
        student, arguments(tmp_path), methods=[Constant(torch.tensor(1.0))], train_dataset=ragged_rows("c")
    )
    with pytest.raises(LmcompressError, match="'constant' has no gradient"):
        trainer.train()


def test_a_term_that_stays_zero_is_refused(tmp_path):
    student, _ = student_and_teacher("classification")
    args = arguments(tmp_path, max_steps=60, logging_steps=10, learning_rate=0.0)
    zero = torch.zeros((), requires_grad=True)
    trainer = CompressionTrainer(student, args, methods=[Constant(zero)], train_dataset=ragged_rows("c"))
    with pytest.raises(LmcompressError, match="'constant' has been exactly zero for 50 steps.*Usual causes"):
        trainer.train()


def test_evaluation_is_the_loss_on_labels_and_leaves_nothing_captured(tmp_path):
    student, teacher = student_and_teacher("classification")
    config = DistillationConfig(matches=ALL_UNITS)
    rows = ragged_rows("c")
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, distillation=config, train_dataset=rows, eval_dataset=rows
    )
    ours = trainer.evaluate()["eval_loss"]
    assert not trainer.methods[0]._capture._kept
    theirs = Trainer(student, arguments(tmp_path), eval_dataset=rows).evaluate()["eval_loss"]
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_bf16_trains_near_fp32_and_losses_are_float32(tmp_path, kind):
    losses = []
    for bf16 in (False, True):
        student, teacher = student_and_teacher(kind)
        trainer = DistillationTrainer(
            student, arguments(tmp_path, bf16=bf16), teacher=teacher,
            distillation=DistillationConfig(matches=ALL_UNITS), train_dataset=ragged_rows(kind),
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0])
        assert next(student.parameters()).dtype == torch.float32
    for name, value in losses[0].items():
        if name.startswith("loss"):
            assert losses[1][name] == pytest.approx(value, rel=0.05, abs=1e-3), name


# the compiler imports a part of torch that warns of its own age; inductor calls a C++ compiler, which takes minutes
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_compiled_training_gives_the_same_step(tmp_path, kind, backend):
    torch.compiler.reset()
    trained = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        student, teacher = student_and_teacher(kind)
        DistillationTrainer(
            student,
            arguments(tmp_path, **compiled),
            teacher=teacher,
            distillation=DistillationConfig(matches=ALL_UNITS),
            train_dataset=ragged_rows(kind),
        ).train()
        trained.append(student.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)


def test_checkpoints_of_a_cut_student_reload(tmp_path, make_model):
    from transformers import AutoModelForSequenceClassification

    from lmcompress import anatomy_of
    from lmcompress.checkpoint.cutting import keep_heads, keep_neurons

    student, teacher = student_and_teacher("classification")
    keep_heads(anatomy_of(student).blocks[0], [1, 3])
    keep_neurons(anatomy_of(student).blocks[1], range(5))
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = DistillationTrainer(CompressedModel(student), args, teacher=teacher, train_dataset=ragged_rows("c"))
    trainer.train()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(reloaded.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_a_distillation_is_a_method_like_any_other(tmp_path):
    student, teacher = student_and_teacher("classification")
    method = Distillation(DistillationConfig(), teacher)
    trainer = CompressionTrainer(student, arguments(tmp_path), methods=[method], train_dataset=ragged_rows("c"))
    trainer.train()
    trainer.finish()
    assert not any(module._forward_hooks for module in student.modules())
