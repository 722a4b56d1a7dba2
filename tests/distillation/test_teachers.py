"""Where teachers come from: precisions of models from disk, and stores that are not what is asked for."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from families import inputs, make
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lmcompress import LmcompressError
from lmcompress.activations.capture import extract
from lmcompress.distillation import LiveTeacher, StoredTeacher, TeacherStore, load_teacher
from lmcompress.distillation.teachers import teacher_inputs


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_teacher_is_loaded_in_the_precision_wanted_and_answers(tmp_path, family, precision, dtype):
    model = make(family, "language" if family == "gpt2" else "classification")
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family == "gpt2" else AutoModelForSequenceClassification
    loaded = load_teacher(tmp_path, auto, precision)
    assert loaded.dtype == dtype
    teacher, batch = LiveTeacher(loaded), inputs(model)
    teacher.prepare([("hidden", 2)], logits=True, causal=family == "gpt2", device=torch.device("cpu"))
    answers = teacher.answer(batch, nullcontext)
    with torch.no_grad():
        expected = model(**batch).logits
    if family == "gpt2":
        rows = torch.tensor([0, 5, 11])
        given, expected = answers.chunk(rows)(1, 3), expected.flatten(0, 1)[rows[1:3]]
    else:
        given = answers.logits
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 2e-2}[precision]
    torch.testing.assert_close(given.float(), expected, rtol=tolerance, atol=tolerance)
    assert answers.features["hidden", 2].dtype == dtype


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_eight_and_four_bits_say_what_to_install(tmp_path, monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LmcompressError, match=rf'{precision} needs bitsandbytes: pip install "lmcompress\[bnb\]"'):
        load_teacher(tmp_path, AutoModelForSequenceClassification, precision)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="precision must be float32, .* got 'int8'"):
        load_teacher(tmp_path, AutoModelForSequenceClassification, "int8")


def test_a_teacher_reads_its_own_columns_where_there_are_any():
    batch = {"input_ids": 1, "attention_mask": 2, "labels": 3, "task": "a"}
    assert teacher_inputs(batch) == {"input_ids": 1, "attention_mask": 2}
    assert teacher_inputs({**batch, "teacher_input_ids": 4, "teacher_labels": 5}) == {"input_ids": 4}


def rows(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    batch = inputs(make("bert"), seed=seed)
    return [{name: column[row] for name, column in batch.items()} for row in range(3)]


@pytest.fixture
def built(tmp_path):
    teacher = make("bert", seed=2)
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows(), default_collate, extract=extract, features=[("hidden", 1)], progress=False
    )
    return teacher, store


def test_a_store_of_other_rows_is_refused(built):
    _, store = built
    teacher = StoredTeacher(store)
    teacher.prepare([("hidden", 1)], logits=True, causal=False, device=torch.device("cpu"))
    assert teacher.answer(default_collate(rows()[::-1]), nullcontext).features.keys() == {("hidden", 1)}
    stale = default_collate(rows(seed=1))
    with pytest.raises(LmcompressError, match="3 of 3 rows of the batch are not in the store.*tokenizer"):
        teacher.answer(stale, nullcontext)


def test_a_store_of_another_teacher_is_refused(built):
    teacher, store = built
    TeacherStore.open(store.folder, teacher=teacher)
    with torch.no_grad():
        teacher.classifier.bias[0] += 1
    with pytest.raises(LmcompressError, match="was made by another teacher.*weights or config differ"):
        TeacherStore.open(store.folder, teacher=teacher)


def test_a_store_without_the_feature_says_what_it_has(built):
    source = StoredTeacher(built[1])
    assert source.resolve("hidden", -3) == ("hidden", 1) and source.shape_of(("hidden", 1)) == (0, 16)
    with pytest.raises(LmcompressError, match="has no scores of layer 1, it has hidden 1: build it again"):
        source.resolve("scores", 1)


def test_a_teacher_that_is_released_can_be_prepared_again():
    model = make("gpt2", "language")
    teacher, batch = LiveTeacher(model), inputs(model)
    for layer in (1, 2):
        teacher.prepare([("hidden", layer)], logits=False, causal=True, device=torch.device("cpu"))
        assert set(teacher.answer(batch, nullcontext).features) == {("hidden", layer)}
        teacher.release()
    assert not any(m._forward_hooks for m in model.modules())
