"""Training runs that quantize: schedules, resuming, distillation, and pruning in the same run."""

from __future__ import annotations

import copy

import pytest
import torch
from families import cut_unevenly, inputs, make, outputs, set_dropout
from torch import Tensor
from training import tiny_arguments
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lmcompress import CheckpointError, CompressedModel, LmcompressError
from lmcompress.checkpoint.encoding import encoding_of, unpacked
from lmcompress.distillation import Distillation, DistillationConfig
from lmcompress.pruning.structured.config import HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.targets import Target
from lmcompress.quantization import ActivationScheme, Quantization, QuantizationConfig, Rule, WeightScheme
from lmcompress.schedules import Gradual, Iterative, OneShot
from lmcompress.trainers import CompressionTrainer, PruningTrainer, QuantizationTrainer
from lmcompress.trainers.building import default_distillation

STEPS = 8


def rows(causal: bool = False, count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        ids = torch.randint(5, 60, (10,), generator=generator)
        mask = (torch.arange(10) < 4 + row % 6).long()
        labels = ids.masked_fill(mask == 0, -100) if causal else torch.tensor(row % 3)
        made.append({"input_ids": ids * mask + 1 - mask, "attention_mask": mask, "labels": labels})
    return made


def scheme(quantizer: str = "dynamic_scaling", bits=2, activations: str | None = "dynamic", **changes):
    return QuantizationConfig(
        weights=WeightScheme(quantizer=quantizer, bits=bits),
        embeddings=WeightScheme(quantizer=quantizer, bits=bits, granularity="row"),
        activations=None if activations is None else ActivationScheme(range=activations),
        **changes,
    )


SCHEMES = {
    "w2a8": scheme(),
    "learned": scheme("lsq", 4, "learned", range_learning_rate=1e-3),
    "laq": scheme("laq", 2, None, curvature_every=2),
    "from-many-to-few": scheme(
        bits_schedule=((0.0, 8), (0.3, 4), (0.6, 2)), start_activations_at=0.4, activations="static"
    ),
}


def trainer_of(folder, config, family="gpt2", head="language", teacher=None, dropout=0.1, **given):
    changes = {"max_steps": STEPS, "learning_rate": 1e-3, "optim": "adamw_torch", "weight_decay": 0.1}
    student = given.pop("student", None)
    student = make(family, head, seed=1) if student is None else student
    set_dropout(student, dropout)
    args = tiny_arguments(folder, **(changes | given.pop("changes", {})))
    return QuantizationTrainer(
        student, args, quantization=config, teacher=teacher, train_dataset=rows(head == "language"), **given
    )


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("family, head", [("gpt2", "language"), ("bert", "classification")])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_run_ends_in_a_packed_model_that_answers_as_the_trained_one_and_reloads(tmp_path, name, family, head):
    teacher = make(family, head, seed=1)
    trainer = trainer_of(tmp_path, SCHEMES[name], family, head, teacher)
    trainer.train()
    trained = outputs(trainer.student.eval())
    trainer.finish()
    packed = outputs(trainer.student.eval())
    torch.testing.assert_close(packed, trained, rtol=2e-3, atol=2e-3 * float(trained.abs().max()))
    assert trainer.report.packed_error < 2e-2 and trainer.report.bytes_after < trainer.report.bytes_before / 2
    assert encoding_of(trainer.student) is not None
    CompressedModel(trainer.student).save_pretrained(tmp_path / "final")
    auto = AutoModelForCausalLM if head == "language" else AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(outputs(again.eval()), packed, rtol=1e-4, atol=1e-5)


def test_the_trainers_report_waits_for_finish(tmp_path):
    trainer = trainer_of(tmp_path, SCHEMES["w2a8"])
    with pytest.raises(LmcompressError, match="no report before finish"):
        _ = trainer.report


@pytest.mark.parametrize("name", SCHEMES)
def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path, name):
    def make_trainer(folder, **changes):
        teacher = make("gpt2", "language", seed=1)
        return trainer_of(tmp_path / folder, SCHEMES[name], teacher=teacher, changes=changes)

    whole = make_trainer("whole")
    whole.train()
    for killed_at in (2, 5) if name == "from-many-to-few" else (5,):
        saving = dict(save_strategy="steps", save_steps=killed_at)
        first = make_trainer(f"killed-{killed_at}", **saving)
        original = first.training_step

        class Killed(Exception):
            pass

        def step(*args, first=first, original=original, killed_at=killed_at, **kwargs):
            if first.state.global_step == killed_at + 1:
                raise Killed
            return original(*args, **kwargs)

        first.training_step = step
        with pytest.raises(Killed):
            first.train()
        second = make_trainer(f"killed-{killed_at}", **saving)
        second.train(resume_from_checkpoint=True)
        assert_same(whole.student.state_dict(), second.student.state_dict())
        for part, module in whole.quantization.modules().items():
            assert_same(module.state_dict(), second.quantization.modules()[part].state_dict())
        assert torch.equal(outputs(whole.student.eval()), outputs(second.student.eval()))
    whole.finish()
    second.finish()
    assert_same(whole.student.state_dict(), second.student.state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_resuming_with_another_quantization_is_refused(tmp_path):
    saving = dict(save_strategy="steps", save_steps=4)
    trainer_of(tmp_path, SCHEMES["w2a8"], changes=saving).train()
    with pytest.raises(CheckpointError, match="state of other methods"):
        trainer_of(tmp_path, SCHEMES["learned"]).train(resume_from_checkpoint=True)


def test_before_the_optimizer_the_groups_are_those_of_a_plain_run_and_the_scales(tmp_path):
    trainer = trainer_of(tmp_path, SCHEMES["learned"])
    plain = CompressionTrainer(make("gpt2", "language", seed=1), trainer.args, train_dataset=rows(True))
    mine, theirs = trainer.create_optimizer().param_groups, plain.create_optimizer().param_groups
    names = [{id(p): name for name, p in t.student.named_parameters()} for t in (trainer, plain)]
    for group, other in zip(mine, theirs, strict=False):
        assert [names[0][id(p)] for p in group["params"]] == [names[1][id(p)] for p in other["params"]]
        assert group["weight_decay"] == other["weight_decay"] and group["lr"] == other["lr"]
    scales, ranges = mine[len(theirs) :]
    config = trainer.quantization.config
    assert (scales["lr"], ranges["lr"]) == (config.scale_learning_rate, config.range_learning_rate)
    assert scales["weight_decay"] == ranges["weight_decay"] == 0
    learned = {id(p) for p in trainer.quantization.faked.parameters()}
    assert {id(p) for group in (scales, ranges) for p in group["params"]} == learned


def test_gradient_accumulation_does_not_change_the_run(tmp_path):
    results = []
    # ranges of the whole tensor depend on the micro-batch: those per token do not
    config = scheme(bits=4).model_copy(update={"activations": ActivationScheme(granularity="token")})
    for batch, accumulation in ((8, 1), (2, 4)):
        changes = dict(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0.0,
            max_steps=2,
        )  # fmt: skip
        trainer = trainer_of(tmp_path, config, changes=changes, dropout=0.0)
        trainer.train()
        results.append(trainer)
    states = [trainer.quantization.modules()["scales"].state_dict() for trainer in results]
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0].student.state_dict(), results[1].student.state_dict(), rtol=1e-3, atol=1e-5)


