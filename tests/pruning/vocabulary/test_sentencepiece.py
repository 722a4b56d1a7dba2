"""Vocabulary pruning of SentencePiece tokenizers: Unigram, and BPE that falls back to bytes."""

import copy
import functools
import gc
import json
import math

import pytest
import torch
from families import make
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives import make_relative
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaTokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaTokenizer,
)

from lmcompress import CompressedModel, EquivalenceError, LmcompressError
from lmcompress.data import load_task
from lmcompress.pruning.vocabulary.embeddings import prune_vocabulary
from lmcompress.pruning.vocabulary.tables import shrink, tables_of
from lmcompress.pruning.vocabulary.unseen import unseen_rows

CORPUS = ["how much is a cat", "I'd like 3 of them, please!", "set a timer for ten minutes", "is it cold in chicago"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


@functools.cache
def _texts():
    return load_task("embedded/clinc150").train["text"][:400]


@functools.cache
def _unigram():
    """Pieces and scores of a Unigram model trained on the texts."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]


def xlm_roberta_tokenizer():
    """XLM-R's tokenizer, with its four special tokens before the pieces and the mask behind them."""
    return XLMRobertaTokenizer(vocab=[*_unigram(), ("<mask>", 0.0)])


@functools.cache
def _llama_parts():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    return {name: i for i, name in enumerate(names)}, [tuple(pair) for pair in model["merges"]]


def llama_tokenizer():
    """Llama 2's kind: BPE over characters, one token for each byte of a character that it lacks."""
    vocab, merges = _llama_parts()
    tokenizer = LlamaTokenizer(vocab=dict(vocab), merges=list(merges))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _gpt2_for(tokenizer):
    return make(
        "gpt2",
        "language",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _logits(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits * batch["attention_mask"][..., None]


def _model_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_xlm_roberta_reads_and_answers_as_before_also_reloaded(tmp_path):
    tokenizer = xlm_roberta_tokenizer()
    model = make_relative("xlm-roberta", "ForMaskedLM", vocab_size=len(tokenizer))
    ids, before = [tokenizer(text)["input_ids"] for text in CORPUS], _logits(model, tokenizer, CORPUS)
    new, report = prune_vocabulary(model, tokenizer, CORPUS, keep_characters=False)
    assert report.rows_after == len(new) == model.config.vocab_size < report.rows_before == len(tokenizer)
    assert report.texts_changed == 0 and report.coverage == 1.0
    assert [[report.old_ids[i] for i in new(text)["input_ids"]] for text in CORPUS] == ids
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    before = before[..., list(report.old_ids)]
    torch.testing.assert_close(_logits(model, new, CORPUS), before)
    CompressedModel(model).save_pretrained(tmp_path, tokenizer=new)
    again, tokens = AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokens) is XLMRobertaTokenizer and tokens.get_vocab() == new.get_vocab()
    torch.testing.assert_close(_logits(again, tokens, CORPUS), before)


def test_special_tokens_scores_and_the_rest_of_the_pipeline_stay():
    tokenizer = xlm_roberta_tokenizer()
    new, report = prune_vocabulary(make_relative("xlm-roberta", vocab_size=len(tokenizer)), tokenizer, CORPUS)
    scores = dict(_model_of(tokenizer)["vocab"])
    assert new.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3] and new.mask_token_id == len(new) - 1
    assert all(scores[piece] == score for piece, score in _model_of(new)["vocab"])
    assert _model_of(new)["unk_id"] == 3
    was, now = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, new))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert now[part] == was[part]
    assert {token for token in tokenizer.get_vocab() if len(token) == 1} <= set(new.get_vocab())
    lowest = min(scores.values())
    assert lowest in dict(_model_of(new)["vocab"]).values()


def test_the_normalizer_stays():
    tokenizer = xlm_roberta_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "NFKC"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    model = make_relative("xlm-roberta", vocab_size=len(tokenizer))
    new, _ = prune_vocabulary(model, tokenizer, ["ｈｏｗ ｍｕｃｈ"])
    assert new.tokenize("ｈｏｗ ｍｕｃｈ") == new.tokenize("how much") == tokenizer.tokenize("how much")
    assert json.loads(new.backend_tokenizer.to_str())["normalizer"] == backend["normalizer"]


