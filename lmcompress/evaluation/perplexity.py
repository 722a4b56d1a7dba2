"""Perplexity of a causal language model on a text: per token, per word, and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.running import evaluating, with_progress
from lmcompress.errors import LmcompressError
from lmcompress.families.positions import positions_of

DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text in three units.

    All are based on the mean over the predicted tokens: words and bytes are of the whole text, so
    ``word_perplexity = exp(nll * num_tokens / num_words)`` and ``bits_per_byte = nll * num_tokens / num_bytes / ln 2``.
    These two are comparable between tokenizers, ``token_perplexity`` is not.

    Attributes:
        token_perplexity: ``exp(nll)``; infinite if too large for a float.
        word_perplexity: per word; nan for a text without words.
        bits_per_byte: per byte of UTF-8; nan for a text without bytes.
        nll: mean negative log-likelihood of a predicted token, in nats.
        num_tokens: tokens of the text.
        num_predicted: tokens that were predicted, each once.
        num_words: words, and line ends if those are counted.
        num_bytes: bytes of the text in UTF-8.
        window_nll: summed negative log-likelihood of each window's predicted tokens, in the order of the text.
        window_tokens: number of predicted tokens of each window.
    """

    token_perplexity: float
    word_perplexity: float
    bits_per_byte: float
    nll: float
    num_tokens: int
    num_predicted: int
    num_words: int
    num_bytes: int
    window_nll: tuple[float, ...] = field(default=(), repr=False, compare=False)
    window_tokens: tuple[int, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Window:
    """``ids[start:stop]``, in which the tokens from ``first`` (absolute) on are predicted."""

    start: int
    stop: int
    first: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_or_ids: str | Sequence[int] | Tensor,
    *,
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    count_line_ends: bool = True,
    progress: bool = True,
) -> Perplexity:
    """Perplexity by a sliding window: each token is predicted once, after at least ``max_length - stride`` tokens.

    The first token of the text is never predicted. With ``stride=None`` the windows are non-overlapping blocks, and
    the first token of each block is not predicted either, for lack of context. A smaller stride predicts
    all tokens except the text's first, costs ``max_length / stride`` times as much, and gives a lower, truer
    perplexity, unless the model was trained on texts shorter than ``max_length``: then choose that length.

    Args:
        model: causal; evaluated on its device and in its dtype, the softmax in float32.
        tokenizer: the model's. No special tokens are added; pass ids to include them.
        text_or_ids: text (nothing is stripped), or ``(tokens,)`` ids, whose words and bytes are
            those of the decoded text.
        stride: tokens between the starts of successive windows, at most ``max_length``.
        max_length: tokens of a window; default: the model's positions, at most 1,024.
        batch_size: windows per forward pass.
        count_line_ends: whether each line end counts as a word, as in the papers' WikiText figures.
        progress: whether to show a bar, on a terminal.

    Returns:
        the perplexities and their counts.

    Raises:
        LmcompressError: If the model is not causal, there are fewer than 2 tokens, a stride or length is out of range,
            or an id is outside the vocabulary.

    Reference:
        Hugging Face, *Perplexity of fixed-length models*, https://huggingface.co/docs/transformers/perplexity.
    """
    if not model.can_generate():
        raise LmcompressError(
            f"perplexity is of causal models, {type(model).__name__} is not one: it sees what it is to predict"
        )
    text, ids = _text_and_ids(tokenizer, text_or_ids)
    if len(ids) < 2:
        raise LmcompressError(f"a text must have at least 2 tokens to have a perplexity, got {len(ids)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise LmcompressError(
            f"ids must be in [0, {model.config.vocab_size}), got {int(ids.min())} to {int(ids.max())}; "
            "is this the model's tokenizer?"
        )
    if batch_size < 1:
        raise LmcompressError(f"batch_size must be >= 1, got {batch_size}")
    length = _max_length(model, max_length)
    spans = list(windows(len(ids), length, length if stride is None else stride))
    nll = _window_nll(model, ids, spans, batch_size, progress)
    tokens = tuple(span.stop - span.first for span in spans)
    num_words = count_words(text, line_ends=count_line_ends)
    summary = _summary(sum(nll) / sum(tokens), len(ids), sum(tokens), num_words, text)
    return replace(summary, window_nll=tuple(nll), window_tokens=tokens)


