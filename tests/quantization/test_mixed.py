"""Widths by measured harm: the best choice under a budget, and measurements that leave the model alone."""

import itertools

import pytest
import torch
from families import inputs, make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.quantization import POST_TRAINING, quantize
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, Rule, WeightScheme
from lmcompress.quantization.mixed import bits_sensitivity, choose_bits, mixed_precision
from lmcompress.quantization.planning import plan


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_choice_is_the_best_there_is(data):
    widths = [2, 4, 8]
    names = "abcd"[: data.draw(st.integers(1, 4))]
    harms = {n: {w: data.draw(st.floats(0, 100)) for w in widths} for n in names}
    sizes = {n: {w: data.draw(st.integers(1, 50)) * w for w in widths} for n in names}
    least = sum(min(s.values()) for s in sizes.values())
    budget = data.draw(st.integers(least, 2 * least + 100))
    chosen = choose_bits(harms, sizes, budget)
    assert sum(sizes[n][w] for n, w in chosen.items()) <= budget
    best = min(
        sum(harms[n][w] for n, w in zip(names, choice, strict=True))
        for choice in itertools.product(widths, repeat=len(names))
        if sum(sizes[n][w] for n, w in zip(names, choice, strict=True)) <= budget
    )
    assert sum(harms[n][w] for n, w in chosen.items()) == pytest.approx(best, rel=1e-6, abs=1e-4)


def test_of_equal_harm_the_smaller_is_taken():
    assert choose_bits({"a": {2: 0.0, 8: 0.0}}, {"a": {2: 2, 8: 8}}, 100) == {"a": 2}


def test_harms_of_any_scale():
    harms = {n: {2: h * 1e-12, 8: 0.0} for n, h in (("a", 3.0), ("b", 1.0))}
    sizes = {n: {2: 2 * 10**6, 8: 8 * 10**6} for n in "ab"}
    assert choose_bits(harms, sizes, 10**7) == {"a": 8, "b": 2}


def batches_for(model):
    return [inputs(model, rows=4, seed=seed) for seed in (1, 2)]


def test_each_matrix_is_measured_alone_and_the_model_is_left_as_it_was(family):
    model = make(family, "language")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = outputs(model)
    rows = bits_sensitivity(model, POST_TRAINING, batches_for(model), bits=(2, 8))
    assert [(row.path, row.bits) for row in rows] == [
        (matrix.path, bits) for matrix in plan(model, POST_TRAINING).matrices for bits in (2, 8)
    ]
    for two, eight in zip(rows[::2], rows[1::2], strict=True):
        assert two.harm > eight.harm > -1e-6
        assert two.size_bytes < eight.size_bytes and two.weights == eight.weights
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model), answer)


def test_the_default_measure_is_the_divergence_of_a_model_with_that_matrix_alone_quantized():
    model = make("bert", "language")
    batches = batches_for(model)
    rows = bits_sensitivity(model, POST_TRAINING, batches, bits=(3,))
    row = next(row for row in rows if row.path == "encoder.layer.1.intermediate.dense")
    alone = make("bert", "language")
    rules = (
        Rule(modules="*", weights=None),
        Rule(modules=row.path, weights=WeightScheme(quantizer="mse", bits=3, granularity="row")),
    )
    quantize(alone, POST_TRAINING.model_copy(update={"activations": None, "embeddings": None, "rules": rules}))
    total = count = 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits[batch["attention_mask"].bool()].log_softmax(-1) for m in (model, alone))
            total, count = total + (p.exp() * (p - q)).sum(), count + len(p)
    assert row.harm == pytest.approx(float(total / count), rel=1e-4)


def test_a_measure_of_ones_own_is_called_for_each_row_and_the_dense_model():
    model, calls = make("gpt2"), []

    def evaluate(m):
        calls.append(float(outputs(m).square().mean()))
        return calls[-1]

    rows = bits_sensitivity(model, POST_TRAINING, bits=(4,), evaluate=evaluate)
    assert len(calls) == len(rows) + 1 and calls[0] == float(outputs(model).square().mean())
    assert [row.harm for row in rows] == pytest.approx([value - calls[0] for value in calls[1:]])


@pytest.mark.parametrize("head", ["base", "classification"])
def test_models_without_words_or_with_one_number_are_measured_too(head):
    model = make("bert", head, num_labels=1)
    rows = bits_sensitivity(model, POST_TRAINING, batches_for(model), bits=(2,))
    assert all(row.harm > 0 for row in rows)


def test_the_config_quantizes_within_the_budget_and_keeps_what_it_said_else():
    model = make("gpt2", "language")
    static = ActivationScheme(range="static", bits=8)
    config = POST_TRAINING.model_copy(update={"rules": (Rule(modules="ffn_in", activations=static),)})
    rows = bits_sensitivity(model, config, batches_for(model), bits=(2, 4, 8))
    mixed = mixed_precision(model, config, rows, bits_per_weight=9.0)
    assert QuantizationConfig.model_validate_json(mixed.model_dump_json()) == mixed
    before, after = plan(model, config), plan(model, mixed)
    assert [(m.path, m.inputs) for m in before.matrices] == [(m.path, m.inputs) for m in after.matrices]
    assert len({m.weights.bits for m in after.matrices}) > 1
    report = quantize(model, mixed, batches_for(model))
    weights_alone = sum(
        row.size_bytes for row in rows if (row.path, row.bits) in {(m.path, m.weights.bits) for m in after.matrices}
    )
    assert 8 * weights_alone <= 9.0 * sum(row.weights for row in report.matrices)


def test_what_cannot_be_is_refused():
    model = make("bert")
    with pytest.raises(LmcompressError, match="needs batches or evaluate"):
        bits_sensitivity(model)
    with pytest.raises(LmcompressError, match="at least one width, got none"):
        bits_sensitivity(model, bits=(), evaluate=lambda m: 0.0)
    with pytest.raises(LmcompressError, match="'mse' has bits"):
        bits_sensitivity(model, bits=(1,), evaluate=lambda m: 0.0)
    rows = bits_sensitivity(model, bits=(4, 8), evaluate=lambda m: 0.0)
    with pytest.raises(LmcompressError, match="one of bits_per_weight and budget_bytes"):
        mixed_precision(model, POST_TRAINING, rows)
    with pytest.raises(LmcompressError, match="smallest widths, .* bytes, got 10"):
        mixed_precision(model, POST_TRAINING, rows, budget_bytes=10)
    with pytest.raises(LmcompressError, match="same model and config"):
        mixed_precision(model, POST_TRAINING, rows[2:], budget_bytes=10**9)
    with pytest.raises(LmcompressError, match="same matrices and widths"):
        choose_bits({"a": {2: 1.0}}, {"a": {4: 1}}, 10)
    with pytest.raises(LmcompressError, match="harms must be finite, got nan for a at 2 bits"):
        choose_bits({"a": {2: float("nan")}}, {"a": {2: 1}}, 10)
