"""Texts that a model writes, and their metrics."""

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import BartConfig, BertConfig

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import written_scores, written_texts
from lmcompress.proof import tiny_model

SAID = ["the cat sat on the mat today", "nothing of it"]
WANTED = ["a cat sat on the mats", "all of it is here"]


class Tokens:
    """Decodes ids as words."""

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(int(one)) for one in row if int(one) > 1) for row in ids]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[*row["input_ids"], *[1] * (longest - len(row["input_ids"]))] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids}


def test_metrics_are_those_of_the_packages_in_per_cent():
    found = written_scores(["rouge2", "bleu", "chrf"], SAID, WANTED)
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    each = [scorer.score(b, a)["rouge2"].fmeasure for a, b in zip(SAID, WANTED, strict=True)]
    assert found["rouge2"] == pytest.approx(100 * sum(each) / 2)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SAID, [WANTED]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SAID, [WANTED]).score)
    assert written_scores(["rougeL", "bleu"], WANTED, WANTED) == pytest.approx({"rougeL": 100.0, "bleu": 100.0})


def test_texts_come_in_the_order_of_the_rows_whatever_the_batches():
    model, seen = tiny_model(BartConfig()).train(), []

    def generate(input_ids, attention_mask, max_new_tokens, num_beams, do_sample):
        seen.append((len(input_ids), max_new_tokens, num_beams, do_sample, model.training))
        return input_ids[:, :2]

    model.generate = generate
    rows = [{"input_ids": list(range(5 + length, 5 + 2 * length))} for length in (3, 8, 5, 6)]
    texts = written_texts(model, Tokens(), rows, collate, batch_size=3, num_beams=2, max_new_tokens=5, progress=False)
    assert texts == ["8 9", "13 14", "10 11", "11 12"]
    # in evaluation mode, and back
    assert seen == [(3, 5, 2, False, False), (1, 5, 2, False, False)] and model.training


def test_texts_are_those_that_the_model_generates():
    model, rows = tiny_model(BartConfig()), [{"input_ids": [5, 6, 7]}, {"input_ids": [9, 8]}]
    model.generation_config.forced_eos_token_id = None
    found = written_texts(model, Tokens(), rows, collate, max_new_tokens=4, progress=False)
    own = [model.generate(torch.tensor([row["input_ids"]]), max_new_tokens=4, do_sample=False) for row in rows]
    assert found == [Tokens().batch_decode(one, True)[0] for one in own]


def test_what_cannot_be_measured_is_said():
    with pytest.raises(LmcompressError, match="unknown metric 'rouge'"):
        written_scores(["rouge"], SAID, WANTED)
    with pytest.raises(LmcompressError, match="got 2 texts and 1 references"):
        written_scores(["bleu"], SAID, WANTED[:1])
    with pytest.raises(LmcompressError, match="writes no texts"):
        written_texts(tiny_model(BertConfig()), Tokens(), [{"input_ids": [5]}], collate)
