from __future__ import annotations

import json
import math
import time

import pytest
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmcompress.activations.capture import extract
from lmcompress.distillation.store import TeacherStore, expand_top_k, row_keys, teacher_fingerprint
from lmcompress.distillation.store import format as layout
from lmcompress.distillation.store import writer as module
from lmcompress.errors import LmcompressError

VOCAB = 64


def rows(count=7, seed=0):
    """Rows of ragged length; the last one has a single token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [*torch.randint(2, 10, (count - 1,), generator=generator).tolist(), 1]
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def collate(batch, *, side="right", length=None, types=False):
    length = length or max(map(len, batch))
    ids, mask = torch.ones(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.long)
    for row, tokens in enumerate(batch):
        place = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if types else {})


def build(folder, teacher, data=None, collator=collate, **options):
    options = dict(extract=extract, batch_size=3, progress=False, dtype="float32") | options
    return TeacherStore.build(folder, teacher, rows() if data is None else data, collator, **options)


def one_by_one(teacher, data, features=()):
    """The independent reference: every row alone, without padding."""
    return [extract(teacher, collate([row]), list(features)) for row in data]


ALL = [("hidden", 0), ("hidden", 3), ("scores", 1), ("probabilities", 2), ("queries", 3), ("values", 1)]


@pytest.mark.parametrize("head", ["classification", "tokens", "language"])
def test_lookup_gives_what_the_teacher_answers_in_any_order_and_padding(tmp_path, family, head):
    teacher, data = make(family, head), rows()
    store = build(tmp_path / "store", teacher, data, features=ALL)
    assert len(store) == len(data) and store.features == tuple(ALL)
    order = [5, 0, 6, 2]
    batch = collate([data[i] for i in order], length=13)
    stored = store.lookup(batch, ALL)
    assert stored.top_k is None
    for place, (logits, features) in enumerate(one_by_one(teacher, [data[i] for i in order], ALL)):
        n = len(data[order[place]])
        mine = stored.logits[place] if head == "classification" else stored.logits[place, :n]
        torch.testing.assert_close(mine, logits[0], rtol=1e-4, atol=1e-5)
        for feature, reference in features.items():
            found, axes = stored.features[feature][place], module._LENGTH_AXES[feature[0]]
            for axis in axes:
                assert not found.narrow(axis, n, 13 - n).any()
                found = found.narrow(axis, 0, n)
            torch.testing.assert_close(found, reference[0], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_gets_the_same_rows_on_the_right(tmp_path):
    teacher, data = make("gpt2", "language"), rows()
    store = build(tmp_path / "store", teacher, data, features=[("scores", 1), ("hidden", 2)])
    left, right = (store.lookup(collate(data, side=side), store.features) for side in ("left", "right"))
    for row, tokens in enumerate(data):
        n = len(tokens)
        torch.testing.assert_close(left.logits[row, -n:], right.logits[row, :n])
        assert not left.logits[row, :-n].any()
        torch.testing.assert_close(left.features["hidden", 2][row, -n:], right.features["hidden", 2][row, :n])
        scores = left.features["scores", 1][row]
        torch.testing.assert_close(scores[:, -n:, -n:], right.features["scores", 1][row][:, :n, :n])
        assert not scores[:, :-n].any() and not scores[:, :, :-n].any()


def test_many_shards_hold_the_same_as_one(tmp_path, monkeypatch):
    teacher, data = make("bert", "tokens"), rows(20)
    whole = build(tmp_path / "whole", teacher, data, features=ALL)
    monkeypatch.setattr(module, "SHARD_BYTES", 2000)
    pieces = build(tmp_path / "pieces", teacher, data, features=ALL)
    assert len(whole.meta.shards) == 1 and len(pieces.meta.shards) > 3
    batch = collate(data[::-1])
    one, other = whole.lookup(batch, ALL), pieces.lookup(batch, ALL)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=0)


def test_float16_logits_are_exact_relative_to_the_greatest_however_large_they_are(tmp_path):
    """GPT-2's logits lie around -100, where float16 has steps of 1/16."""
    teacher, data = make("gpt2", "language"), rows()

    def shifted(model, batch, features):
        logits, captured = extract(model, batch, features)
        return logits - 117.3, captured

    store = build(tmp_path / "store", teacher, data, extract=shifted, dtype="float16")
    stored = store.lookup(collate(data))
    for row, (logits, _) in enumerate(one_by_one(teacher, data)):
        mine = stored.logits[row, : len(data[row])]
        torch.testing.assert_close(mine.softmax(-1), logits[0].softmax(-1), rtol=5e-3, atol=1e-5)
        torch.testing.assert_close(mine, logits[0] - 117.3, rtol=0, atol=5e-3)


