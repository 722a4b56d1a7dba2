import json
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import LatencyRow, compare_latency, machine, verdict

FAST = dict(batch_sizes=(1,), sequence_length=4, repeats=3, warmup=1)


def slow_down(model, seconds):
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def test_a_slower_model_is_measured_and_called_slower(make_gpt2):
    models = {"plain": make_gpt2(), "sleepy": slow_down(make_gpt2(), 0.05)}
    rows = compare_latency(models, batch_sizes=(1, 2), sequence_length=4, repeats=5, warmup=1)
    assert [(row.model, row.batch_size) for row in rows] == [("plain", 1), ("sleepy", 1), ("plain", 2), ("sleepy", 2)]
    for plain, sleepy in (rows[:2], rows[2:]):
        assert plain.speedup_vs_first == 1.0
        assert sleepy.median_ms >= 50
        assert sleepy.speedup_vs_first == pytest.approx(plain.median_ms / sleepy.median_ms)
        assert sleepy.lower_ms <= sleepy.median_ms <= sleepy.upper_ms
    assert all(text.endswith("x: slower") for text in verdict(rows)[1::2])


def test_models_take_turns_and_see_the_same_ids_within_both_vocabularies(make_gpt2):
    calls = []
    models = {"a": make_gpt2(), "b": make_gpt2()}
    models["b"].resize_token_embeddings(100)
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: calls.append(
                (name, inputs["input_ids"], torch.is_inference_mode_enabled())
            ),
            with_kwargs=True,
        )
    compare_latency(models, **FAST)
    assert [name for name, _, _ in calls] == ["a", "b"] * 4
    assert all(inference for _, _, inference in calls)
    assert all(torch.equal(ids, calls[0][1]) for _, ids, _ in calls)
    assert calls[0][1].shape == (1, 4) and calls[0][1].max() < 100


def test_generation_makes_all_tokens_even_for_a_model_that_would_end(make_gpt2):
    model = make_gpt2()
    lengths = []
    model.generation_config.eos_token_id = list(range(256))[1:]
    generate = model.generate
    model.generate = lambda *args, **kwargs: lengths.append(generate(*args, **kwargs).shape[1])
    compare_latency({"model": model}, mode="generate", new_tokens=6, **FAST)
    assert set(lengths) == {10}


def test_modes_and_threads_are_put_back(make_gpt2):
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    modes, threads = [module.training for module in model.modules()], torch.get_num_threads()
    seen = []
    hook = model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.get_num_threads())))
    compare_latency({"model": model}, threads=2, **FAST)
    hook.remove()
    assert set(seen) == {(False, 2)}
    assert [module.training for module in model.modules()] == modes
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
def test_models_come_back_from_the_gpu(make_gpt2):
    model = make_gpt2()
    assert compare_latency({"model": model}, device="cuda", **FAST)[0].median_ms > 0
    assert model.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "generation"}, "unknown mode 'generation'; did you mean 'generate'"),
        ({"repeats": 2}, "repeats must be >= 3, got 2"),
        ({"batch_sizes": ()}, r"models and batch sizes, got \['model'\] and \[\]"),
        ({"batch_sizes": (0,)}, "batch_sizes must be >= 1, got 0"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"threads": 0}, r"threads must be in \[1, \d+\], the cores of this machine, got 0"),
        ({"threads": 100_000}, "the cores of this machine, got 100000"),
        ({"sequence_length": 17}, "'model' has 16 positions, 17 are needed"),
        ({"mode": "generate", "new_tokens": 13}, "'model' has 16 positions, 17 are needed"),
    ],
)
def test_errors_say_what_to_do(make_gpt2, arguments, message):
    with pytest.raises(LmcompressError, match=message):
        compare_latency({"model": make_gpt2()}, **{**FAST, **arguments})


def test_a_classifier_cannot_generate(make_classifier):
    with pytest.raises(
        LmcompressError, match="BertForSequenceClassification, which cannot generate; use mode='forward'"
    ):
        compare_latency({"model": make_classifier()}, mode="generate", **FAST)


def test_models_on_two_devices_are_not_compared(make_gpt2):
    with pytest.raises(LmcompressError, match="models must be on one device"):
        compare_latency({"a": make_gpt2(), "b": make_gpt2().to("meta")}, **FAST)


def row(name, lower, median, upper):
    return LatencyRow(name, 1, 128, "forward", median, lower, upper, 1.0)


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ((4.9, 5.0, 5.1), "1.80x faster"),
        ((12.0, 12.86, 13.0), "0.70x: slower"),
        ((8.0, 8.5, 8.9), "no measurable difference"),
        ((9.2, 9.5, 12.0), "no measurable difference"),
        ((9.0, 9.0, 9.0), "no measurable difference"),
    ],
    ids=["faster", "slower", "overlap-below", "overlap-above", "equal"],
)
def test_verdicts(student, expected):
    assert verdict([row("teacher", 8.8, 9.0, 9.3), row("student", *student)]) == ["baseline", expected]


quartiles = st.lists(st.floats(0.01, 1e4), min_size=3, max_size=3).map(sorted)


@given(quartiles, quartiles)
def test_no_verdict_flatters(teacher, student):
    text = verdict([row("teacher", *teacher), row("student", *student)])[1]
    if "faster" in text:
        assert student[2] < teacher[0] and float(text.split("x")[0]) > 1
    elif "slower" in text:
        assert student[0] > teacher[2] and float(text.split("x")[0]) < 1
    else:
        assert text == "no measurable difference"


def test_each_batch_size_has_its_own_baseline():
    first = row("teacher", 8.8, 9.0, 9.3)
    second = replace(first, batch_size=32)
    student = replace(row("student", 4.4, 4.5, 4.6), batch_size=32)
    assert verdict([first, second, student]) == ["baseline", "baseline", "2.00x faster"]


def test_the_machine_is_described_in_json():
    described = machine()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1 and described["threads"] == torch.get_num_threads()
    assert described["processor"]
