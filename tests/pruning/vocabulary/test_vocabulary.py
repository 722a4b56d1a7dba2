"""Vocabulary pruning: texts are cut as before, the model answers as before, and both say so after a reload."""

import copy
import functools
import json
import random
from collections import Counter

import pytest
import torch
from families import FAMILIES, auto_class, cut_unevenly, make
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from lmcompress import CompressedModel, EquivalenceError, LmcompressError, UnknownFamilyError
from lmcompress.data import load_task, train_tokenizer
from lmcompress.pruning.vocabulary import tokenizers
from lmcompress.pruning.vocabulary.embeddings import count_tokens, prune_vocabulary
from lmcompress.pruning.vocabulary.report import REASONS

WORDPIECE = ("bert", "distilbert", "electra", "electra-projected")
BY_HEAD = [(family, head) for family in FAMILIES for head in ("base", "classification", "language")]
IDS = [f"{family}-{head}" for family, head in BY_HEAD]


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


@functools.cache
def _texts():
    return load_task("embedded/clinc150").train["text"][:600]


@functools.cache
def _trained(kind):
    return train_tokenizer(_texts(), kind=kind, vocab_size=700)


def make_tokenizer(name):
    """A tokenizer of the family's kind, trained on more than is pruned to."""
    if name in WORDPIECE:
        return copy.deepcopy(_trained("wordpiece"))
    gpt2 = _trained("bytelevel_bpe")
    if name == "gpt2":
        return copy.deepcopy(gpt2)
    words = [token for token in sorted(gpt2.get_vocab(), key=gpt2.get_vocab().get) if token != "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words, "<mask>"])}
    merges = json.loads(gpt2.backend_tokenizer.to_str())["model"]["merges"]
    return RobertaTokenizerFast(vocab=vocab, merges=[tuple(pair) for pair in merges])


def make_pair(family, head="classification", **config):
    name = str(family)
    tokenizer = make_tokenizer(name)
    if name == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token
        end = tokenizer.eos_token_id
        config = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end} | config
    config = {"vocab_size": len(tokenizer)} | config
    return make(name, head, **config), tokenizer


def answer(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=38, return_tensors="pt")
    with torch.no_grad():
        output = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
    first = output["logits"] if "logits" in output else output[0]
    return first * batch["attention_mask"][..., None] if first.dim() == 3 else first


def unseen_token(tokenizer):
    """A token of letters that the corpus below does not use; the vocabulary comes in another order each time."""
    seen = count_tokens(tokenizer, CORPUS)
    return min(token for token in tokenizer.get_vocab() if len(token) > 3 and token.isalpha() and token not in seen)


CORPUS = ["how much is a cat", "I'd like 3 of them, please!", "set a timer for ten minutes", "is it cold in chicago"]


