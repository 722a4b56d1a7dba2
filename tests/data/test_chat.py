"""Conversations: labels on the assistant's answers, whichever way the template lets them be told."""

from __future__ import annotations

import logging

import pytest

from lmcompress.data import collator, load_task, tokenize, train_tokenizer
from lmcompress.data.chat import encode_conversation
from lmcompress.errors import LmcompressError

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ message['role'] + ':\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
# answers but the last lose their first word, as reasoning is taken out of earlier answers
REWRITING = PLAIN.replace(
    "message['content'] }}",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'][3:]) }}",
)


def conversation(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for question, answer in pairs
        for role, text in (("user", question), ("assistant", answer))
    ]


TWO_TURNS = conversation(("a good film?", "no film is that bad"), ("the cat?", "she sat in the tree"))


@pytest.fixture
def chatty(sentences):
    """A function from a template to a byte-level tokenizer that has it."""

    def made(template: str, vocab_size: int = 300):
        tokenizer = train_tokenizer(sentences, kind="bytelevel_bpe", vocab_size=vocab_size)
        tokenizer.chat_template = template
        return tokenizer

    return made


def data(rows, **options):
    return load_task("talk", data={"train": rows, "validation": rows[:1]}, chat=True, **options)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_labels_are_the_answers_and_their_end_and_nothing_else(chatty, template):
    tokenizer = chatty(template)
    ids, labels = encode_conversation(TWO_TURNS, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    kept = [label for label in labels if label != -100]
    assert tokenizer.decode(kept) == "no film is that bad<|endoftext|>she sat in the tree<|endoftext|>"


def test_marks_and_prefixes_agree(chatty):
    assert encode_conversation(TWO_TURNS, chatty(PLAIN)) == encode_conversation(TWO_TURNS, chatty(MARKED))


def test_answers_that_cannot_be_told_exactly_are_refused(chatty):
    with pytest.raises(
        LmcompressError, match=r"row 0 .from 0.: the answer of message 1 .* cannot be told from the rest"
    ):
        tokenize(data([{"messages": TWO_TURNS}] * 2), chatty(REWRITING), max_length=64)
    # the space before the answer is part of its first token, which the prompt ends in the middle of
    with pytest.raises(LmcompressError, match="or a token spans the border"):
        encode_conversation(TWO_TURNS, chatty(PLAIN.replace(":\\n", ": ")))
    one_turn = TWO_TURNS[:2]
    assert encode_conversation(one_turn, chatty(REWRITING)) == encode_conversation(one_turn, chatty(PLAIN))
    with pytest.raises(LmcompressError, match="must not begin with an answer"):
        encode_conversation(TWO_TURNS[1:], chatty(PLAIN))
    with pytest.raises(LmcompressError, match="the chat template refuses the conversation: no system"):
        encode_conversation(TWO_TURNS, chatty("{{ raise_exception('no system') }}"))
    with pytest.raises(LmcompressError, match="marks no token with {% generation %}"):
        encode_conversation(
            TWO_TURNS, chatty("{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ messages[0].content }}")
        )
    with pytest.raises(LmcompressError, match="an answer is empty, so that the chat template marks nothing"):
        encode_conversation(TWO_TURNS, chatty("{% generation %}{% endgeneration %}{{ messages[0]['content'] }}"))


def test_a_tokenizer_without_a_template_is_refused(gpt2):
    with pytest.raises(LmcompressError, match="must have a chat_template .* it has none: set tokenizer.chat_template"):
        tokenize(data([{"messages": TWO_TURNS}] * 2), gpt2, max_length=64)


def test_rows_whose_answers_are_truncated_away_are_left_out_and_counted(chatty, caplog):
    tokenizer = chatty(MARKED)
    long = conversation(("no film is that bad " * 6, "good"))
    rows = [{"messages": TWO_TURNS}, {"messages": long}, {"messages": TWO_TURNS[:2]}]
    most = len(encode_conversation(TWO_TURNS[:2], tokenizer)[0])
    with caplog.at_level(logging.WARNING):
        found = tokenize(data(rows), tokenizer, max_length=most)
    assert found.train.num_rows == 2
    told = [note for note in found.notes if "of train" in note]
    assert told == [
        f"2 rows (66.67%) of train are truncated to {most} tokens",
        f"1 rows (33.33%) of train are left out: no token of an answer is among their first {most}",
    ]
    assert all(note in caplog.text for note in told)
    assert all(set(row["labels"]) != {-100} and len(row["input_ids"]) <= most for row in found.train)
    with pytest.raises(LmcompressError, match=f"no conversation has a token of an answer among its first {most}"):
        tokenize(data([{"messages": long}] * 2), tokenizer, max_length=most)


def test_a_teacher_with_another_tokenizer_has_its_own_template_and_labels(chatty):
    mine, theirs = chatty(PLAIN), chatty(MARKED.replace(":\\n", ">\\n"), vocab_size=270)
    found = tokenize(data([{"messages": TWO_TURNS}] * 3), mine, max_length=200, teacher_tokenizer=theirs)
    batch = collator(found.task, mine, theirs)([found.train[0], found.train[1]])
    assert batch["labels"].shape == batch["input_ids"].shape != batch["teacher_input_ids"].shape
    kept = [batch[name][0][batch[name][0] != -100] for name in ("labels", "teacher_labels")]
    assert mine.decode(kept[0]) == theirs.decode(kept[1])
    assert "assistant>\nno film" in theirs.decode(batch["teacher_input_ids"][0])


@pytest.mark.parametrize(
    "row, message",
    [
        (
            [{"role": "user", "content": "hi"}],
            r"row 0 .from 0. must have a message of the role 'assistant', got \['user'\]",
        ),
        ([{"role": "assistant", "content": None}], "a message must have a role and a content.* got content=None"),
    ],
)
def test_rows_that_are_no_conversations_with_an_answer_are_refused(row, message):
    with pytest.raises(LmcompressError, match=message):
        data([{"messages": row}] * 2)


def test_columns_and_kinds_that_are_not_of_conversations_are_refused(chatty):
    rows = [{"messages": TWO_TURNS}] * 2
    with pytest.raises(LmcompressError, match="row 0 .* must be a list of messages, .* got 'hello'"):
        data([{"messages": "hello"}] * 2)
    with pytest.raises(LmcompressError, match="no text column found .* or read conversations with chat=True"):
        load_task("talk", data=rows)
    with pytest.raises(LmcompressError, match="chat=True is of causal_lm, .* got kind='regression'"):
        data(rows, kind="regression")
    with pytest.raises(LmcompressError, match="no column 'messages'"):
        data([{"text": "hi"}] * 2)
    with pytest.raises(LmcompressError, match="packing='apart' packs documents of running text, .* conversations"):
        tokenize(data(rows), chatty(PLAIN), max_length=8, packing="apart")