def _plain_unigram(pieces, **options):
    """A Unigram tokenizer over whole texts, with the token ``?`` for the unknown."""
    backend = Tokenizer(models.Unigram([("?", 0.0), *pieces], unk_id=0, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", pad_token="?")


def _for(tokenizer):
    return make("bert", vocab_size=len(tokenizer), pad_token_id=0)


def test_the_lowest_score_stays_because_the_score_of_the_unknown_comes_from_it():
    # "abcd" costs 40 in two pieces; with one unknown character it costs 10 more than the lowest score, and 1
    pieces = [("ab", -20.0), ("cd", -20.0), ("bcd", -1.0), ("zz", -60.0), ("yy", -61.0), ("xx", -5.0)]
    tokenizer = _plain_unigram(pieces)
    assert tokenizer.tokenize("abcd") == ["ab", "cd"]
    assert _plain_unigram(pieces[:3]).tokenize("abcd") == ["a", "bcd"]
    new, report = prune_vocabulary(_for(tokenizer), tokenizer, ["abcd", "bcd"], keep_characters=False)
    assert report.kept["lowest score"] == ("yy",)
    assert set(new.get_vocab()) == {"?", "ab", "cd", "bcd", "yy"}
    assert new.tokenize("abcd") == ["ab", "cd"]


def test_bytes_stay_where_a_unigram_falls_back_to_them():
    pieces = [("a", -1.0), ("b", -2.0), ("ab", -1.5), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = _plain_unigram(pieces, byte_fallback=True)
    new, report = prune_vocabulary(_for(tokenizer), tokenizer, ["ab"], keep_characters=False)
    assert len(report.kept["alphabet"]) == 256 and "b" not in new.get_vocab()
    assert new.tokenize("abé") == ["ab", "<0xC3>", "<0xA9>"] == tokenizer.tokenize("abé")
    assert new.tokenize("b") == ["<0x62>"]


def _best_paths(text, scores, unknown):
    """The cheapest splits of a text, by trying all: an independent implementation."""

    @functools.cache
    def splits(start):
        if start == len(text):
            return [((), 0.0)]
        found = [
            (text[start:end], scores[text[start:end]])
            for end in range(start + 1, len(text) + 1)
            if text[start:end] in scores
        ]
        if text[start] not in scores:
            found.append((text[start], unknown))
        return [((piece, *rest), score + more) for piece, score in found for rest, more in splits(start + len(piece))]

    best = max(score for _, score in splits(0))
    return [list(path) for path, score in splits(0) if math.isclose(score, best, abs_tol=1e-9)]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(-400, 0), min_size=2, max_size=12),
    texts=st.lists(st.text("abcd", min_size=1, max_size=6), min_size=1, max_size=5),
    spare=st.integers(-900, 0),
)
def test_pieces_without_rhyme_or_reason_split_as_before_and_on_a_best_path(pieces, texts, spare):
    scores = {piece: score / 10 for piece, score in pieces.items()}
    tokenizer = _plain_unigram([*scores.items(), ("zzz", spare / 10), ("zz", spare / 20)])
    try:
        new, report = prune_vocabulary(_for(tokenizer), tokenizer, texts, keep_characters=False)
    except LmcompressError as error:
        assert not isinstance(error, EquivalenceError)
        assert "min_count must keep some" in str(error) or "nothing to prune" in str(error)
        return
    lowest = min(0.0, spare / 10, *scores.values())
    for text in texts:
        assert new.tokenize(text) == tokenizer.tokenize(text)
        backend = new.backend_tokenizer.model
        values = [text[piece.offsets[0] : piece.offsets[1]] for piece in backend.tokenize(text)]
        # neighbouring unknown characters are one token
        assert any(_fused(path, scores) == values for path in _best_paths(text, scores, lowest - 10))
    assert report.texts_changed == 0 and report.unknown_before == report.unknown_after


def _fused(path, scores):
    fused, last_unknown = [], False
    for piece in path:
        unknown = piece not in scores
        if unknown and last_unknown:
            fused[-1] += piece
        else:
            fused.append(piece)
        last_unknown = unknown
    return fused


def test_other_texts_change_and_their_share_is_counted():
    tokenizer = xlm_roberta_tokenizer()
    new, report = prune_vocabulary(make_relative("xlm-roberta", vocab_size=len(tokenizer)), tokenizer, _texts()[:100])
    others = _texts()[100:]
    changed = sum(
        new.convert_ids_to_tokens(new(text)["input_ids"])
        != tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        for text in others
    )
    found = unseen_rows(tokenizer, new, report.old_ids, [others])
    assert (found.rows, found.changed, found.unknown) == (len(others), changed, 0)
    assert 0 < changed < len(others)


def test_llama_reads_and_answers_as_before_and_spells_what_it_has_not_seen_in_bytes(tmp_path):
    tokenizer = llama_tokenizer()
    model = _gpt2_for(tokenizer)
    ids, before = [tokenizer(text)["input_ids"] for text in CORPUS], _logits(model, tokenizer, CORPUS)
    new, report = prune_vocabulary(model, tokenizer, CORPUS, keep_characters=False)
    assert len(report.kept["alphabet"]) == 256 and report.merges_after < report.merges_before
    assert [[report.old_ids[i] for i in new(text)["input_ids"]] for text in CORPUS] == ids
    torch.testing.assert_close(_logits(model, new, CORPUS), before[..., list(report.old_ids)])
    CompressedModel(model).save_pretrained(tmp_path, tokenizer=new)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*CORPUS, "Zebras quickly jumped over 7 lazy dogs; ça va? 猫"):
        assert again(text)["input_ids"] == new(text)["input_ids"]
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    merges = [tuple(pair) for pair in _model_of(new)["merges"]]
    assert merges == [pair for pair in _llama_parts()[1] if pair in set(merges)]


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=14),
    texts=st.lists(st.text("abcd é", min_size=1, max_size=9), min_size=1, max_size=5),
)
def test_merges_over_characters_with_bytes_split_as_before(picks, texts):
    tokens, merges = ["▁", "a", "b", "c"], []
    for left, right in picks:  # the same token may be made in several ways
        merges.append((tokens[left % len(tokens)], tokens[right % len(tokens)]))
        tokens.append("".join(merges[-1]))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens, "spare"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)))
    model = make("gpt2", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=None)
    new, report = prune_vocabulary(model, tokenizer, texts, keep_characters=False)
    assert [new.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    assert report.texts_changed == 0 and "spare" not in new.get_vocab()


def test_a_hint_says_how_a_space_is_spelled():
    for tokenizer in (xlm_roberta_tokenizer(), llama_tokenizer()):
        model = make("bert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        with pytest.raises(LmcompressError, match=r"got ' is', which is none; .*a space is written ▁"):
            prune_vocabulary(model, tokenizer, CORPUS, keep=[" is"])


def test_a_class_that_fixes_the_id_of_its_unknown_token_is_refused_if_it_moves():
    pieces = [("<s>", 0.0), ("aa", -1.5), ("</s>", 0.0), ("<unk>", 0.0), ("<pad>", 0.0), ("▁b", -3.0), ("dd", -2.0)]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])
    model = make("bert", vocab_size=len(tokenizer), pad_token_id=4)
    with pytest.raises(EquivalenceError, match="takes token 3 for the unknown one .* now token 2.*tokens before it in"):
        prune_vocabulary(model, tokenizer, ["b"])
    new, _ = prune_vocabulary(model, tokenizer, ["b"], keep=["aa"])
    assert "dd" not in new.get_vocab()
    assert new.unk_token_id == 3


