import pytest
import torch

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import Memory, measure_peak_memory, peak_memory
from lmcompress.evaluation.memory import _memory_of

MIB = 2**20


def allocate_and_free(mebibytes):
    kept = bytearray(mebibytes * MIB)
    return len(kept)


def test_the_peak_is_of_the_call_and_not_of_what_was_before():
    held_once = bytearray(300 * MIB)
    del held_once
    used = _memory_of(allocate_and_free, 200).used_bytes
    assert 195 * MIB < used < 280 * MIB


@pytest.mark.slow
def test_the_peak_of_a_fresh_process_knows_nothing_of_this_one():
    ballast = bytearray(300 * MIB)
    memory = peak_memory(allocate_and_free, 200, device="cpu")
    assert len(ballast) == 300 * MIB
    assert 195 * MIB < memory.used_bytes < 280 * MIB


@pytest.mark.slow
def test_a_checkpoint_takes_more_than_nothing(make_classifier, tmp_path):
    make_classifier().save_pretrained(tmp_path)
    memory = measure_peak_memory(tmp_path, "AutoModelForSequenceClassification", batch=2, length=8, threads=1)
    assert memory.baseline_bytes > 50 * MIB  # torch
    assert 0 < memory.used_bytes < 1000 * MIB


def test_use_is_never_below_nothing():
    assert Memory(baseline_bytes=5, peak_bytes=3).used_bytes == 0


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_that_of_torch():
    memory = peak_memory(lambda: torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda"))
    assert memory.used_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure_peak_memory("/", "AutoModelForCausalLLM"), "did you mean 'AutoModelForCausalLM'"),
        (lambda: measure_peak_memory("/nowhere/at/all"), "folder must exist, '/nowhere/at/all' does not"),
        (lambda: peak_memory(allocate_and_free, 1, device="meta"), "on cpu and cuda, got 'meta'"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(LmcompressError, match=message):
        call()


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(LmcompressError, match=r"measuring the memory of .* failed:\n(.|\n)*config.json"):
        measure_peak_memory(tmp_path, threads=1)