@pytest.mark.parametrize(("family", "head"), BY_HEAD, ids=IDS)
def test_pieces_and_answers_are_the_same_before_and_after_and_reloaded(family, head, tmp_path):
    model, tokenizer = make_pair(family, head)
    pieces, before = [tokenizer.tokenize(text) for text in CORPUS], answer(model, tokenizer, CORPUS)
    new, report = prune_vocabulary(model, tokenizer, CORPUS)
    assert report.rows_after == len(new) == model.config.vocab_size < report.rows_before == len(tokenizer)
    assert [new.tokenize(text) for text in CORPUS] == pieces
    if head == "language":
        before = before[..., list(report.old_ids)]
    torch.testing.assert_close(answer(model, new, CORPUS), before)
    CompressedModel(model).save_pretrained(tmp_path / "model", tokenizer=new)
    again, tokens = (
        auto_class(family, head).from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert tokens.get_vocab() == new.get_vocab()
    torch.testing.assert_close(answer(again.eval(), tokens, CORPUS), before)


def test_a_model_that_was_cut_before_is_pruned_too(family, tmp_path):
    model, tokenizer = make_pair(family)
    cut_unevenly(model)
    before = answer(model, tokenizer, CORPUS)
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    CompressedModel(model).save_pretrained(tmp_path / "model", tokenizer=new)
    again = CompressedModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(answer(again.model.eval(), new, CORPUS), before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_heads_lose_the_rows_that_embeddings_lose_and_stay_tied(family, tied, tmp_path):
    model, tokenizer = make_pair(family, "language", tie_word_embeddings=tied)
    before = answer(model, tokenizer, CORPUS)
    sizes = {name: p.shape for name, p in model.named_parameters()}
    new, report = prune_vocabulary(model, tokenizer, CORPUS)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert embedding.num_embeddings == head.out_features == len(embedding.weight) == len(head.weight) == len(new)
    assert [name for name, p in model.state_dict().items() if report.rows_before in p.shape] == []
    assert sizes.keys() == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(answer(model, new, CORPUS), before[..., list(report.old_ids)])
    CompressedModel(model).save_pretrained(tmp_path / "model", tokenizer=new)


def test_what_is_frozen_stays_frozen_and_training_goes_on(family):
    model, tokenizer = make_pair(family, "language")
    model.get_input_embeddings().weight.requires_grad_(False)
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert not model.get_input_embeddings().weight.requires_grad
    model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([new(CORPUS[0])["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape[0] == len(new)


def test_bytes_saved_are_those_of_the_parameters(family):
    def size(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())

    for head in ("classification", "language"):
        model, tokenizer = make_pair(family, head)
        before = size(model)
        _, report = prune_vocabulary(model, tokenizer, CORPUS)
        assert report.bytes_saved == before - size(model) > 0


def test_special_ids_follow_in_configs_and_embeddings(family):
    model, tokenizer = make_pair(family)
    said = {k: v for k, v in vars(model.config).items() if k.endswith("_token_id") and v is not None}
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert said
    for name, old in said.items():
        assert new.convert_ids_to_tokens(getattr(model.config, name)) == tokenizer.convert_ids_to_tokens(old)
    assert {n: getattr(new, n) for n in new.SPECIAL_TOKENS_ATTRIBUTES if n != "extra_special_tokens"} == {
        n: getattr(tokenizer, n) for n in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if n != "extra_special_tokens"
    }
    padding = model.get_input_embeddings().padding_idx
    assert padding is None or padding == new.pad_token_id


def test_a_generation_config_is_renumbered_and_loses_what_has_gone():
    model, tokenizer = make_pair("gpt2", "language")
    ids = tokenizer.get_vocab()
    cat, gone = ids["Ġis"], ids[unseen_token(tokenizer)]
    generation = model.generation_config
    generation.eos_token_id = [tokenizer.eos_token_id, cat]
    generation.suppress_tokens, generation.begin_suppress_tokens = [cat, gone], [gone]
    generation.bad_words_ids = [[cat], [cat, gone]]
    generation.sequence_bias = [[[cat], -1.0], [[gone], 2.0]]
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    cat = new.get_vocab()["Ġis"]
    assert generation.eos_token_id == [new.eos_token_id, cat]
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([cat], None)
    assert (generation.bad_words_ids, generation.sequence_bias) == ([[cat]], [[[cat], -1.0]])
    generation.sequence_bias = {(cat,): -1.0}
    newer, _ = prune_vocabulary(model, new, CORPUS[:1])
    assert generation.sequence_bias == {(newer.get_vocab()["Ġis"],): -1.0}
    generation.max_new_tokens = 3
    assert model.generate(**newer("how much is", return_tensors="pt")).shape[1] > 3


def test_ids_that_are_of_no_row_are_left_alone():
    tokenizer = make_tokenizer("gpt2")
    model = make("gpt2", vocab_size=len(tokenizer), bos_token_id=50256, eos_token_id=50256, pad_token_id=None)
    prune_vocabulary(model, tokenizer, CORPUS)
    assert model.config.eos_token_id == 50256


def test_rows_of_the_table_that_are_padding_go():
    model, tokenizer = make_pair("bert")
    model.resize_token_embeddings(len(tokenizer) + 50)
    before = answer(model, tokenizer, CORPUS)
    new, report = prune_vocabulary(model, tokenizer, CORPUS)
    assert report.rows_before == len(tokenizer) + 50
    torch.testing.assert_close(answer(model, new, CORPUS), before)


def test_the_old_tokenizer_is_left_as_it_is_and_settings_come_along(family, tmp_path):
    model, tokenizer = make_pair(family)
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side = 33, "left", "left"
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.name_or_path = "some/name"
    state = tokenizer.backend_tokenizer.to_str()
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert tokenizer.backend_tokenizer.to_str() == state
    assert type(new) is type(tokenizer)
    for name in ("model_max_length", "padding_side", "truncation_side", "chat_template", "name_or_path"):
        assert getattr(new, name) == getattr(tokenizer, name)
    new.save_pretrained(tmp_path / "here")
    assert all("/tmp" not in file.read_text("utf-8") for file in (tmp_path / "here").iterdir())


def test_padding_and_truncation_of_the_tokenizer_file_are_renumbered_and_not_applied_to_the_corpus():
    model, tokenizer = make_pair("gpt2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="[PAD]", length=9)
    long = " ".join(_texts()[:50])
    counted = count_tokens(tokenizer, [long])
    new, report = prune_vocabulary(model, tokenizer, [long, *CORPUS])
    plain = make_tokenizer("gpt2")
    assert counted == Counter(plain.tokenize(long))
    assert report.tokens_before == sum(len(plain.tokenize(text)) for text in (long, *CORPUS))
    assert new.backend_tokenizer.truncation["max_length"] == 5
    assert new.backend_tokenizer.padding["pad_id"] == new.pad_token_id == len(new) - 1 < tokenizer.pad_token_id
    assert len(new.backend_tokenizer.encode("how much").ids) == 9


@pytest.mark.parametrize("kind", ["template", "sequence", "bert", "none"])
def test_ids_in_post_processors_are_renumbered(kind):
    words = "[X] q [Y] how much is a cat dog q2 [UNK] h o w".split()
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = processors.TemplateProcessing(
        single="[X] $A [Y]", pair="[X] $A [Y] $B:1 [Y]:1", special_tokens=[("[X]", 0), ("[Y]", 2)]
    )
    backend.post_processor = {
        "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
        "bert": processors.BertProcessing(("[Y]", 2), ("[X]", 0)),
        "none": None,
    }[kind] or processors.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[X]")
    model = make("bert", vocab_size=len(tokenizer))
    before = tokenizer.convert_ids_to_tokens(tokenizer("how much", "is a")["input_ids"])
    new, report = prune_vocabulary(model, tokenizer, ["how much is a cat"], keep_characters=False)
    assert new.convert_ids_to_tokens(new("how much", "is a")["input_ids"]) == before
    assert "dog" not in new.get_vocab() and "q" not in new.get_vocab()
    assert ("[Y]" in new.get_vocab()) == (kind != "none")


def test_added_tokens_stay_behind_the_others_and_are_found_in_texts():
    for name in ("bert", "gpt2", "roberta"):
        model, tokenizer = make_pair(name)
        tokenizer.add_tokens(["lmcompress", "mini batch"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
        model.resize_token_embeddings(len(tokenizer))
        text = "how much<turn> is lmcompress"
        new, report = prune_vocabulary(model, tokenizer, [text])
        assert new.tokenize(text) == tokenizer.tokenize(text)
        assert report.kept["added"] == ("lmcompress", "mini batch")
        assert "<turn>" in report.kept["special"]
        assert new.convert_ids_to_tokens(range(len(new) - 3, len(new))) == [*report.kept["added"], "<turn>"]
        assert new.all_special_tokens == tokenizer.all_special_tokens


def test_a_padding_token_that_was_added_is_renumbered():
    model, tokenizer = make_pair("gpt2")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    before = answer(model, tokenizer, CORPUS)
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert model.config.pad_token_id == new.pad_token_id == len(new) - 1
    torch.testing.assert_close(answer(model, new, CORPUS), before)


def _roberta_with_padding_at(place):
    """RoBERTa's tokenizer with words before its padding token, some of which go."""
    gpt2 = _trained("bytelevel_bpe")
    words = [token for token in sorted(gpt2.get_vocab(), key=gpt2.get_vocab().get, reverse=True) if token[0] != "<"]
    tokens = ["<s>", *words[: place - 1], "<pad>", "</s>", "<unk>", *words[place - 1 :], "<mask>"]
    merges = json.loads(gpt2.backend_tokenizer.to_str())["model"]["merges"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[tuple(pair) for pair in merges])
    ids = dict(pad_token_id=place, eos_token_id=place + 1, bos_token_id=0)
    return make("roberta", vocab_size=len(tokenizer), max_position_embeddings=place + 42, **ids), tokenizer


def test_the_id_from_which_positions_are_counted_does_not_move(tmp_path):
    model, tokenizer = _roberta_with_padding_at(20)
    before = answer(model, tokenizer, CORPUS)
    new, report = prune_vocabulary(model, tokenizer, CORPUS)
    assert new.pad_token_id == model.config.pad_token_id == 20
    assert sum(i < 20 for i in report.old_ids) < 20  # some of those before it have gone
    torch.testing.assert_close(answer(model, new, CORPUS), before)
    CompressedModel(model).save_pretrained(tmp_path / "model", tokenizer=new)


def test_positions_that_would_have_to_move_are_refused():
    model, tokenizer = _roberta_with_padding_at(600)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LmcompressError, match=r"must keep its id 600, .* only \d+ tokens are kept: raise max_size"):
        prune_vocabulary(model, tokenizer, CORPUS)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


# what stays, and why


def test_each_row_stays_for_one_reason_that_holds():
    for name in ("bert", "gpt2"):
        model, tokenizer = make_pair(name)
        asked = unseen_token(tokenizer)
        new, report = prune_vocabulary(model, tokenizer, CORPUS, keep=[asked])
        tokens = [token for group in report.kept.values() for token in group]
        assert sorted(tokens) == sorted(new.get_vocab())
        assert set(report.kept) <= set(REASONS)
        assert report.kept["asked for"] == (asked,)
        assert set(report.kept["special"]) == set(tokenizer.all_special_tokens)
        assert set(report.kept["corpus"]) <= set(count_tokens(tokenizer, CORPUS))
        assert tokenizer.convert_ids_to_tokens(report.old_ids) == new.convert_ids_to_tokens(range(len(new)))


def test_texts_that_the_corpus_does_not_have_can_still_be_read():
    unseen = "Zebras quickly jumped over 7 lazy dogs; ça va?"
    model, tokenizer = make_pair("gpt2")
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert new.decode(new(unseen)["input_ids"]) == unseen
    model, tokenizer = make_pair("bert")
    word = "zebras quickly jumped"
    assert tokenizer.unk_token not in tokenizer.tokenize(word)
    new, _ = prune_vocabulary(model, tokenizer, CORPUS)
    assert "".join(new.tokenize(word)).replace("##", "") == word.replace(" ", "")


def test_without_characters_only_what_was_seen_stays():
    model, tokenizer = make_pair("bert")
    new, report = prune_vocabulary(model, tokenizer, ["how much"], keep_characters=False)
    assert set(new.get_vocab()) == {*tokenizer.tokenize("how much"), *tokenizer.all_special_tokens}
    assert "alphabet" not in report.kept
    assert new.tokenize("zebra") == ["[UNK]"]


def test_a_word_that_was_unknown_stays_unknown():
    # "ab" leads into a dead end; without it "a", "##bc" would read the word
    words = ["[PAD]", "[UNK]", "a", "b", "ab", "##bc", "abx", "##d"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    model = make("bert", vocab_size=len(tokenizer))
    new, report = prune_vocabulary(model, tokenizer, ["a", "abc", "ABC", "abcd"])
    assert [new.tokenize(text) for text in ("abc", "ABC", "abcd")] == [["[UNK]"]] * 3
    assert report.kept["unknown words"] == ("ab",)
    assert (report.unknown_before, report.unknown_after) == (3, 3)
    assert "abx" not in new.get_vocab()


def _bpe(merges, **options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _merges(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def _gpt2_for(tokenizer):
    return make("gpt2", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None)


def test_a_padding_token_behind_all_others_moves_in_the_embeddings_too(tmp_path):
    words = "[UNK] how much is a cat dog zebra [PAD]".split()
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    model = make("bert", vocab_size=len(tokenizer), pad_token_id=len(tokenizer) - 1)
    before = answer(model, tokenizer, ["how much", "is a cat"])
    new, report = prune_vocabulary(model, tokenizer, ["how much is a cat"])
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == new.pad_token_id == len(new) - 1
    CompressedModel(model).save_pretrained(tmp_path / "model", tokenizer=new)
    again = CompressedModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(answer(again.model.eval(), new, ["how much", "is a cat"]), before)


def test_of_two_ways_to_a_token_the_one_that_is_taken_stays():
    tokenizer = _bpe([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("x", "y")])
    new, report = prune_vocabulary(_gpt2_for(tokenizer), tokenizer, ["abc", "abz"])
    assert _merges(new) == [("b", "c"), ("a", "b"), ("a", "bc")]
    assert set(report.kept["corpus"]) == {"ab", "abc"} and report.kept["merges"] == ("bc",)
    assert (report.merges_before, report.merges_after) == (5, 3)


def test_exactly_the_merges_that_lead_to_kept_tokens_stay():
    model, tokenizer = make_pair("gpt2")
    new, report = prune_vocabulary(model, tokenizer, CORPUS)
    merges = _merges(new)
    assert merges == [pair for pair in _merges(tokenizer) if pair in set(merges)]
    # in a trained tokenizer one merge makes one token
    assert {"".join(pair) for pair in merges} == {*report.kept["corpus"], *report.kept["merges"]} - {*"abc"}
    assert len(merges) == report.merges_after == len(new) - 256 - 1
    for token in report.kept["corpus"] + report.kept["merges"]:
        assert [piece.value for piece in new.backend_tokenizer.model.tokenize(token)] == [token]


def test_words_that_are_taken_whole_need_no_merges():
    tokenizer = _bpe([("a", "b"), ("x", "y")], ignore_merges=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {"whole": 258, "other": 259}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    new, report = prune_vocabulary(_gpt2_for(tokenizer), tokenizer, ["whole"])
    assert new.tokenize("whole") == ["whole"] and _merges(new) == []
    assert report.kept["corpus"] == ("whole",)


WORDS = st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(
    learnt=st.lists(WORDS, min_size=2, max_size=8),
    corpus=st.lists(WORDS, min_size=1, max_size=4),
    kind=st.sampled_from(["wordpiece", "bytelevel_bpe"]),
    min_count=st.integers(1, 3),
    room=st.integers(0, 12),
    characters=st.booleans(),
)
def test_texts_whose_tokens_stay_are_cut_as_before(learnt, corpus, kind, min_count, room, characters):
    tokenizer = train_tokenizer(learnt, kind=kind, vocab_size=300)
    model = make("bert" if kind == "wordpiece" else "gpt2", vocab_size=len(tokenizer), pad_token_id=0)
    options = dict(min_count=min_count, keep_characters=characters)
    smallest = len(tokenizer)
    for max_size in (None, "fitting"):
        if max_size is not None:
            options["max_size"] = min(smallest + room, len(tokenizer))
        try:
            new, report = prune_vocabulary(copy.deepcopy(model), tokenizer, corpus, **options)
        except LmcompressError as error:
            assert not isinstance(error, EquivalenceError)
            return
        smallest = len(new) - 4
        assert len(new) <= options.get("max_size", len(new))
        kept, counts = set(new.get_vocab()), Counter()
        for text in corpus:
            pieces = tokenizer.tokenize(text)
            counts.update(pieces)
            if kept.issuperset(pieces):
                assert new.tokenize(text) == pieces
            if kind == "bytelevel_bpe":
                assert new.decode(new(text)["input_ids"]) == text
        assert report.coverage == pytest.approx(sum(n for t, n in counts.items() if t in kept) / counts.total())
        if max_size is None:
            assert kept.issuperset(token for token, n in counts.items() if n >= min_count)


LETTERS = st.text("abc", min_size=1, max_size=4)
PIECES = st.frozensets(LETTERS, min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(starts=PIECES, inside=PIECES, words=st.lists(LETTERS.map(lambda word: word * 2), min_size=1, max_size=5))
def test_a_wordpiece_vocabulary_without_rhyme_or_reason_cuts_as_before(starts, inside, words):
    pieces = ["[PAD]", "[UNK]", "spare", *sorted(starts), *(f"##{piece}" for piece in sorted(inside))]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    texts = [" ".join(words), "b", next(iter(starts))]
    new, report = prune_vocabulary(make("bert", vocab_size=len(tokenizer)), tokenizer, texts, keep_characters=False)
    assert [new.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    unknown = sum(tokenizer.tokenize(text).count("[UNK]") for text in texts)
    assert report.unknown_before == report.unknown_after == unknown


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=14),
    words=st.lists(LETTERS, min_size=1, max_size=8),
)
def test_merges_without_rhyme_or_reason_cut_as_before(picks, words):
    tokens, merges = ["a", "b", "c"], [("x", "y")]
    for left, right in picks:  # the same token may be made in several ways
        merges.append((tokens[left % len(tokens)], tokens[right % len(tokens)]))
        tokens.append("".join(merges[-1]))
    tokenizer = _bpe(list(dict.fromkeys(merges)))
    texts = ["".join(words), " ".join(words)]
    new, report = prune_vocabulary(_gpt2_for(tokenizer), tokenizer, texts)
    assert [new.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    seen = {token for text in texts for token in tokenizer.tokenize(text)}
    assert seen <= {*report.kept["alphabet"], *report.kept.get("corpus", ())}


def test_min_count_and_max_size_keep_the_frequent_ones_and_say_what_it_costs():
    for name in ("bert", "roberta"):
        model, tokenizer = make_pair(name)
        counts = count_tokens(tokenizer, _texts())
        new, report = prune_vocabulary(copy.deepcopy(model), tokenizer, _texts(), min_count=20)
        assert all((token in new.get_vocab()) for token, n in counts.items() if n >= 20)
        assert all(counts[token] >= 20 for token in report.kept["corpus"])
        assert 0.5 < report.coverage < 1 and report.texts_changed > 0
        assert report.tokens_after == sum(len(new.tokenize(text)) for text in _texts()) > report.tokens_before
        size = len(new) - 30
        smaller, report = prune_vocabulary(model, tokenizer, _texts(), max_size=size)
        assert len(smaller) <= size
        gone = [counts[token] for token in counts if token not in smaller.get_vocab()]
        assert max(gone) <= max(counts[token] for token in report.kept["corpus"])


def test_keep_keeps_and_brings_what_it_is_merged_from():
    tokenizer = _bpe([("a", "b"), ("ab", "c"), ("abc", "d"), ("x", "y")])
    new, report = prune_vocabulary(_gpt2_for(tokenizer), tokenizer, ["q"], keep=["abc", "abc"])
    assert report.kept["asked for"] == ("abc",) and report.kept["merges"] == ("ab",)
    assert new.tokenize("abcxy") == ["abc", "x", "y"]


def test_the_report_is_json():
    model, tokenizer = make_pair("gpt2")
    _, report = prune_vocabulary(model, tokenizer, CORPUS)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["kept"]["alphabet"] == 256 and sum(values["kept"].values()) == values["rows_after"]
    assert values["coverage"] == 1.0 and values["texts"] == len(CORPUS) and values["texts_changed"] == 0
    assert "old_ids" not in values


def test_tokens_are_counted_as_tokenize_cuts(family):
    tokenizer = make_tokenizer(str(family))
    counted = count_tokens(tokenizer, iter(_texts()))
    assert counted == Counter(token for text in _texts() for token in tokenizer.tokenize(text))


# bad input


@pytest.fixture(scope="module")
def bert():
    return make_pair("bert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(min_count=0), "min_count must be a whole number from 1, got 0"),
        (dict(min_count=True), "min_count must be a whole number from 1, got True"),
        (dict(max_size=0), "max_size must be a whole number of rows from 1, or None, got 0"),
        (dict(max_size=2.5), "max_size must be a whole number .* got 2.5"),
        (dict(min_count=99), r"min_count must keep some of the corpus's tokens, got 99; the most frequent .* 3 times"),
        (
            dict(max_size=10),
            r"max_size must be at least \d+, .*5 special, \d+ alphabet\); got 10. keep_characters",
        ),
        (dict(keep=["hwo"]), r"keep must name tokens of the tokenizer, got 'hwo', which is none; did you mean .*'how'"),
        (dict(keep=["##§§"]), r"got '##§§', which is none; \(a piece inside a word begins with ##; tokenizer.tokenize"),
        (dict(keep="how"), "keep must be several tokens, got the one string 'how'"),
        (dict(texts="how much"), "texts must be several strings, got one string"),
        (dict(texts=["how", ("a", "b")]), "texts must be strings, got tuple at index 1; for pairs of sentences"),
        (dict(texts=[]), "the corpus must hold some text, got 0 texts without a single token"),
        (dict(texts=["", "  "]), "the corpus must hold some text, got 2 texts without a single token"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_touched(bert, options, message):
    model, tokenizer = bert
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LmcompressError, match=message):
        prune_vocabulary(model, tokenizer, **({"texts": ["how much is", "a a a"]} | options))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_corpus_that_uses_everything_is_refused(bert):
    model, tokenizer = bert
    with pytest.raises(
        LmcompressError, match=r"all 700 tokens are kept, so there is nothing to prune: raise min_count"
    ):
        prune_vocabulary(model, tokenizer, ["how much"], keep=list(tokenizer.get_vocab()))


def test_the_hint_for_bytes_is_about_spaces():
    model, tokenizer = make_pair("gpt2")
    with pytest.raises(LmcompressError, match=r"got ' is', which is none; .*a space is written Ġ"):
        prune_vocabulary(model, tokenizer, CORPUS, keep=[" is"])
    with pytest.raises(LmcompressError, match=r"max_size must be at least 257.*got 100$"):
        prune_vocabulary(model, tokenizer, CORPUS, max_size=100)


def test_sizes_that_disagree_are_refused(bert):
    model, tokenizer = bert
    match = r"model and tokenizer must belong together: .* ids go up to 699, the embeddings have {} rows"
    with pytest.raises(LmcompressError, match=match.format(600)):
        prune_vocabulary(make("bert", vocab_size=600), tokenizer, CORPUS)
    with pytest.raises(LmcompressError, match=match.format(30522)):
        prune_vocabulary(make("bert", vocab_size=30522), tokenizer, CORPUS)
    wrong = make("bert", vocab_size=700)
    wrong.config.vocab_size = 30522
    with pytest.raises(LmcompressError, match="vocab_size must be the embeddings' number of rows, 700, got 30522"):
        prune_vocabulary(wrong, tokenizer, CORPUS)


def test_a_tokenizer_of_another_model_is_refused(bert):
    _, tokenizer = bert
    with pytest.raises(LmcompressError, match=r"must agree on pad_token_id: model.config says 1, the tokenizer 0"):
        prune_vocabulary(make("roberta", vocab_size=len(tokenizer)), tokenizer, CORPUS)


def test_a_config_that_names_a_row_without_a_token_is_refused():
    model, tokenizer = make_pair("gpt2")
    model.resize_token_embeddings(len(tokenizer) + 10)
    model.config.forced_eos_token_id = len(tokenizer) + 3
    with pytest.raises(LmcompressError, match=r"GPT2Config.forced_eos_token_id is 703, which is no token of the token"):
        prune_vocabulary(model, tokenizer, CORPUS)


class _Slow(PreTrainedTokenizer):
    vocab_size = 3

    def get_vocab(self):
        return {"a": 0, "b": 1, "c": 2}


def test_slow_tokenizers_and_bare_backends_are_refused(bert):
    model, tokenizer = bert
    slow = _Slow()
    assert not slow.is_fast
    for wrong in (slow, tokenizer.backend_tokenizer, "bert-base-uncased"):
        with pytest.raises(LmcompressError, match=rf"must be a fast tokenizer .* got {type(wrong).__name__}; load it"):
            prune_vocabulary(model, wrong, CORPUS)
        with pytest.raises(LmcompressError, match="must be a fast tokenizer"):
            count_tokens(wrong, CORPUS)


def _fast(model, pre_tokenizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _sampling():
    tokenizer = _fast(models.Unigram([("a", -1.0)], unk_id=0))
    tokenizer.backend_tokenizer.model.alpha = 0.1
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (_fast(models.Unigram([("a", -1.0), ("b", -2.0)])), r"a Unigram model without an unknown token \(unk_id\)"),
        (_fast(models.Unigram([("a", -1.0), ("a", -2.0)], unk_id=0)), "a Unigram model that lists a piece twice"),
        (_sampling(), r"a Unigram model that samples \(alpha 0.1\), which splits a text differently each time"),
        (_fast(models.WordLevel({"a": 0}, unk_token="a")), "a WordLevel model"),
        (_fast(models.BPE({"a": 0, "b": 1}, [])), "a BPE model that does not work on bytes"),
        (
            _fast(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), pre_tokenizers.ByteLevel()),
            "a BPE model that marks the parts of a word",
        ),
        (
            _fast(models.BPE({"a": 0}, [], dropout=0.1), pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])),
            "a BPE model with dropout 0.1, which splits a text differently each time",
        ),
    ],
    ids=["unigram", "twice", "samples", "wordlevel", "characters", "suffix", "dropout"],
)
def test_other_kinds_of_tokenizers_are_refused_with_those_that_are_supported(bert, tokenizer, kind):
    with pytest.raises(LmcompressError, match=rf"must be WordPiece \(BERT, .*byte-level BPE \(GPT-2, .* with {kind}"):
        prune_vocabulary(bert[0], tokenizer, CORPUS)


class _Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def _packed(model):
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.to(torch.int8), requires_grad=False)


def _parametrized(model):
    parametrize.register_parametrization(model.get_input_embeddings(), "weight", _Half())


def _replaced(model):
    model.set_input_embeddings(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_packed, r"must be a plain nn.Embedding .*got Embedding with a weight of torch.int8, \(700, 16\); if they"),
        (_parametrized, "must be a plain nn.Embedding .*got ParametrizedEmbedding .*quantized, packed or parametrized"),
        (_replaced, "must be a plain nn.Embedding .*got Linear"),
    ],
    ids=["packed", "parametrized", "replaced"],
)
def test_embeddings_that_are_quantized_or_packed_are_refused(change, message):
    model, tokenizer = make_pair("bert")
    change(model)
    with pytest.raises(LmcompressError, match=message):
        prune_vocabulary(model, tokenizer, CORPUS)


def test_a_head_that_is_quantized_is_refused():
    model, tokenizer = make_pair("bert", "language", tie_word_embeddings=False)
    parametrize.register_parametrization(model.get_output_embeddings(), "weight", _Half())
    with pytest.raises(LmcompressError, match="vocabulary head must be a plain nn.Linear with 700 rows"):
        prune_vocabulary(model, tokenizer, CORPUS)


def test_what_is_no_model_of_a_known_family_is_refused(bert):
    with pytest.raises(LmcompressError, match="must be a transformers PreTrainedModel, got Linear; load one with"):
        prune_vocabulary(torch.nn.Linear(2, 2), bert[1], CORPUS)
    stranger = make("bert")
    stranger.config.model_type = "stranger"
    with pytest.raises(UnknownFamilyError, match="does not know the model family 'stranger'"):
        prune_vocabulary(stranger, bert[1], CORPUS)


def test_a_tokenizer_that_its_own_files_do_not_describe_is_refused():
    model, tokenizer = make_pair("bert")
    # Transformers rebuilds a BertTokenizer's normalizer from its arguments, not from tokenizer.json
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("c", "h")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(EquivalenceError, match="yet it is split into .* altered in a way its files do not record"):
        prune_vocabulary(model, tokenizer, ["how much", "cow", "hat cat"])
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_ids_that_come_back_other_than_they_were_written_are_refused(monkeypatch):
    model, tokenizer = make_pair("bert")

    def shuffled(file, data):
        if "model" in data:
            vocab = list(data["model"]["vocab"].items())
            random.Random(0).shuffle(vocab)
            data["model"]["vocab"] = {token: i for i, (token, _) in enumerate(vocab)}
        file.write_text(json.dumps(data), "utf-8")

    monkeypatch.setattr(tokenizers, "_write_json", shuffled)
    with pytest.raises(EquivalenceError, match=r"numbers \d+ tokens otherwise than they say, such as .*nothing was ch"):
        prune_vocabulary(model, tokenizer, CORPUS)


def test_a_compressed_model_is_taken_as_its_inner_model(bert):
    model, tokenizer = copy.deepcopy(bert[0]), bert[1]
    twin = copy.deepcopy(model)
    prune_vocabulary(CompressedModel(model), tokenizer, CORPUS)
    prune_vocabulary(twin, tokenizer, CORPUS)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
