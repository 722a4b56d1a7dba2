"""Training in bfloat16: matmuls are, and what needs digits is not; which machines have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import make, set_dropout
from training import rows, tiny_arguments

from lmcompress.distillation import DistillationConfig, Match
from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.pruning.structured.config import HardConcrete, PruningConfig
from lmcompress.pruning.structured.targets import Target
from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme
from lmcompress.trainers import CompressionTrainer
from lmcompress.trainers.precision import bfloat16_is_fast

LEARNED = QuantizationConfig(
    weights=WeightScheme(quantizer="lsq", bits=4, granularity="row"),
    embeddings=WeightScheme(quantizer="lsq", bits=8, granularity="row"),
    activations=ActivationScheme(range="learned"),
)
TAUGHT = DistillationConfig(temperature=2.0, matches=(Match(loss="hidden_mse", student=-1, teacher=-1),))


def trainer_of(folder, bf16, **asked):
    student, teacher = make("bert", "classification", seed=1), make("bert", "classification", seed=2)
    for model in (student, teacher):
        set_dropout(model, 0.0)
    args = tiny_arguments(folder, bf16=bf16, max_steps=4)
    return CompressionTrainer(
        student, args, teacher=teacher, distillation=TAUGHT, train_dataset=rows(), auto_finish=False, **asked
    )


def products_of(model):
    """The dtypes of what a feed-forward layer gives."""
    seen = set()
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("bf16", [True, False])
def test_products_of_student_and_teacher_are_in_the_precision_of_the_arguments(tmp_path, bf16):
    trainer = trainer_of(tmp_path, bf16)
    seen = [products_of(trainer.student), products_of(trainer.methods[-1].teachers[0].model)]
    trainer.train()
    assert seen == [{torch.bfloat16 if bf16 else torch.float32}] * 2
    assert {parameter.dtype for parameter in trainer.student.parameters()} == {torch.float32}


def test_terms_scales_and_optimizer_state_are_float32_when_products_are_bfloat16(tmp_path):
    trainer = trainer_of(tmp_path, True, quantization=LEARNED)
    dtypes = set()
    for method in trainer.methods:
        terms = method.loss_terms
        method.loss_terms = lambda step, terms=terms: note(terms(step))

    def note(found):
        dtypes.update(term.total.dtype for term in found.values())
        return found

    trainer.train()
    assert dtypes == {torch.float32}
    faked = next(method.faked for method in trainer.methods if method.name == "quantization")
    assert {parameter.dtype for parameter in faked.parameters()} == {torch.float32}
    assert all(fake.quantized_dtype == torch.float32 for fake in map(quantized, faked.quantized().values()))
    states = trainer.optimizer.state.values()
    assert {value.dtype for state in states for value in state.values() if torch.is_tensor(value)} == {torch.float32}
    trainer.finish()
    assert {module.weight_scales.dtype for module in trainer.student.modules() if hasattr(module, "weight_scales")} == {
        torch.float32
    }


def quantized(result):
    assert result.scales.dtype == torch.float32
    return SimpleNamespace(quantized_dtype=result.values.dtype)


def test_the_softmax_of_distillation_is_float32():
    student, teacher = (torch.randn(16, 500).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = kl_divergence(student, teacher, temperature=2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, kl_divergence(student.float(), teacher.float(), temperature=2.0))


def test_gates_and_their_lagrangian_are_those_of_float32(tmp_path):
    first = []
    for bf16 in (False, True):
        config = PruningConfig(target=Target(sparsity=0.3), schedule=HardConcrete(begin=0.0, end=0.75))
        trainer = trainer_of(tmp_path, bf16, pruning=config)
        method = next(method for method in trainer.methods if method.name == "pruning")
        trainer.train()
        first.append([row["loss_sparsity"] for row in trainer.state.log_history if "loss_sparsity" in row])
        parameters = [p for group in method.parameter_groups() for p in group["params"]]
        assert parameters and {p.dtype for p in parameters} == {torch.float32}
    # of four steps the gates are open for three
    assert len(first[0]) == len(first[1]) == 3 and any(first[0])
    assert first[0] == pytest.approx(first[1], rel=1e-3, abs=1e-6)


def test_a_resumed_run_in_bfloat16_ends_as_one_that_went_through(tmp_path):
    whole = trainer_of(tmp_path / "a", True, quantization=LEARNED)
    whole.train()
    begun = trainer_of(tmp_path / "b", True, quantization=LEARNED)
    begun.args.save_strategy, begun.args.save_steps, begun.args.max_steps = "steps", 2, 4
    begun.train()
    resumed = trainer_of(tmp_path / "b", True, quantization=LEARNED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name


@pytest.mark.parametrize(
    ("gpu", "of_gpu", "mps", "avx512", "amx", "use_cpu", "expected"),
    [
        (False, False, False, True, False, False, True),
        (False, False, False, False, True, False, True),
        (False, False, False, False, False, False, False),
        (True, True, False, False, False, False, True),
        (True, False, False, True, False, False, False),
        (True, True, False, False, False, True, False),
        (False, False, True, True, False, False, False),
    ],
)
def test_bfloat16_is_fast_where_the_device_has_instructions(
    monkeypatch, gpu, of_gpu, mps, avx512, amx, use_cpu, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: of_gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert bfloat16_is_fast(use_cpu=use_cpu) is expected