# encoder–decoders: several tables


def _bart(**config):
    sizes = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    more = dict(encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=20, vocab_size=40)
    model = BartForConditionalGeneration(BartConfig(**sizes, **more, **config))
    with torch.no_grad():
        model.final_logits_bias.normal_()
    return model


def _t5(**config):
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes, **config))


@pytest.mark.parametrize("make_model", [_bart, _t5])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_tables_of_an_encoder_decoder_lose_the_same_rows(make_model, tied, tmp_path):
    torch.manual_seed(0)
    model = make_model(tie_word_embeddings=tied).eval()
    order = [i for i in range(40) if i % 3 != 2 or i < 4]
    new_ids = {old: new for new, old in enumerate(order)}
    ids = torch.tensor([[3, 4, 6, 7, 9]])

    def logits(rows):
        with torch.no_grad():
            return model(input_ids=rows, decoder_input_ids=rows).logits

    before = logits(ids)[..., order]
    size = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    saved = shrink(model, tables_of(model), order, new_ids)
    assert saved == size - sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()]) > 0
    now = ids.clone().apply_(new_ids.__getitem__)
    torch.testing.assert_close(logits(now), before)
    assert not [name for name, tensor in model.state_dict().items() if 40 in tensor.shape]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=now, decoder_input_ids=now).logits, before)


def test_an_encoder_decoder_is_pruned_with_its_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_unigram()[4:]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    ).eval()
    new, report = prune_vocabulary(model, tokenizer, CORPUS[:2], target_texts=CORPUS[2:])
    assert report.texts == 4 and [new.tokenize(t) for t in CORPUS] == [tokenizer.tokenize(t) for t in CORPUS]
    assert model.get_decoder().get_input_embeddings().weight.shape[0] == len(new) == model.lm_head.out_features


def test_two_vocabularies_are_refused():
    model = _t5()
    model.decoder.embed_tokens = torch.nn.Embedding(30, 8)
    with pytest.raises(LmcompressError, match="must share one vocabulary, got embeddings of 30 and 40 rows"):
        tables_of(model)