def perplexity_of_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of the tokens that have a label, each given all before it in its row: of the answers of conversations.

    Args:
        model: causal; evaluated on its device and in its dtype, the softmax in float32.
        tokenizer: the model's.
        rows: tokenized, with ``labels``: a token, or -100 where none is to be predicted.
        collate: makes a batch of rows.
        batch_size: rows per forward pass.
        progress: whether to show a bar, on a terminal.

    Returns:
        The perplexities; tokens, words and bytes are those of the labels, windows are rows.

    Raises:
        LmcompressError: If no token has a label.
    """
    nll: list[float] = []
    tokens: list[int] = []
    texts: list[str] = []
    with evaluating(model):
        for start in with_progress(range(0, len(rows), batch_size), "perplexity", enabled=progress):
            batch = collate([rows[n] for n in range(start, min(start + batch_size, len(rows)))])
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits
            for row_labels, row_logits in zip(batch["labels"], logits, strict=True):
                # position i predicts token i + 1
                labels = row_labels[1:].to(model.device)
                kept = labels != -100
                surprise = F.cross_entropy(row_logits[:-1][kept].float(), labels[kept], reduction="none")
                nll.append(surprise.double().sum().item())
                tokens.append(int(kept.sum()))
                texts.append(tokenizer.decode(labels[kept].tolist(), clean_up_tokenization_spaces=False))
    if not sum(tokens):
        raise LmcompressError("no token has a label, so that there is no perplexity; give rows with labels")
    words = sum(map(count_words, texts))
    summary = _summary(sum(nll) / sum(tokens), sum(tokens), sum(tokens), words, "".join(texts))
    return replace(summary, window_nll=tuple(nll), window_tokens=tuple(tokens))


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """Windows in which the tokens of a text are predicted, each at most once.

    Args:
        num_tokens: tokens of the text.
        max_length: tokens of a window; the last may be shorter.
        stride: tokens between the starts of windows.

    Yields:
        windows in order; if ``stride < max_length``, all tokens except the text's first are predicted.

    Raises:
        LmcompressError: If ``max_length`` is below 2, or ``stride`` is not in [1, ``max_length``].

    Example:
        >>> list(windows(5, 3, 2))
        [Window(start=0, stop=3, first=1), Window(start=2, stop=5, first=3)]
    """
    if max_length < 2:
        raise LmcompressError(f"max_length must be >= 2, got {max_length}: a window must predict a token from another")
    if not 1 <= stride <= max_length:
        raise LmcompressError(
            f"stride must be in [1, max_length = {max_length}], got {stride}; a greater one would leave tokens out"
        )
    done = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + max_length, num_tokens)
        first = max(done, start + 1)
        if first < stop:
            yield Window(start, stop, first)
        if stop == num_tokens:
            return
        done = stop


def count_words(text: str, *, line_ends: bool = True) -> int:
    r"""Number of words separated by whitespace, plus one for each line end if those are counted.

    Args:
        text: any text.
        line_ends: whether to count line ends, including that of an unfinished last line.

    Returns:
        their number.

    Example:
        >>> count_words("a b\n\nc"), count_words("a b\n\nc", line_ends=False)
        (6, 3)
    """
    unfinished = bool(text) and not text.endswith("\n")
    return len(text.split()) + (text.count("\n") + unfinished if line_ends else 0)


def _text_and_ids(tokenizer: PreTrainedTokenizerBase, text_or_ids: str | Sequence[int] | Tensor) -> tuple[str, Tensor]:
    if isinstance(text_or_ids, str):
        # verbose=False: windows handle texts longer than the model
        encoded = tokenizer(text_or_ids, add_special_tokens=False, verbose=False)["input_ids"]
        return text_or_ids, torch.tensor(encoded, dtype=torch.long)
    ids = torch.as_tensor(text_or_ids, dtype=torch.long).cpu()
    if ids.dim() != 1:
        raise LmcompressError(f"ids must be (tokens,), got shape {tuple(ids.shape)}; join rows with .flatten()")
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False), ids


def _max_length(model: PreTrainedModel, max_length: int | None) -> int:
    positions = positions_of(model.config)
    if max_length is None:
        return min(positions, DEFAULT_MAX_LENGTH)
    if max_length > positions:
        raise LmcompressError(f"max_length must be at most the model's {positions} positions, got {max_length}")
    return max_length


def _window_nll(
    model: PreTrainedModel, ids: Tensor, spans: list[Window], batch_size: int, progress: bool
) -> list[float]:
    # windows of one length share a batch, so that nothing is padded: only the last can be shorter
    batches = [
        equal[i : i + batch_size]
        for _, group in groupby(spans, key=lambda span: span.stop - span.start)
        for equal in [list(group)]
        for i in range(0, len(equal), batch_size)
    ]
    found: list[float] = []
    with evaluating(model):
        for batch in with_progress(batches, "perplexity", enabled=progress):
            inputs = torch.stack([ids[span.start : span.stop] for span in batch]).to(model.device)
            logits = model(input_ids=inputs, use_cache=False).logits
            for row_ids, row_logits, span in zip(inputs, logits, batch, strict=True):
                # position i predicts token i + 1; row by row, as a float32 copy of all logits would double the memory
                first = span.first - span.start
                nll = F.cross_entropy(row_logits[first - 1 : -1].float(), row_ids[first:], reduction="none")
                found.append(nll.double().sum().item())
    return found


def _summary(nll: float, num_tokens: int, num_predicted: int, num_words: int, text: str) -> Perplexity:
    num_bytes = len(text.encode("utf-8"))
    total = nll * num_tokens
    return Perplexity(
        token_perplexity=_exp(nll),
        word_perplexity=_exp(total / num_words) if num_words else math.nan,
        bits_per_byte=total / num_bytes / math.log(2) if num_bytes else math.nan,
        nll=nll,
        num_tokens=num_tokens,
        num_predicted=num_predicted,
        num_words=num_words,
        num_bytes=num_bytes,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