@pytest.mark.parametrize("head", ["classification", "language"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_greatest_logits_are_stored_with_their_true_probabilities(tmp_path, head, dtype):
    teacher, data = make("gpt2", head), rows()
    store = build(tmp_path / "store", teacher, data, top_k=2, dtype=dtype)
    stored = store.lookup(collate(data, length=12))
    assert stored.logits is None
    assert (store.meta.top_k, store.meta.vocab_size) == (2, 3 if head == "classification" else VOCAB)
    full = stored.top_k.logits()
    assert full.isfinite().all()
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=3e-3, atol=1e-5)
    for row, (logits, _) in enumerate(one_by_one(teacher, data)):
        mine = full[row] if head == "classification" else full[row, : len(data[row])]
        best = logits[0].topk(2).indices
        expected = logits[0].softmax(-1).gather(-1, best)
        torch.testing.assert_close(mine.softmax(-1).gather(-1, best), expected, **tolerance)
        torch.testing.assert_close(mine.gather(-1, best), logits[0].gather(-1, best), rtol=0, atol=2e-2)
    if head == "language":
        padding = full[-1, 1:]
        torch.testing.assert_close(padding.softmax(-1), torch.full_like(padding, 1 / VOCAB))


@given(
    st.integers(1, 12).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v))),
    st.integers(0, 1000),
    st.floats(0.1, 20),
    st.floats(-200, 200),
)
def test_expanded_probabilities_are_those_kept_and_sum_to_one(sizes, seed, spread, offset):
    vocab, k = sizes
    logits = torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(seed)) * spread + offset
    top = logits.topk(k)
    total = logits.logsumexp(-1)
    expanded = expand_top_k(top.values, top.indices, total, vocab)
    assert expanded.isfinite().all()
    if k == vocab:
        assert torch.equal(expanded, logits)
    probabilities = (expanded - total.unsqueeze(-1)).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 2), rtol=0, atol=1e-3)
    kept = logits.softmax(-1).gather(-1, top.indices)
    torch.testing.assert_close(expanded.softmax(-1).gather(-1, top.indices), kept, rtol=1e-3, atol=1e-6)
    others = expanded.scatter(-1, top.indices, float("-inf"))
    if k < vocab:  # what is left is even
        lowest = expanded.scatter(-1, top.indices, float("inf")).amin(-1)
        torch.testing.assert_close(others.amax(-1), lowest)


def test_expanding_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(LmcompressError, match=r"k from 1 to vocab_size 2.*got \(3,\), \(3,\)"):
        expand_top_k(torch.zeros(3), torch.zeros(3), torch.tensor(0.0), 2)


@given(st.lists(st.lists(st.integers(2, 9), min_size=0, max_size=6), min_size=1, max_size=6), st.integers(6, 9))
def test_keys_depend_on_tokens_only(data, length):
    right = row_keys(collate(data, length=length))
    assert right == row_keys(collate(data, side="left", length=length + 3))
    assert len(set(right)) == len({tuple(row) for row in data})


def test_keys_see_token_types_and_prefer_the_teachers_own_inputs():
    batch = collate([[2, 3, 4]], types=True)
    other = batch | {"token_type_ids": torch.tensor([[0, 1, 1]])}
    assert len({*row_keys(batch), *row_keys(other), *row_keys(collate([[2, 3, 4]]))}) == 3
    student = collate([[9, 9]])
    both = student | {f"teacher_{name}": tensor for name, tensor in batch.items()}
    assert row_keys(both) == row_keys(batch)
    with pytest.raises(LmcompressError, match="needs input_ids"):
        row_keys({"labels": torch.zeros(2)})
    with pytest.raises(LmcompressError, match=r"attention_mask must have the shape of input_ids \(1, 3\)"):
        row_keys(batch | {"attention_mask": torch.ones(1, 4)})


def test_a_teacher_with_its_own_tokenizer_is_stored_and_found_by_its_own_tokens(tmp_path):
    teacher, data = make("distilbert", "tokens"), rows()

    def both(batch):
        theirs = {f"teacher_{name}": tensor for name, tensor in collate(batch, types=True).items()}
        return collate([[5] * 3 for _ in batch]) | theirs

    store = build(tmp_path / "store", teacher, data, both)  # DistilBERT takes no token types
    stored = store.lookup(both(data))
    torch.testing.assert_close(stored.logits[-1, 0], one_by_one(teacher, data)[-1][0][0, 0], rtol=1e-4, atol=1e-5)
    assert stored.logits.shape[1] == max(map(len, data))


