"""Conversations for causal language models: through the tokenizer's chat template, with labels on the answers only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lmcompress.data.labels import IGNORED_LABEL
from lmcompress.data.text import TEACHER_PREFIX, append_row
from lmcompress.errors import LmcompressError

MESSAGES = "messages"
"""Column of conversations when none is named."""

_ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Conversation = Sequence[Mapping[str, Any]]
"""Messages in their order, each with the strings ``role`` and ``content``."""


def check_conversations(rows: Dataset, column: str, split: str) -> None:
    """Checks that every row is a conversation with an answer.

    Args:
        rows: the rows.
        column: the column of conversations.
        split: name of the split in messages.

    Raises:
        LmcompressError: If a row is no list of messages, a message lacks ``role`` or ``content``, or no message is an
            assistant's; the message names the row.
    """
    for number, messages in enumerate(rows[column]):
        where = f"column {column!r} of split {split!r}: row {number} (from 0)"
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise LmcompressError(
                f"{where} must be a list of messages, {{'role': ..., 'content': ...}} each, got {str(messages)[:80]!r}"
            )
        for message in messages:
            if wrong := [key for key in ("role", "content") if not isinstance(message.get(key), str)]:
                raise LmcompressError(
                    f"{where}: a message must have a role and a content, both strings, got "
                    f"{wrong[0]}={message.get(wrong[0])!r}"
                )
        if not any(message["role"] == _ASSISTANT for message in messages):
            raise LmcompressError(
                f"{where} must have a message of the role {_ASSISTANT!r}, got "
                f"{[message['role'] for message in messages]}: there is nothing to learn from it; drop the row"
            )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no chat template.

    Args:
        tokenizer: of a student or a teacher.

    Raises:
        LmcompressError: If it has none.
    """
    if not tokenizer.chat_template:
        raise LmcompressError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} must have a chat_template to write "
            "conversations as text, it has none: set tokenizer.chat_template to that of the model's family, or take "
            "the tokenizer of a model that was trained on conversations"
        )


def encode_conversation(messages: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A conversation as tokens, and its labels.

    A template with ``{% generation %}`` says itself which tokens are answers. For any other, an answer is what its
    message adds to the tokens of the prompt before it (``add_generation_prompt=True``), up to its last
    end-of-sequence token; that the prompt's tokens begin the conversation's is checked.

    Args:
        messages: a conversation.
        tokenizer: a fast one with a chat template.

    Returns:
        ``input_ids``, and ``labels``: the same where a token belongs to an answer, else -100. The model shifts them.

    Raises:
        LmcompressError: If the template refuses the conversation, or its answers cannot be told from the rest exactly.
    """
    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            found = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, marks = list(found["input_ids"]), list(found["assistant_masks"])
            if not any(marks):
                raise LmcompressError(
                    "the chat template marks no token with {% generation %}, though the conversation has an answer: "
                    "put the marks around the content of the assistant's messages"
                )
        else:
            ids, marks = _marked_by_prefixes(messages, tokenizer)
    except OverflowError as error:
        # Transformers asks for the character before an empty span
        raise LmcompressError("an answer is empty, so that the chat template marks nothing; drop the row") from error
    except TemplateError as error:
        raise LmcompressError(f"the chat template refuses the conversation: {error}") from error
    return ids, [token if marked else IGNORED_LABEL for token, marked in zip(ids, marks, strict=True)]


def _marked_by_prefixes(messages: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    ids = _rendered(messages, tokenizer)
    marks = [0] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        if not number:
            raise LmcompressError(
                "a conversation must not begin with an answer: without {% generation %} in the chat template, an "
                "answer is told from the prompt before it"
            )
        prompt = _rendered(messages[:number], tokenizer, add_generation_prompt=True)
        whole = _rendered(messages[: number + 1], tokenizer)
        start, stop = len(prompt), len(whole)
        if ids[:start] != prompt or ids[:stop] != whole:
            raise LmcompressError(
                f"the answer of message {number} (from 0) cannot be told from the rest exactly: the tokens of the "
                "conversation up to it do not begin those of the whole, for the chat template rewrites earlier "
                "messages or a token spans the border. Put {% generation %} and {% endgeneration %} around the "
                "content of the assistant's messages in the template"
            )
        # what the template puts after the end, such as a line break, is never generated
        ends = [place for place in range(start, stop) if ids[place] == tokenizer.eos_token_id]
        last = ends[-1] + 1 if ends else stop
        marks[start:last] = [1] * (last - start)
    return ids, marks


def _rendered(messages: Conversation, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)["input_ids"])


def encode_conversations(
    rows: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    teacher: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, int, int]:
    """All conversations as model inputs, without those whose answers are truncated away.

    Args:
        rows: checked conversations.
        column: their column.
        tokenizer: the student's.
        max_length: longer conversations lose their end.
        teacher: a teacher's tokenizer, if it is another one; its inputs and labels follow its own template.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, also as ``teacher_*``; the number of truncated rows; and how
        many of those are left out because no token of an answer remains to be predicted.

    Raises:
        LmcompressError: If a conversation cannot be encoded, or none has an answer within ``max_length``; the message
            names the row.
    """
    columns: dict[str, list[list[int]]] = {}
    cut = left_out = 0
    for number, messages in enumerate(rows[column]):
        try:
            encoded = {"": encode_conversation(messages, tokenizer)}
            if teacher is not None:
                encoded[TEACHER_PREFIX] = encode_conversation(messages, teacher)
        except LmcompressError as error:
            raise LmcompressError(f"row {number} (from 0): {error}") from error
        cut += len(encoded[""][0]) > max_length
        # the first token of a row is not predicted
        if all(label == IGNORED_LABEL for label in encoded[""][1][1:max_length]):
            left_out += 1
            continue
        for prefix, (ids, labels) in encoded.items():
            append_row(columns, prefix, ids[:max_length], labels[:max_length])
    if rows.num_rows and not columns:
        raise LmcompressError(
            f"no conversation has a token of an answer among its first {max_length} tokens; a larger max_length is "
            "needed"
        )
    return Dataset.from_dict(columns), cut, left_out
