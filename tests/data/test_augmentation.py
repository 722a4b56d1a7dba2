"""Augmentation."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.data import (
    augment,
    delete_tokens,
    long_disorder,
    mask_tokens,
    n_gram_sample,
    nearest_words,
    replace_tokens,
    short_disorder,
    train_tokenizer,
)
from lmcompress.errors import LmcompressError

NEIGHBOURS = {"a": ["b", "c"], "bb": ["dd"], "abc": ["efg", "g"]}
REPLACE = partial(replace_tokens, neighbours=NEIGHBOURS)
OPERATIONS = [mask_tokens, delete_tokens, n_gram_sample, short_disorder, partial(long_disorder, length=4), REPLACE]
words_of = st.lists(st.text("abcdefg", min_size=1), max_size=30)


def rng(seed=0):
    return np.random.default_rng(seed)


@given(words_of, st.integers(0, 2**32), st.sampled_from(OPERATIONS))
def test_an_operation_is_repeatable_changes_no_input_and_keeps_something(words, seed, operation):
    before = list(words)
    out = operation(words, rng(seed))
    assert words == before
    assert out == operation(words, rng(seed))
    assert bool(out) == bool(words)


@given(words_of, st.integers(0, 2**32))
def test_what_each_operation_keeps(words, seed):
    masked = mask_tokens(words, rng(seed), p=0.5, mask_token="#")
    assert all(new in (old, "#") for old, new in zip(words, masked, strict=True))
    remaining = iter(words)
    assert all(word in remaining for word in delete_tokens(words, rng(seed), p=0.5))
    sample = n_gram_sample(words, rng(seed))
    assert not words or any(words[i : i + len(sample)] == sample for i in range(len(words)))
    for disordered in (short_disorder(words, rng(seed), p=0.5), long_disorder(words, rng(seed), p=0.5, length=6)):
        assert Counter(disordered) == Counter(words)


@given(words_of, st.integers(0, 2**32))
def test_words_give_way_to_neighbours_and_all_others_stay(words, seed):
    replaced = REPLACE(words, rng(seed), p=1.0)
    assert all(new in NEIGHBOURS.get(old, [old]) for old, new in zip(words, replaced, strict=True))


def test_every_neighbour_is_drawn_as_often():
    drawn = Counter(REPLACE(["a"] * 20_000, rng(), p=0.6))
    assert {word: round(number / 20_000, 1) for word, number in drawn.items()} == {"a": 0.4, "b": 0.3, "c": 0.3}


def test_punctuation_stays_and_capitals_are_looked_up_as_small_letters_where_they_are_unknown():
    words = ["(Abc,", "abc", "a-bc", "...", "BB!"]
    out = replace_tokens(words, rng(), neighbours={"abc": ["x"], "bb": ["y"], "BB": ["Y"]}, p=1.0)
    assert out == ["(x,", "x", "a-bc", "...", "Y!"]


def test_nearest_words_are_those_of_the_greatest_cosine(bert):
    drawn = torch.randn(len(bert), 8, generator=torch.Generator().manual_seed(0))
    near = nearest_words(drawn, bert, count=3)
    assert len(near) > 5
    vocabulary = bert.get_vocab()
    special = set(bert.all_special_tokens)
    assert all(word in vocabulary and word.isalpha() and len(word) > 1 and word not in special for word in near)
    for word in list(near)[:20]:
        others = sorted(near.keys() - {word})
        cosines = torch.cosine_similarity(drawn[vocabulary[word]], drawn[[vocabulary[other] for other in others]])
        assert near[word] == tuple(others[i] for i in cosines.topk(3).indices)
    # lengths do not count, only directions
    lengths = torch.rand(len(drawn), 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert nearest_words(drawn * lengths, bert, count=1) == {word: (n[0],) for word, n in near.items()}


def test_nearest_words_of_a_byte_level_vocabulary_stand_within_a_text(gpt2):
    near = nearest_words(torch.randn(len(gpt2), 8), gpt2, count=2)
    assert near
    assert all(len(gpt2(" " + word)["input_ids"]) == 1 for word in near)


def test_words_that_have_no_neighbours_to_offer_are_refused(bert):
    with pytest.raises(LmcompressError, match=r"the tokenizer has \d+ tokens and the embeddings have 3 rows"):
        nearest_words(torch.randn(3, 4), bert)
    embeddings = torch.randn(len(bert), 4)
    with pytest.raises(LmcompressError, match="count must be >= 1, got 0"):
        nearest_words(embeddings, bert, count=0)
    letters = train_tokenizer(["a b c"], kind="wordpiece", vocab_size=9)
    with pytest.raises(LmcompressError, match="tokens has 0 whole words, so there is nothing to replace words by"):
        nearest_words(torch.randn(len(letters), 4), letters)


def test_fewer_words_than_neighbours_asked_for_are_all_neighbours(bert):
    near = nearest_words(torch.randn(len(bert), 4), bert, count=1_000_000)
    assert all(set(others) == near.keys() - {word} for word, others in near.items())


@given(words_of, st.integers(0, 2**32))
def test_probability_zero_changes_nothing(words, seed):
    for operation in (mask_tokens, delete_tokens, short_disorder, long_disorder, REPLACE):
        assert operation(words, rng(seed), p=0.0) == words


def test_probabilities_are_those_asked_for():
    words = ["w"] * 20_000
    assert abs(mask_tokens(words, rng(), p=0.3).count("[MASK]") / 20_000 - 0.3) < 0.01
    assert abs(len(delete_tokens(words, rng(), p=0.3)) / 20_000 - 0.7) < 0.01


def test_one_word_stays_when_all_would_go():
    assert delete_tokens(["a", "b"], rng(), p=1.0) in (["a"], ["b"])


@pytest.mark.parametrize("length", [2, 4, 10])
def test_long_disorder_swaps_halves(length):
    words = list(map(str, range(10)))
    out = long_disorder(words, rng(), p=1.0, length=length)
    half = length // 2
    assert out[:length] == words[half:length] + words[:half]


def test_new_rows_follow_the_old_with_their_labels(sentences):
    rows = Dataset.from_dict({"text": sentences, "label": [i % 2 for i in range(len(sentences))]})
    rows = rows.cast_column("label", ClassLabel(names=["a", "b"]))
    out = augment(rows, ["text"], [partial(mask_tokens, p=0.5)], copies=3, seed=1)
    n = len(rows)
    assert len(out) == 4 * n
    assert out.select(range(n)).to_list() == rows.to_list()
    assert out["label"][:] == rows["label"][:] * 4
    assert out.features == rows.features
    assert any("[MASK]" in text for text in out["text"][n:])
    assert len({tuple(out["text"][i * n : (i + 1) * n]) for i in range(4)}) == 4


def test_new_rows_depend_on_the_seed_only(sentences):
    rows = Dataset.from_dict({"a": sentences, "b": sentences})
    make = partial(augment, rows, ["a", "b"], [short_disorder, delete_tokens], copies=2)
    assert make(seed=1).to_list() == make(seed=1).to_list() != make(seed=2).to_list()


def test_what_can_not_be_augmented_is_refused():
    rows = Dataset.from_dict({"text": ["a"], "tokens": [["a"]]})
    for arguments, message in [
        ((["txt"], [mask_tokens]), "no column 'txt' to augment; did you mean 'text'"),
        ((["tokens"], [mask_tokens]), "column 'tokens' must hold strings to be augmented, got List"),
        ((["text"], []), "operations must name at least one"),
    ]:
        with pytest.raises(LmcompressError, match=message):
            augment(rows, *arguments)
    with pytest.raises(LmcompressError, match="copies must be >= 1, got 0"):
        augment(rows, ["text"], [mask_tokens], copies=0)
    for operation in (mask_tokens, delete_tokens, short_disorder, long_disorder, REPLACE):
        with pytest.raises(LmcompressError, match=r"p must be in \[0, 1\], got 1.5"):
            operation(["a"], rng(), p=1.5)
    for length in (0, 3):
        with pytest.raises(LmcompressError, match=f"length must be an even number of words >= 2, got {length}"):
            long_disorder(["a"], rng(), length=length)
    for lengths in ([], [0, 1]):
        with pytest.raises(LmcompressError, match="lengths must be numbers of words >= 1"):
            n_gram_sample(["a"], rng(), lengths=lengths)
