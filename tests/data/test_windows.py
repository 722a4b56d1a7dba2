"""Windows: where the answers are, and what is counted."""

from __future__ import annotations

import json
import logging

import pytest

from lmcompress.data import collator, load_task, tokenize, windows
from lmcompress.errors import LmcompressError

CONTEXT = "the cat saw a dog , a bird and a fish near the old mill , and then it slept by the river for two days"


def question(answer, start=None, context=CONTEXT, text="what is it ?"):
    place = context.index(answer) if start is None else start
    return {"question": text, "context": context, "answers": {"text": [answer], "answer_start": [place]}}


ROWS = [
    question("the cat"),
    question("river"),
    question("near the old mill"),
    {"question": "who ran ?", "context": "a bird", "answers": {"text": [], "answer_start": []}},
]


def data_of(rows):
    return load_task("asked", data={"train": rows, "validation": rows})


@pytest.mark.parametrize(("which", "max_length"), [("bert", 24), ("gpt2", 40)])
def test_every_window_that_holds_an_answer_points_to_it(bert, gpt2, which, max_length):
    tokenizer = bert if which == "bert" else gpt2
    data = data_of(ROWS)
    found = windows(data.task, data.train, tokenizer, max_length=max_length, overlap=max_length // 3)
    rows = tokenize(data, tokenizer, max_length=max_length, overlap=max_length // 3).train
    assert rows.select_columns(found.rows.column_names).to_list() == found.rows.to_list()
    assert len(rows) > len(ROWS)
    pointed = 0
    for row, asked, offsets, none in zip(rows, found.questions, found.offsets, found.no_answer, strict=True):
        answer, context = data.train[int(asked)]["answers"], data.train[int(asked)]["context"]
        inside = offsets[offsets[:, 0] >= 0]
        begin = answer["answer_start"][0] if answer["text"] else -1
        whole = bool(answer["text"]) and inside[0, 0] <= begin and inside[-1, 1] >= begin + len(answer["text"][0])
        if not whole:
            assert (row["start_positions"], row["end_positions"]) == (none, none)
            continue
        first, last = offsets[row["start_positions"], 0], offsets[row["end_positions"], 1]
        assert context[first:last].strip() == answer["text"][0]
        pointed += 1
    assert pointed >= 3


def test_windows_cover_the_context_and_share_the_overlap(bert):
    data = data_of(ROWS[:1])
    found = windows(data.task, data.train, bert, max_length=24, overlap=5)
    spans = [offsets[offsets[:, 0] >= 0] for offsets in found.offsets]
    assert spans[0][0, 0] == 0 and spans[-1][-1, 1] == len(CONTEXT)
    for before, after in zip(spans, spans[1:], strict=False):
        assert (before[-5:] == after[:5]).all()


def test_an_answer_that_no_window_holds_counts_as_none_and_is_said(bert, caplog):
    with caplog.at_level(logging.WARNING, logger="lmcompress"):
        data = tokenize(data_of([question(CONTEXT), question("river")]), bert, max_length=24)
    note = "1 of 2 answers of train are in no window of 24 tokens as a whole: there they count as no answer"
    assert any(note in said for said in data.notes) and note in caplog.text
    assert "2 of 2 questions of train have contexts in several windows of 24 tokens" in data.notes
    first = [row for row in data.train if row["start_positions"] == 0]
    assert first and all(row["end_positions"] == 0 for row in first)


def test_a_long_question_is_cut_and_said(bert):
    rows = [question("bird", text="what is it that the old cat saw near the river and the mill ?")]
    data = tokenize(data_of(rows), bert, max_length=24)
    assert "1 of 1 questions of train are cut: they take at most a third of a window" in data.notes
    assert max(map(len, data.train["input_ids"])) == 24


def test_padding_on_the_left_moves_the_positions(bert):
    data = tokenize(data_of(ROWS), bert, max_length=40)
    bert.padding_side = "left"
    try:
        batch = collator(data.task, bert)(list(data.train))
    finally:
        bert.padding_side = "right"
    for row, ids, start in zip(data.train, batch["input_ids"], batch["start_positions"], strict=True):
        assert ids[start] == row["input_ids"][row["start_positions"]]


def nested(answers):
    asked = [{"id": i, "question": "who ?", "answers": a, "is_impossible": not a} for i, a in enumerate(answers)]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "a cat ran", "qas": asked}]}]}


def test_the_nested_json_of_squad_is_read_question_by_question(tmp_path):
    answers = [[{"text": "cat", "answer_start": 2}, {"text": "a cat", "answer_start": 0}], []]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text(json.dumps(nested(answers)))
    data = load_task(tmp_path)
    assert str(data.task.kind) == "question_answering" and data.task.text_columns == ("question", "context")
    assert data.validation.to_list() == [
        {"question": "who ?", "context": "a cat ran", "answers": {"text": ["cat", "a cat"], "answer_start": [2, 0]}},
        {"question": "who ?", "context": "a cat ran", "answers": {"text": [], "answer_start": []}},
    ]


def test_answers_as_a_list_of_pairs_are_the_same(tmp_path):
    rows = [{"question": "q", "context": "a cat", "answers": [{"text": "cat", "answer_start": 2}]}]
    assert data_of(rows).train.to_list() == data_of([question("cat", context="a cat", text="q")]).train.to_list()


def test_bad_answers_are_refused(bert, gpt2, tmp_path):
    with pytest.raises(LmcompressError, match=r"row 1 \(from 0\) has the answer 'cat' at character 3, where its conte"):
        data_of([ROWS[0], question("cat", start=3)])
    with pytest.raises(LmcompressError, match="must hold answers as .*got Value"):
        rows = [{"question": "q", "context": "c", "answers": "c"}]
        load_task("asked", data={"train": rows, "validation": rows}, kind="question_answering")
    broken = nested([[{"text": "cat", "answer_start": 2}]])
    del broken["data"][0]["paragraphs"][0]["qas"][0]["question"]
    (tmp_path / "train.json").write_text(json.dumps(broken))
    with pytest.raises(LmcompressError, match="in SQuAD's form, but a paragraph or question of it has no 'question'"):
        load_task(tmp_path / "train.json")


def test_windows_that_do_not_advance_are_refused(bert, gpt2):
    data = data_of(ROWS)
    with pytest.raises(LmcompressError, match="overlap must be from 0 to 12 with windows of max_length = 24 tokens"):
        tokenize(data, bert, max_length=24, overlap=13)
    with pytest.raises(LmcompressError, match="max_length must be larger for question answering: windows of 4 tokens"):
        tokenize(data, bert, max_length=4)
    with pytest.raises(LmcompressError, match="a teacher of question answering and its student must have one tokenize"):
        tokenize(data, bert, max_length=24, teacher_tokenizer=gpt2)
    rows = [{"text": "a cat", "label": i} for i in range(2)]
    with pytest.raises(LmcompressError, match="overlap is of question answering; m is a classification task"):
        tokenize(load_task("m", data={"train": rows, "validation": rows}), bert, max_length=24, overlap=2)
