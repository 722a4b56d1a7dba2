"""Models in processes of their own."""

import os

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import Worker, compare_latency


def build(seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).train()


def lacks():
    raise ImportError("No module named 'runtime'")


def dies():
    os._exit(3)


@pytest.fixture(scope="module")
def worker():
    with Worker(build, 0, threads=1) as made:
        yield made


@pytest.fixture
def ids():
    return torch.arange(6).reshape(2, 3)


def test_a_worker_answers_as_the_model_in_evaluation_mode(worker, ids):
    logits, *_ = worker(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(logits, build(0).eval()(ids).logits.detach())
    assert worker.eval() is worker and worker.can_generate() and worker.config.vocab_size == 50


def test_its_process_takes_the_time(worker, ids):
    call = worker.prepare(ids, "generate", 2)
    first, second = call(), call()
    assert min(*first, *second) > 0 and first != second


def test_it_is_compared_with_a_model_of_this_process(worker):
    models = {"here": build(0), "there": worker}
    rows = compare_latency(models, batch_sizes=(1,), sequence_length=4, repeats=3, warmup=1)
    assert [row.model for row in rows] == ["here", "here, again", "there"]
    with pytest.raises(LmcompressError, match=r"'there' is computed on cpu by another runtime and cannot move to meta"):
        compare_latency(models, batch_sizes=(1,), sequence_length=4, repeats=3, device="meta")


def test_what_fails_there_is_told_here_and_the_worker_lives_on(worker, ids):
    with pytest.raises(LmcompressError, match="build failed in its own process: IndexError: index out of range"):
        worker(input_ids=ids + 1000, attention_mask=torch.ones_like(ids))
    assert worker(input_ids=ids, attention_mask=torch.ones_like(ids))[0].shape == (2, 3, 50)


def test_a_missing_runtime_is_an_import_error():
    with pytest.raises(ImportError, match="No module named 'runtime'"):
        Worker(lacks)


def test_a_process_that_dies_is_told_with_its_exit_code():
    with pytest.raises(LmcompressError, match="the process of dies must answer, it ended with exit code 3"):
        Worker(dies)


def test_a_closed_worker_has_ended():
    made = Worker(build, 0)
    made.close()
    assert not made._process.is_alive()