def test_logs_tell_of_drift_and_of_codes_that_change(tmp_path):
    trainer = trainer_of(tmp_path, SCHEMES["learned"], changes=dict(learning_rate=0.05))
    trainer.train()
    last = [row for row in trainer.state.log_history if "loss" in row][-2]
    assert 0 < last["quantization_codes_changed"] < 1
    assert last["scale_drift_ffn_in"] > 0 and last["range_drift_ffn_out"] > 0 and last["range_drift_queries"] > 0
    quiet = trainer_of(tmp_path, SCHEMES["learned"].model_copy(update={"monitor": False}))
    quiet.train()
    assert "quantization_codes_changed" not in quiet.state.log_history[0]


def test_training_in_bfloat16_computes_scales_in_float32(tmp_path):
    trainer = trainer_of(tmp_path, SCHEMES["learned"], changes=dict(bf16=True))
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.quantization.faked.parameters())
    assert all(value == value for value in losses(trainer))
    trainer.finish()


@pytest.mark.parametrize("head, family", [("language", "gpt2"), ("classification", "bert")])
def test_a_pruned_model_is_quantized(tmp_path, head, family):
    student = cut_unevenly(make(family, head, seed=1))
    teacher = make(family, head, seed=1)
    trainer = trainer_of(tmp_path, SCHEMES["w2a8"], family, head, teacher, student=student)
    trainer.train()
    trainer.finish()
    CompressedModel(student).save_pretrained(tmp_path / "final")
    again = CompressedModel.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(outputs(again.model.eval()), outputs(student), rtol=1e-4, atol=1e-5)


