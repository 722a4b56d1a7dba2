import gzip
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import perplexity
from lmcompress.evaluation.perplexity import count_words, windows

TEXT = "One two three, vier fünf.\nSix\n\nseven eight nine ten"
SHARED = Path(__file__).resolve().parents[3] / "shared"


@given(st.integers(2, 200), st.integers(2, 20), st.data())
def test_windows_predict_each_token_once_with_the_promised_context(num_tokens, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    spans = list(windows(num_tokens, max_length, stride))
    predicted = [token for span in spans for token in range(span.first, span.stop)]
    blocks_first = range(0, num_tokens, max_length) if stride == max_length else [0]
    assert predicted == [token for token in range(num_tokens) if token not in blocks_first]
    for span in spans:
        assert span.stop - span.start <= max_length
        assert span.first - span.start >= min(max(max_length - stride, 1), span.first)


@pytest.mark.parametrize("stride", [1, 5, 15, 16, None])
def test_perplexity_is_the_sum_over_tokens_one_at_a_time(make_gpt2, byte_tokenizer, stride):
    model = make_gpt2()
    ids = torch.tensor(byte_tokenizer(TEXT)["input_ids"])
    nll = []
    for span in windows(len(ids), 16, stride or 16):
        for token in range(span.first, span.stop):
            with torch.no_grad():
                logits = model(ids[None, span.start : token]).logits[0, -1]
            nll.append(-torch.log_softmax(logits, -1)[ids[token]].item())
    got = perplexity(model, byte_tokenizer, TEXT, stride=stride, batch_size=2)
    assert got.num_predicted == len(nll)
    assert got.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert got.token_perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_non_overlapping_blocks_are_the_models_own_loss(make_gpt2, byte_tokenizer):
    model = make_gpt2()
    ids = torch.arange(48) % 256
    with torch.no_grad():
        blocks = ids.reshape(3, 16)
        loss = model(blocks, labels=blocks).loss.item()
    assert perplexity(model, byte_tokenizer, ids).nll == pytest.approx(loss, rel=1e-5)


def test_units_are_of_the_whole_text(make_gpt2, byte_tokenizer):
    got = perplexity(make_gpt2(), byte_tokenizer, TEXT)
    assert (got.num_tokens, got.num_bytes) == (len(TEXT) + 1, len(TEXT) + 1)  # ü is two bytes
    assert got.num_words == 10 + 4
    assert got.word_perplexity == pytest.approx(math.exp(got.nll * got.num_tokens / 14))
    assert got.bits_per_byte == pytest.approx(got.nll / math.log(2))
    assert perplexity(make_gpt2(), byte_tokenizer, TEXT, count_line_ends=False).num_words == 10


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_8_bits_per_byte(make_gpt2, byte_tokenizer):
    model = make_gpt2()
    for parameter in model.parameters():
        parameter.data.zero_()
    got = perplexity(model, byte_tokenizer, TEXT, stride=3)
    assert got.token_perplexity == pytest.approx(256, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(8, rel=1e-5)


def test_batches_and_ids_for_text_change_nothing(make_gpt2, byte_tokenizer):
    model = make_gpt2()
    one = asdict(perplexity(model, byte_tokenizer, TEXT, stride=4, batch_size=1))
    ids = byte_tokenizer(TEXT)["input_ids"]
    many = asdict(perplexity(model, byte_tokenizer, ids, stride=4, batch_size=64))
    windows = [(found.pop("window_nll"), found.pop("window_tokens")) for found in (one, many)]
    assert one == pytest.approx(many, rel=1e-5)
    assert windows[0][0] == pytest.approx(windows[1][0], rel=1e-5) and windows[0][1] == windows[1][1]
    assert sum(windows[0][0]) / sum(windows[0][1]) == pytest.approx(one["nll"])


def test_modules_are_in_their_modes_again(make_gpt2, byte_tokenizer):
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    first = perplexity(model, byte_tokenizer, TEXT)
    assert [module.training for module in model.modules()] == before
    assert perplexity(model, byte_tokenizer, TEXT) == first  # dropout was off


@pytest.mark.parametrize(("text", "words"), [("", 0), ("a", 2), ("a\n", 2), ("a b\n\n", 4), (" \n", 1)])
def test_each_line_has_one_end(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("x", {}, "at least 2 tokens to have a perplexity, got 1"),
        ("", {}, "at least 2 tokens to have a perplexity, got 0"),
        (TEXT, {"max_length": 8, "stride": 9}, r"stride must be in \[1, max_length = 8\], got 9; .*leave tokens out"),
        (TEXT, {"stride": 0}, r"stride must be in \[1, max_length = 16\], got 0"),
        (TEXT, {"max_length": 17}, "at most the model's 16 positions, got 17"),
        (TEXT, {"max_length": 1}, "max_length must be >= 2, got 1"),
        (TEXT, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ([1, 256], {}, r"ids must be in \[0, 256\), got 1 to 256; is this the model's tokenizer"),
        (torch.zeros(2, 3), {}, r"ids must be \(tokens,\), got shape \(2, 3\)"),
    ],
)
def test_errors_say_what_to_do(make_gpt2, byte_tokenizer, text, arguments, message):
    with pytest.raises(LmcompressError, match=message):
        perplexity(make_gpt2(), byte_tokenizer, text, **arguments)


def test_a_model_that_sees_both_sides_has_no_perplexity(byte_tokenizer):
    config = BertConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(LmcompressError, match="causal models, BertForMaskedLM is not one"):
        perplexity(BertForMaskedLM(config), byte_tokenizer, TEXT)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute and a half on an idle core
@pytest.mark.skipif(not (SHARED / "models/gpt2-wikitext2").is_dir(), reason="needs the trained GPT-2")
def test_the_trained_gpt2_has_the_figures_of_its_readme():
    folder = SHARED / "models/gpt2-wikitext2"
    with gzip.open(SHARED / "data/lm/wikitext-2/test.txt.gz", "rt", encoding="utf8", newline="") as stream:
        text = stream.read()
    model = AutoModelForCausalLM.from_pretrained(folder)
    got = perplexity(model, AutoTokenizer.from_pretrained(folder), text, max_length=256)
    assert (got.num_words, got.num_bytes) == (245_569, 1_256_449)
    # measured there under bf16 autocast
    assert got.token_perplexity == pytest.approx(61.17, rel=2e-3)
    assert got.word_perplexity == pytest.approx(224.15, rel=3e-3)
