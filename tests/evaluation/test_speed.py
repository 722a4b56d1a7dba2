import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import BUSY, LatencyRow, Sample, compare_latency, machine, speed, timing, verdict

FAST = dict(batch_sizes=(1,), sequence_length=4, repeats=3, warmup=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only calls move, and how to make a model move it by seconds of wall and of CPU time."""
    time = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(timing, "now", lambda: Sample(**time))
    monkeypatch.setattr(timing, "PAUSE", 0.0)

    def takes(model, wall, cpu=None):
        def move(*_):
            took = wall(time) if callable(wall) else wall
            time["wall"] += took
            time["cpu"] += took if cpu is None else cpu

        model.register_forward_pre_hook(move)
        return model

    return takes


def test_a_slower_model_is_called_slower_beside_the_first_one_timed_again(make_gpt2, clock):
    models = {"plain": clock(make_gpt2(), 0.2), "slow": clock(make_gpt2(), 0.5, 0.1)}
    rows = compare_latency(models, batch_sizes=(1, 2), sequence_length=4, repeats=5, warmup=1)
    assert [(row.model, row.kind, row.batch_size) for row in rows] == [
        (name, kind, batch)
        for batch in (1, 2)
        for name, kind in (("plain", "first"), ("plain, again", "again"), ("slow", "other"))
    ]
    for plain, again, slow in (rows[:3], rows[3:]):
        assert (plain.median_ms, again.median_ms, slow.median_ms, slow.cpu_ms) == pytest.approx((200, 200, 500, 100))
        assert (plain.speedup_vs_first, again.speedup_vs_first, slow.speedup_vs_first) == pytest.approx((1, 1, 0.4))
        assert slow.cpu_speedup_vs_first == pytest.approx(2)
    # 0.4 of its 0.5 seconds it waited
    assert verdict(rows)[:3] == ["baseline", "1.00x (1.00 – 1.00) of itself", BUSY]
    assert verdict([replace(row, cpu_ms=row.median_ms) for row in rows])[2] == "0.40x: slower"
    assert verdict(rows, "cpu")[2] == "2.00x faster"


def test_there_is_no_verdict_if_the_first_model_differs_from_itself(make_gpt2, clock, monkeypatch):
    def disturbed(*args, **kwargs):
        turns = timing.take_turns(*args, **kwargs)
        return timing.Turns(turns.samples, [Sample(1.5 * wall, cpu) for wall, cpu in turns.again])

    monkeypatch.setattr(speed, "take_turns", disturbed)
    rows = compare_latency({"a": clock(make_gpt2(), 1.0), "b": clock(make_gpt2(), 5.0)}, **FAST)
    assert verdict(rows) == ["baseline", "0.67x (0.67 – 0.67) of itself", BUSY]
    # other programs take wall time, and no CPU time of this one
    assert verdict(rows, "cpu")[2] == "0.20x: slower"


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
    names = [name for name, _, _ in calls]
    assert names[:2] == ["a", "b"] and [sorted(names[i : i + 3]) for i in (2, 5, 8)] == [["a", "a", "b"]] * 3
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


def row(name, lower, median, upper, kind="other"):
    """A row whose ratio has these quartiles, of either clock."""
    times = dict.fromkeys(("median_ms", "lower_ms", "upper_ms", "cpu_ms", "cpu_lower_ms", "cpu_upper_ms"), 1.0)
    ratios = dict(speedup_lower=lower, speedup_vs_first=median, speedup_upper=upper)
    ratios |= {f"cpu_{name}": value for name, value in ratios.items()}
    return LatencyRow(name, 1, 128, "forward", threads=1, kind=kind, **times, **ratios)


FIRST = row("teacher", 1.0, 1.0, 1.0, "first")
QUIET = (0.98, 1.0, 1.02)


def judged(student, itself=QUIET):
    return verdict([FIRST, row("teacher, again", *itself, "again"), row("student", *student)])[2]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ((1.7, 1.8, 1.9), "1.80x faster"),
        ((0.6, 0.7, 0.9), "0.70x: slower"),
        ((0.9, 1.1, 1.3), "no measurable difference"),
        ((1.01, 1.1, 1.3), "no measurable difference"),
        ((0.9, 0.95, 0.99), "no measurable difference"),
        ((1.0, 1.0, 1.0), "no measurable difference"),
    ],
    ids=["faster", "slower", "contains-1", "overlap-above", "overlap-below", "equal"],
)
def test_verdicts(student, expected):
    assert judged(student) == expected


def test_a_model_that_waits_for_its_core_gives_no_verdicts():
    first = replace(FIRST, median_ms=145.0, cpu_ms=7.1)
    rows = [first, replace(first, model="teacher, again", kind="again"), row("student", 57.0, 62.0, 81.0)]
    assert verdict(rows)[2] == BUSY
    assert verdict(rows, "cpu")[2] == "62.00x faster"


def test_a_busy_machine_gives_no_verdicts():
    assert judged((1.7, 1.8, 1.9), itself=(1.02, 1.04, 1.06)) == BUSY
    assert judged((1.7, 1.8, 1.9), itself=(1.001, 1.004, 1.006)) == "1.80x faster"


quartiles = st.lists(st.floats(0.01, 1e4), min_size=3, max_size=3).map(sorted)


@given(quartiles, quartiles)
def test_no_verdict_flatters(itself, student):
    text = judged(student, itself)
    if "faster" in text:
        assert student[0] > max(itself[2], 1)
    elif "slower" in text:
        assert student[2] < min(itself[0], 1)
    else:
        assert text in ("no measurable difference", BUSY)


def test_each_batch_size_has_its_own_second_timing():
    rows = [FIRST, row("teacher, again", 1.1, 1.2, 1.3, "again"), row("student", 2.9, 3.0, 3.1)]
    rows += [replace(each, batch_size=32) for each in (FIRST, row("teacher, again", *QUIET, "again"), rows[2])]
    assert verdict(rows)[2::3] == [BUSY, "3.00x faster"]


def test_rows_without_the_second_timing_are_refused():
    with pytest.raises(LmcompressError, match="rows must hold the second timing .* got none beside 'student'"):
        verdict([FIRST, row("student", 2.9, 3.0, 3.1)])


def test_the_machine_is_described_in_json():
    described = machine()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1 and described["threads"] == torch.get_num_threads()
    assert described["processor"]


def test_the_machine_names_the_instruction_sets_of_its_processor(monkeypatch):
    files = {"flags": "fpu sse4_2 avx2 avx512f avx512_vnni avx512_bitalg amx_tile amx_int8"}
    monkeypatch.setattr(speed, "_proc_value", lambda file, key: files.get(key))
    assert machine()["instructions"] == "avx2, avx512f, avx512_vnni, amx_int8"
    files["flags"] = "fpu sse4_2"
    assert machine()["instructions"] == ""
    del files["flags"]
    assert machine()["instructions"] is None


@pytest.mark.parametrize(("cpu", "expected"), [(1.0, False), (0.81, False), (0.79, True), (0.5, True)])
def test_a_call_waited_if_much_more_time_passed_than_it_computed(cpu, expected):
    assert timing.waited(1.0, cpu) is expected
