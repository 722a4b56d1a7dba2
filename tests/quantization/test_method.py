"""The method without a trainer around it: schedules, curvature, what it refuses, what it reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import cut_unevenly, inputs, make, outputs
from pydantic import ValidationError
from torch import nn

from lmcompress import LmcompressError, anatomy_of
from lmcompress.checkpoint.cutting import drop_heads, keep_heads, keep_hidden, keep_neurons
from lmcompress.checkpoint.encoding import unpacked
from lmcompress.families import weight_view
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.quantization import ActivationScheme, Quantization, QuantizationConfig, Rule, WeightScheme
from lmcompress.quantization.config import width

FALLING = ((0.0, 8), (0.3, 4), (0.6, 2))


def config(quantizer="dynamic_scaling", bits=2, **changes) -> QuantizationConfig:
    weights = WeightScheme(quantizer=quantizer, bits=bits, granularity="row")
    return QuantizationConfig(**{"weights": weights, "embeddings": weights, "activations": None, **changes})


def attached(config, model=None, cut_later=False, **given) -> Quantization:
    method = Quantization(config, **given)
    method.attach(make("bert", seed=1) if model is None else model, cut_later=cut_later)
    return method


def adam(method: Quantization) -> torch.optim.Optimizer:
    groups = [{"params": list(method._student.parameters())}, *method.parameter_groups()]
    return torch.optim.AdamW(groups, lr=1e-3)


def train(method: Quantization, optimizer: torch.optim.Optimizer, steps: range, max_steps: int) -> None:
    for step in steps:
        method.advance(step)
        batch = inputs(method._student, seed=step)
        loss = method._student(**batch, labels=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def bits_of(method: Quantization) -> set:
    return {fake.scheme.bits for fake in method.faked.weights.values()}


def test_bits_go_down_by_steps_and_their_scales_begin_anew():
    method = attached(config(bits_schedule=FALLING))
    optimizer = adam(method)
    method.begin(10, optimizer)
    seen = []
    for step in range(10):
        train(method, optimizer, range(step, step + 1), 10)
        seen += bits_of(method)
    assert seen == [8] * 3 + [4] * 3 + [2] * 4
    scale = next(iter(method.faked.scales().values()))
    # three of ten steps are past since then
    assert float(optimizer.state[scale]["step"]) == 4


def test_no_matrix_has_fewer_bits_than_its_own():
    protected = Rule(modules="ffn_out", weights=WeightScheme(bits=4))
    method = attached(config(bits_schedule=FALLING, rules=(protected,)))
    method.begin(10, adam(method))
    for step, others, own in ((0, 8, 8), (4, 4, 4), (9, 2, 4)):
        method.advance(step)
        by_part = {planned.part: method.faked.weights[planned.path].scheme.bits for planned in method.plan.matrices}
        assert (by_part["ffn_in"], by_part["ffn_out"]) == (others, own)


def test_finish_brings_schedules_to_their_end():
    model = make("bert", seed=1)
    batches = [inputs(model)]
    activations = ActivationScheme(range="static")
    late = config(bits_schedule=FALLING, start_activations_at=0.5, activations=activations)
    method = attached(late, model, calibration=batches)
    assert bits_of(method) == {8}
    method.finish()
    assert {row.bits for row in method.report.matrices} == {2} and {row.inputs for row in method.report.matrices} == {
        None,
        8,
    }
    assert torch.isfinite(outputs(model)).all()


@pytest.mark.parametrize(
    "schedule",
    [((0.1, 8), (0.5, 2)), ((0.0, 2), (0.5, 8)), ((0.0, 8), (0.0, 4)), ((0.0, 2), (0.5, "ternary"), (0.4, 1))],
)
def test_a_schedule_must_start_at_0_and_fall(schedule):
    with pytest.raises(ValidationError, match="must begin at 0.0, go up in its shares and down in its bits"):
        config(bits_schedule=schedule)


def test_a_schedule_of_bits_that_a_quantizer_has_not_is_refused():
    with pytest.raises(LmcompressError, match="bits_schedule does not fit .*'twn' has bits ternary, 2, got 8"):
        attached(config("twn", bits_schedule=((0.0, 8), (0.5, 2))))
    with pytest.raises(LmcompressError, match="end with the bits of all matrices or fewer, got 4 at its end and 2"):
        attached(config(bits_schedule=((0.0, 8), (0.5, 4))))


def test_widths_are_in_order():
    assert sorted([8, 2, "ternary", 1, 4, 3], key=width) == [1, "ternary", 2, 3, 4, 8]


def test_laqs_curvature_is_the_root_of_adams_unbiased_second_moment():
    method = attached(config("laq", curvature_every=3))
    optimizer = adam(method)
    method.begin(10, optimizer)
    train(method, optimizer, range(3), 10)
    assert method.faked.weights["encoder.layer.0.output.dense"]._curvature is None
    method.advance(3)
    for path, fake in method.faked.weights.items():
        state = optimizer.state[method.faked.parameter(path)]
        wanted = (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
        torch.testing.assert_close(fake._curvature, wanted)


def test_a_curvature_needs_an_optimizer_that_has_one():
    method = attached(config("laq"))
    with pytest.raises(LmcompressError, match="must keep second moments for laq's curvature, got SGD"):
        method.begin(10, torch.optim.SGD(method._student.parameters(), lr=0.1))
    attached(config("laq", curvature_every=0)).begin(10, torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_calibration_without_data_is_refused():
    method = attached(config(activations=ActivationScheme(range="static")))
    with pytest.raises(LmcompressError, match="calibrated ranges need data, got none"):
        method.finish()


def test_calibration_leaves_padding_out():
    model = make("bert", seed=1)
    batch = inputs(model)
    padded = dict(batch)
    padded["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, torch.full_like(batch["input_ids"], 7))
    ranges = []
    for given in (batch, padded):
        method = attached(
            config(activations=ActivationScheme(range="static")), make("bert", seed=1), calibration=[given]
        )
        method._start_activations()
        ranges.append(method.faked.activations["encoder.layer.0.attention.self.query.input"].scale)
    assert torch.equal(*ranges)


def test_a_model_that_is_no_transformers_model_is_refused():
    trainer = SimpleNamespace(args=SimpleNamespace(load_best_model_at_end=False), student=nn.Linear(2, 2))
    with pytest.raises(LmcompressError, match="must be a model of transformers to be quantized, got Linear"):
        Quantization().prepare(trainer)


def test_finishing_a_cut_model_that_was_not_frozen_is_refused():
    method = attached(config(), cut_later=True)
    with pytest.raises(LmcompressError, match=r"freeze\(\) must come before the model is cut"):
        method.finish()


def test_a_model_changed_between_freeze_and_finish_is_refused():
    method = attached(config(), cut_later=True)
    method.freeze()
    with torch.no_grad():
        weight_view(anatomy_of(method._student).blocks[0].get("ffn_in")).mul_(0.7)
    with pytest.raises(LmcompressError, match="must have its quantized values when it is packed"):
        method.finish()


@pytest.mark.parametrize("family", ["bert", "gpt2", "electra-projected"])
@pytest.mark.parametrize("quantizer, bits", [("dynamic_scaling", 2), ("asymmetric_mse", 4), ("lsq", 8), ("laq", 3)])
def test_codes_and_scales_go_with_rows_when_the_model_is_cut(family, quantizer, bits):
    model = make(family, "language", seed=1)
    method = attached(config(quantizer, bits), model, cut_later=True)
    method.freeze()
    first, second, third = anatomy_of(model).blocks
    keep_heads(first, [1, 3])
    drop_heads(second)
    keep_neurons(third, [2, 3, 11])
    keep_hidden(model, [0, 1, 4, 5, 6, 7, 9, 12])
    wanted, dense = outputs(model), {name: p.clone() for name, p in model.named_parameters()}
    method.finish()
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in unpacked(model).named_parameters():
        assert torch.equal(parameter, dense[name]), name


def test_companions_go_with_the_outputs_of_a_module_and_no_others():
    class Rows:
        def __init__(self, kept):
            self.kept = kept

        def rows(self, keep):
            return Rows([self.kept[i] for i in keep.tolist()])

    model = make("gpt2", "language")
    block = anatomy_of(model).blocks[0]
    for part in ("qkv", "attention_out", "ffn_in", "ffn_out"):
        accompany(block.get(part), Rows(list(range(weight_view(block.get(part)).shape[0]))))
    keep_heads(block, [2])
    keep_neurons(block, [5, 1])
    keep_hidden(model, [0, 3])
    heads = list(range(8, 12))
    wanted = {
        "qkv": [offset + i for offset in (0, 16, 32) for i in heads], "attention_out": [0, 3], "ffn_in": [5, 1],
        "ffn_out": [0, 3],
    }  # fmt: skip
    assert {part: companion_of(block.get(part)).kept for part in wanted} == wanted
    accompany(block.get("qkv"), None)
    assert companion_of(block.get("qkv")) is None


def test_the_report_counts_bytes_as_the_packed_model_has_them():
    model = cut_unevenly(make("gpt2", "language", seed=1))
    method = attached(config(bits=4), model)
    method.finish()
    report = method.report
    before = sum(row.bytes_before for row in report.matrices)
    after = sum(row.bytes_after for row in report.matrices)
    assert report.bytes_before - before == report.bytes_after - after
    assert report.to_dict()["method"] == "trained" and "trained" in str(report)
    assert method.finish() is None