def test_rows_with_the_same_tokens_are_stored_once(tmp_path):
    data = rows()
    store = build(tmp_path / "store", make("bert"), [*data, *data[::-1]])
    assert len(store) == len(data)


def test_the_teacher_keeps_its_mode_and_runs_without_dropout(tmp_path):
    teacher = make("bert", hidden_dropout_prob=0.5).train()
    store = build(tmp_path / "store", teacher)
    assert teacher.training
    expected = extract(teacher.eval(), collate(rows()), [])[0]
    torch.testing.assert_close(store.lookup(collate(rows())).logits, expected, rtol=1e-4, atol=1e-5)


def test_fingerprints_see_weights_and_config_but_not_names_and_modes(tmp_path):
    teacher = make("bert")
    reference = teacher_fingerprint(teacher)
    teacher.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path, attn_implementation="eager")
    again(**collate(rows()), labels=torch.zeros(7, dtype=torch.long))  # writes problem_type into the config
    assert teacher_fingerprint(again.train()) == reference
    with torch.no_grad():
        again.classifier.bias[0] += 1e-6
    assert teacher_fingerprint(again) != reference
    assert teacher_fingerprint(make("bert", layer_norm_eps=1e-6)) != reference
    assert teacher_fingerprint(make("bert").bfloat16()) != reference
    with pytest.raises(LmcompressError, match="on meta"):
        teacher_fingerprint(make("bert").to("meta"))


def test_a_store_of_another_teacher_is_refused(tmp_path):
    build(tmp_path / "store", make("bert"))
    assert len(TeacherStore.open(tmp_path / "store", teacher=make("bert"))) == 7
    with pytest.raises(LmcompressError, match="was made by another teacher.*weights or config differ"):
        TeacherStore.open(tmp_path / "store", teacher=make("bert", seed=1))


def test_rows_that_have_changed_are_refused_and_counted(tmp_path):
    store = build(tmp_path / "store", make("bert"))
    data = rows()
    data[2] = [*data[2], 3]
    data[4] = data[4][:-1]
    with pytest.raises(LmcompressError, match=r"2 of 7 rows of the batch are not in the store.*\(7 rows\)"):
        store.lookup(collate(data))


def test_features_that_are_not_stored_are_refused_with_those_that_are(tmp_path):
    store = build(tmp_path / "store", make("bert"), features=[("hidden", -1), ("hidden", 3), ("scores", 1)])
    assert store.features == (("hidden", 3), ("scores", 1))
    assert set(store.lookup(collate(rows()), [("hidden", -1)]).features) == {("hidden", 3)}
    with pytest.raises(LmcompressError, match="no feature hidden 1. Stored are: hidden 3, scores 1"):
        store.lookup(collate(rows()), [("hidden", 1)])
    with pytest.raises(LmcompressError, match="unknown feature 'hiden'"):
        build(tmp_path / "other", make("bert"), features=[("hiden", 1)])


@pytest.mark.parametrize("name", ["index.safetensors", "shard-00000.safetensors"])
def test_truncated_missing_and_flipped_files_are_refused(tmp_path, name):
    folder = tmp_path / "store"
    build(folder, make("bert", "tokens"))
    path, whole = folder / name, (folder / name).read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(LmcompressError, match=rf"{name} has {len(whole) - 1} bytes instead of {len(whole)}"):
        TeacherStore.open(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LmcompressError, match=rf"damaged: .*{name}: its hash"):
        TeacherStore.open(folder).lookup(collate(rows()))
    path.unlink()
    with pytest.raises(LmcompressError, match=rf"{name} is missing"):
        TeacherStore.open(folder)


def edit(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=2), "format version 2, this lmcompress reads up to 1"),
        (dict(format_version="1"), "not valid: format_version"),
        (dict(rows=0), "not valid: rows"),
        (dict(rows=8), "does not hold what meta.json says"),
        (dict(vocab_size=4), "does not hold what the index says"),
        (dict(teacher="../x"), "not valid: teacher"),
        (dict(extra=1), "not valid: extra"),
        (dict(features=[dict(kind="gradient", layer=1, shape=[0, 3])]), "not valid: features.0.kind"),
        (dict(features=[dict(kind="hidden", layer=1, shape=[0, 3])]), "does not hold what the index says"),
    ],
)
def test_a_meta_file_that_lies_is_refused(tmp_path, changes, message):
    build(tmp_path / "store", make("bert", "tokens"))
    edit(tmp_path / "store", **changes)
    with pytest.raises(LmcompressError, match=message):
        TeacherStore.open(tmp_path / "store").lookup(collate(rows()))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_meta_file_that_is_no_object_is_refused(tmp_path, text):
    build(tmp_path / "store", make("bert"))
    (tmp_path / "store" / "meta.json").write_text(text)
    with pytest.raises(LmcompressError, match="is not JSON|is not valid"):
        TeacherStore.open(tmp_path / "store")