PRUNINGS = {
    "one_shot": PruningConfig(target=Target(sparsity=0.5), schedule=OneShot(begin=0.25)),
    "iterative": PruningConfig(target=Target(sparsity=0.5), schedule=Iterative(rounds=2), repair="least_squares"),
    "gradual": PruningConfig(target=Target(sparsity=0.5), schedule=Gradual(every=2), criterion="l2"),
    "movement": PruningConfig(target=Target(sparsity=0.5), schedule=Movement(learning_rate=0.3)),
    "everything": PruningConfig(
        target=Target(sparsity=0.5), parts=("heads", "neurons", "attention", "ffn", "layers", "hidden"),
        schedule=OneShot(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, activations, head, family",
    [
        ("one_shot", "dynamic", "classification", "electra"),
        ("iterative", "learned", "language", "gpt2"),
        ("gradual", "learned", "classification", "bert"),
        ("movement", "dynamic", "language", "gpt2"),
        ("everything", "dynamic", "language", "gpt2"),
        ("everything", "learned", "classification", "distilbert"),
    ],
)
def test_pruning_and_quantization_and_distillation_in_one_run(tmp_path, name, activations, head, family):
    config = QuantizationConfig(
        weights=WeightScheme(bits=4, granularity="row"),
        embeddings=WeightScheme(bits=4, granularity="row"),
        activations=ActivationScheme(range=activations),
        rules=(Rule(modules="ffn_in", weights=WeightScheme(quantizer="asymmetric_minmax", bits=8, granularity="row")),),
    )
    teacher = make(family, head, seed=1)
    pruning = StructuredPruning(PRUNINGS[name])
    trainer = trainer_of(tmp_path, config, family, head, teacher, methods=[pruning])
    assert [method.name for method in trainer.methods] == ["pruning", "quantization", "distillation"]
    trainer.train()
    pruning.freeze()
    for method in trainer.methods:
        method.set_active(False)
    masked = outputs(trainer.student.eval())
    trainer.finish()
    assert pruning.report.removed >= 0.49
    packed = outputs(trainer.student.eval())
    # of inputs on the edge some are rounded the other way
    torch.testing.assert_close(packed, masked, rtol=5e-3, atol=5e-3 * float(masked.abs().max()))
    CompressedModel(trainer.student).save_pretrained(tmp_path / "final")
    again = CompressedModel.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(outputs(again.model.eval()), packed, rtol=1e-4, atol=1e-5)


def test_codes_are_those_of_the_masked_model_and_not_made_anew(tmp_path):
    pruning = StructuredPruning(PRUNINGS["gradual"])
    trainer = trainer_of(tmp_path, scheme(bits=2, activations=None), methods=[pruning], dropout=0.0, auto_finish=False)
    trainer.train()
    pruning.freeze()
    quantized = trainer.quantization.faked.quantized()
    wanted = outputs(trainer.student.eval())
    trainer.finish()
    torch.testing.assert_close(outputs(trainer.student.eval()), wanted, rtol=1e-4, atol=1e-5)
    dense = unpacked(trainer.student)
    name = "transformer.h.0.mlp.c_fc.weight"
    levels = set(dense.state_dict()[name].unique().tolist())
    assert levels <= set(quantized["h.0.mlp.c_fc"].values.unique().tolist())


def test_what_cannot_be_cut_and_packed_is_refused_before_training(tmp_path):
    def pruning(**schedule):
        return StructuredPruning(PruningConfig(target=Target(sparsity=0.5), **schedule))

    groups = QuantizationConfig(weights=WeightScheme(granularity=8))
    with pytest.raises(LmcompressError, match="must be tensor or row in a run that prunes too, got groups of 8"):
        trainer_of(tmp_path, groups, methods=[pruning()])
    with pytest.raises(LmcompressError, match="must have a zero in a run that prunes too, elastic at 2 bits"):
        trainer_of(tmp_path, scheme("elastic"), methods=[pruning()])
    with pytest.raises(LmcompressError, match="must end with gates of 0 and 1"):
        trainer_of(tmp_path, scheme(), methods=[pruning(schedule=HardConcrete())])
    with pytest.raises(LmcompressError, match="pruning must come before quantization"):
        CompressionTrainer(
            make("bert"), tiny_arguments(tmp_path), methods=[Quantization(), pruning()], train_dataset=rows()
        )


def test_pruning_trainer_takes_quantization_as_a_further_method(tmp_path):
    student, quantization = make("bert", seed=1), Quantization(scheme(bits=4))
    args = tiny_arguments(tmp_path, max_steps=4)
    trainer = PruningTrainer(
        student,
        args,
        pruning=PRUNINGS["one_shot"],
        teacher=make("bert", seed=1),
        methods=[quantization],
        train_dataset=rows(),
    )
    trainer.train()
    trainer.finish()
    assert trainer.report.removed >= 0.49 and quantization.report.bits_per_weight < 8


def test_default_distillation_is_the_papers():
    gpt2, bert = make("gpt2", "language"), make("bert")
    lm = default_distillation(gpt2, copy.deepcopy(gpt2))
    assert (lm.temperature, lm.label_weight, lm.contrast.weight) == (1.0, 0.0, 0.1)
    encoder = default_distillation(bert, copy.deepcopy(bert))
    assert sorted(m.loss for m in encoder.matches) == ["attention_mse"] * 3 + ["hidden_mse"] * 4
    assert default_distillation(bert, copy.deepcopy(bert), cut=True).matches == ()
    pruned = default_distillation(cut_unevenly(make("bert")), bert)
    assert (pruned.matches, pruned.temperature) == ((), 1.0)


def test_a_distillation_needs_a_teacher(tmp_path):
    with pytest.raises(LmcompressError, match="distillation needs a teacher"):
        trainer_of(tmp_path, None, distillation=DistillationConfig())


def test_it_learns_at_two_bits(tmp_path):
    teacher = make("gpt2", "language", seed=1)
    trainer = trainer_of(
        tmp_path, scheme(), teacher=teacher, dropout=0.0, changes=dict(max_steps=30, learning_rate=1e-2)
    )
    trainer.train()
    kd = [row["loss_kd"] for row in trainer.state.log_history if "loss_kd" in row]
    assert sum(kd[-5:]) < 0.7 * sum(kd[:5])
    assert isinstance(trainer.methods[1], Distillation)


def test_evaluation_leaves_the_run_as_it_was(tmp_path):
    final = []
    for every in (None, 2):
        changes = {} if every is None else dict(eval_strategy="steps", eval_steps=every)
        trainer = trainer_of(tmp_path, SCHEMES["learned"], changes=changes, eval_dataset=rows(True)[:5], dropout=0.0)
        trainer.train()
        final.append(trainer.student.state_dict())
    assert_same(*final)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_a_base_model_reloads_after_training_with_a_head(tmp_path):
    trainer = trainer_of(tmp_path, SCHEMES["w2a8"], "bert", "classification", changes=dict(max_steps=2))
    trainer.train()
    trainer.finish()
    CompressedModel(trainer.student).save_pretrained(tmp_path / "final")
    base = AutoModel.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        base(**inputs(base))