# Marian: two SentencePiece models that share one vocab.json

SOURCE = ["how much is a cat", "is it cold in chicago", "set a timer", "a cat is cold", "how cold is it", "much ado"]
TARGET = ["wie viel kostet eine katze", "ist es kalt in köln", "stell einen wecker", "die katze ist kalt"]


def _marian(folder, **options):
    """A tokenizer of two small SentencePiece models."""
    sentencepiece = pytest.importorskip("sentencepiece")
    vocab = dict.fromkeys(["</s>", "<unk>"])
    for side, texts in (("source", SOURCE), ("target", TARGET)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 5), model_prefix=str(folder / side), vocab_size=60, minloglevel=2,
            hard_vocab_limit=False, user_defined_symbols=[">>de<<"] if side == "source" else [],
        )  # fmt: skip
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(str(folder / f"{side}.spm"))
        vocab |= dict.fromkeys(model.id_to_piece(i) for i in range(3, len(model)))
    names = [*vocab, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return MarianTokenizer.from_pretrained(folder, source_lang="en", target_lang="de", **options)


def _marian_model(tokenizer):
    size = len(tokenizer)
    sizes = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    ids = dict(pad_token_id=size - 1, decoder_start_token_id=size - 1, eos_token_id=0, forced_eos_token_id=0)
    more = dict(encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=40, vocab_size=size)
    model = MarianMTModel(MarianConfig(**sizes, **more, **ids)).eval()
    with torch.no_grad():
        model.final_logits_bias.normal_()
    return model


def _translate(model, tokenizer, source, target):
    batch = tokenizer(source, text_target=target, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marian_loses_the_same_pieces_of_both_models_and_translates_as_before(tmp_path):
    torch.manual_seed(0)
    tokenizer = _marian(tmp_path)
    model = _marian_model(tokenizer)
    source, target = SOURCE[:2], TARGET[:2]
    pieces = [tokenizer.tokenize(text) for text in source]
    before = _translate(model, tokenizer, source, target)
    new, report = prune_vocabulary(model, tokenizer, source, target_texts=target, keep_characters=False)
    assert report.rows_after == len(new) == model.config.vocab_size < len(tokenizer)
    assert (report.texts, report.texts_changed, report.coverage) == (4, 0, 1.0)
    assert [new.tokenize(text) for text in source] == pieces and ">>de<<" in new.get_vocab()
    assert new.pad_token_id == model.config.decoder_start_token_id == len(new) - 1
    before = before[..., list(report.old_ids)]
    torch.testing.assert_close(_translate(model, new, source, target), before)
    model.save_pretrained(tmp_path / "saved")
    new.save_pretrained(tmp_path / "saved")
    copied = copy.deepcopy(new)
    del new
    gc.collect()
    again = MarianTokenizer.from_pretrained(tmp_path / "saved")
    for side in ("source", "target"):
        assert (tmp_path / "saved" / f"{side}.spm").stat().st_size < (tmp_path / f"{side}.spm").stat().st_size
    for tokens in (again, copied):
        reloaded = MarianMTModel.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(_translate(reloaded, tokens, source, target), before)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_a_marian_piece_that_goes_is_spelled_and_does_not_become_unknown(tmp_path):
    tokenizer = _marian(tmp_path)
    new, _ = prune_vocabulary(_marian_model(tokenizer), tokenizer, SOURCE[:1], target_texts=[])
    for text in SOURCE:
        assert new.unk_token_id not in new(text)["input_ids"]
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_half_of_a_marian_pair_is_refused(tmp_path):
    tokenizer = _marian(tmp_path)
    model = _marian_model(tokenizer)
    with pytest.raises(LmcompressError, match=r"source.spm and target.spm, .*pruned together: give target_texts"):
        prune_vocabulary(model, tokenizer, SOURCE[:2])
    tokenizer.separate_vocabs = True
    with pytest.raises(LmcompressError, match="one vocabulary for source and target, got separate_vocabs=True"):
        prune_vocabulary(model, tokenizer, SOURCE[:2], target_texts=TARGET[:2])


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_a_marian_pair_that_is_not_unigram_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = _marian(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TARGET * 5), model_prefix=str(tmp_path / "bpe"), model_type="bpe", vocab_size=50,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer.spm_target = sentencepiece.SentencePieceProcessor(str(tmp_path / "bpe.model"))
    with pytest.raises(LmcompressError, match=r"must be Unigram, got one of type 2 in target.spm"):
        prune_vocabulary(_marian_model(tokenizer), tokenizer, SOURCE[:2], target_texts=TARGET[:2])