def test_an_index_that_points_outside_is_refused(tmp_path):
    folder = tmp_path / "store"
    build(folder, make("bert", "tokens"))
    index = load_file(folder / "index.safetensors")
    save_file(index | {"shards": index["shards"] + 5}, folder / "index.safetensors")
    info = layout.file_info(folder / "index.safetensors")
    edit(folder, index=info.model_dump())
    with pytest.raises(LmcompressError, match="has invalid row or shard numbers"):
        TeacherStore.open(folder)


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="holds no teacher store"):
        TeacherStore.open(tmp_path)


def test_a_build_that_fails_leaves_the_store_that_was_there(tmp_path):
    folder, calls = tmp_path / "store", []
    build(folder, make("bert"))

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the power went")
        return extract(*args)

    with pytest.raises(RuntimeError, match="power"):
        build(folder, make("bert", seed=1), extract=failing)
    assert len(TeacherStore.open(folder, teacher=make("bert"))) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_store_is_replaced_and_nothing_else_is(tmp_path):
    teacher = make("bert", seed=1)
    build(tmp_path / "store", make("bert"))
    (tmp_path / "store" / "index.safetensors").write_bytes(b"")  # a damaged one, too
    assert len(build(tmp_path / "store", teacher, rows(5))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(LmcompressError, match=r"holds files but no meta.json"):
        build(tmp_path / "teacher", teacher)
    assert (tmp_path / "teacher" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="float61"), "did you mean 'float16'"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(top_k=0), "top_k must be from 1 to the teacher's 3 logits, got 0"),
        (dict(top_k=4), "top_k must be from 1 to the teacher's 3 logits, got 4"),
        (dict(data=[]), "no rows"),
        (dict(extract=lambda *a: (torch.full((3, 3), math.nan), {})), "NaN or infinite"),
        (dict(extract=lambda *a: (torch.zeros(3, 4, 5, 6), {})), r"returned \(3, 4, 5, 6\)"),
        (
            dict(
                extract=lambda m, b, f: (torch.zeros(3, 2), {f[0]: torch.full((3, b["input_ids"].shape[1], 2), 1e5)}),
                features=[("hidden", 1)],
                dtype="float16",
            ),
            r"hidden.1 reaches 1e\+05.*dtype='float32'",
        ),
        (
            dict(extract=lambda m, b, f: (torch.zeros(3, 2), {f[0]: torch.zeros(3, 99, 2)}), features=[("hidden", 1)]),
            r"axis 1 of the feature hidden 1 must be the length \d+, got the shape \(3, 99, 2\)",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, options, message):
    with pytest.raises(LmcompressError, match=message):
        build(tmp_path / "store", make("bert"), **options)
    assert not (tmp_path / "store").exists()


def test_answers_that_change_shape_between_batches_are_refused(tmp_path):
    shapes = iter([3, 4])
    with pytest.raises(LmcompressError, match="logits of 3 per row, then 4 per row"):
        build(tmp_path / "store", make("bert"), extract=lambda *a: (torch.zeros(3, next(shapes)), {}))


def test_tokens_without_probability_stay_finite(tmp_path):
    def masked(model, batch, features):
        logits, captured = extract(model, batch, features)
        logits[..., 0] = float("-inf")
        return logits, captured

    for number, options in enumerate([dict(), dict(top_k=3)]):
        store = build(tmp_path / str(number), make("bert"), extract=masked, dtype="float16", **options)
        stored = store.lookup(collate(rows()))
        logits = stored.top_k.logits() if options else stored.logits
        assert logits.isfinite().all() and (logits.softmax(-1)[:, 0] == 0).all()


def test_a_batch_of_32_classifications_takes_milliseconds(tmp_path):
    data = rows(64)
    store = build(tmp_path / "store", make("bert"), data, batch_size=32)
    batch = collate(data[:32], length=128)
    store.lookup(batch)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        store.lookup(batch)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005
