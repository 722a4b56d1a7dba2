"""Vocabulary pruning: embeddings of tokens that a corpus never uses are removed, and the tokenizer is rewritten.

Nothing is trained and nothing is approximated: a text whose tokens are all kept is tokenized in the same way by the new
tokenizer, and the model's output for it is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from transformers import MarianTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError
from lmcompress.model import CompressedModel, unwrapped
from lmcompress.pruning.vocabulary.marian import MarianReader
from lmcompress.pruning.vocabulary.readers import FastReader, Reader
from lmcompress.pruning.vocabulary.report import REASONS, Reason, VocabularyReport
from lmcompress.pruning.vocabulary.staying import asked_for, special_ids, staying
from lmcompress.pruning.vocabulary.tables import Tables, shrink, tables_of
from lmcompress.pruning.vocabulary.tokenizers import (
    Vocabulary,
    checked_texts,
    count_ids,
    fast_backend,
    new_order,
    plain_backend,
)


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """The number of occurrences of each token in ``texts``, without truncation or padding.

    Args:
        tokenizer: a fast tokenizer.
        texts: the corpus; for pairs of sentences, all first and all second ones. Special tokens that the tokenizer adds
            around a text are not counted.

    Returns:
        Count by token, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``).

    Raises:
        LmcompressError: If the tokenizer is a slow one, or ``texts`` is one string or contains something other than
            strings.
    """
    texts = checked_texts(texts)
    names = {number: token for token, number in fast_backend(tokenizer).get_vocab(with_added_tokens=True).items()}
    counts = count_ids(plain_backend(tokenizer), texts)
    return Counter({names[number]: count for number, count in counts.items()})


def prune_vocabulary(
    model: PreTrainedModel | CompressedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    keep: Collection[str] = (),
    max_size: int | None = None,
    keep_characters: bool = True,
    target_texts: Iterable[str] | None = None,
) -> tuple[PreTrainedTokenizerBase, VocabularyReport]:
    """Reduce a model's vocabulary to the tokens that ``texts`` use, and create the matching tokenizer.

    Embeddings, the vocabulary head and its bias lose the same rows; tied ones stay tied. Ids are renumbered
    in their old order, in the tokenizer, in ``model.config`` and in ``model.generation_config``; the padding token
    keeps its id if the model depends on it (RoBERTa counts positions from it). Special and added tokens are always
    kept.

    - **WordPiece** (BERT, DistilBERT, ELECTRA): a word is split into the longest pieces available, so a word whose
      pieces are kept is split as before.
    - **BPE**, byte-level (GPT-2, RoBERTa) or of characters that falls back to bytes (Llama 2): the merges that build a
      kept token from bytes or characters are kept, and so are the intermediate tokens. The merges that a word uses then
      exist in their order, and no others come between: it is split as before.
    - **Unigram** (SentencePiece: XLM-R, ALBERT, T5; Marian's two models): a text is split on the path of the highest
      total score. Pieces beside that path can go: what is left to compete with it is as good as before or worse. The
      score of an unknown character is the lowest of all less 10, so the piece of the lowest score stays too.

    All are checked on all of ``texts`` before the model is changed; on any error, model and tokenizer are
    unchanged.

    Args:
        model: modified in place, with or without a head; create optimizers afterwards, since the parameters are new
            ones.
        tokenizer: the model's, a fast one or Marian's; unchanged.
        texts: a representative sample of the texts the model will read; read twice, and kept in memory meanwhile. For
            pairs of sentences pass both.
        min_count: minimum number of occurrences of a token that is kept.
        keep: tokens to keep in any case, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``, ``"▁cat"``).
        max_size: maximum number of embeddings; the most frequent tokens are kept. With BPE a token counts together with
            those it is merged from, and is skipped if they do not all fit.
        keep_characters: whether to keep every single character of a WordPiece vocabulary, so that words outside the
            corpus can still be spelled; without, they become unknown tokens. So are those of a Unigram model, or of a
            BPE that falls back to bytes. Bytes are kept in any case.
        target_texts: texts that the model writes, if they are others: a Marian tokenizer splits them with another
            SentencePiece model and needs them (``[]``: the model only reads); others read all texts alike.

    Returns:
        The new tokenizer and the report.

    Raises:
        LmcompressError: If the tokenizer is slow or of another kind, model and tokenizer do not belong together, the
            embeddings are quantized or packed, the corpus is empty, a token of ``keep`` does not exist, or nothing
            would be kept or pruned.
        EquivalenceError: If a text would be tokenized differently although all its tokens are kept; nothing was
            changed.
        UnknownFamilyError: If :mod:`lmcompress.families` does not describe the model.

    Note:
        TextPruner keeps all merges of a byte-level BPE, which then lead to tokens that no longer exist, and keeps
        neither the bytes nor the intermediate tokens.

    Reference:
        Yang, Cui & Chen, *TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models*, 2022,
        https://arxiv.org/abs/2203.15996, "Vocabulary Pruning".
    """
    _check_numbers(min_count, max_size)
    tables = tables_of(model := unwrapped(model))
    reader = _reader_of(tokenizer, texts, target_texts)
    vocabulary, counts = reader.vocabulary, reader.counts
    special = special_ids(model, tokenizer, tables, vocabulary)
    if not counts:
        raise LmcompressError(
            f"the corpus must hold some text, got {reader.texts} texts without a single token; "
            "give the texts that the model will read"
        )

    reasons, merges = staying(
        vocabulary,
        counts,
        (
            ("special", [vocabulary.names[number] for number in sorted(special)]),
            ("added", vocabulary.added),
            ("asked for", asked_for(keep, vocabulary)),
            *reader.always(keep_characters),
        ),
        min_count,
        max_size,
    )
    rows = tables.rows
    new_ids = _renumbered(tables, vocabulary, reasons, min_count)
    order = list(new_ids)
    pruned = reader.rebuilt(new_ids, merges.used)
    compared = reader.compared(pruned, new_ids)
    names = [vocabulary.names[old] for old in order]
    kept = {reason: tuple(name for name in names if reasons[name] == reason) for reason in REASONS}
    report = VocabularyReport(
        rows_before=rows,
        rows_after=len(order),
        merges_before=len(merges.ranks),
        merges_after=len(merges.used),
        bytes_saved=shrink(model, tables, order, new_ids),
        coverage=sum(count for number, count in counts.items() if number in new_ids) / counts.total(),
        tokens_before=counts.total(),
        tokens_after=compared.tokens,
        unknown_before=counts[vocabulary.unknown] if vocabulary.unknown is not None else 0,
        unknown_after=compared.unknown,
        texts=reader.texts,
        texts_changed=compared.changed,
        kept={reason: tokens for reason, tokens in kept.items() if tokens},
        old_ids=tuple(order),
    )
    return pruned, report


def _reader_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], target_texts: Iterable[str] | None) -> Reader:
    if isinstance(tokenizer, MarianTokenizer):
        return MarianReader(tokenizer, texts, target_texts)
    if target_texts is None:
        return FastReader(tokenizer, texts)
    return FastReader(tokenizer, [*checked_texts(texts), *checked_texts(target_texts)])


def _check_numbers(min_count: int, max_size: int | None) -> None:
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise LmcompressError(f"min_count must be a whole number from 1, got {min_count!r}")
    if max_size is not None and (not isinstance(max_size, int) or isinstance(max_size, bool) or max_size < 1):
        raise LmcompressError(f"max_size must be a whole number of rows from 1, or None, got {max_size!r}")


def _renumbered(
    tables: Tables, vocabulary: Vocabulary, reasons: Mapping[str, Reason], min_count: int
) -> dict[int, int]:
    """The new id of each kept token by its old one, in the order of the new ones."""
    rows = tables.rows
    if len(reasons) == rows:
        raise LmcompressError(
            f"all {rows} tokens are kept, so there is nothing to prune: raise min_count ({min_count}), set max_size, "
            "or give the texts of a narrower task"
        )
    order = new_order(vocabulary, reasons, tables.padding)
    new_ids = {old: new for new, old in enumerate(order)}
    if tables.counts_positions and tables.padding is not None and new_ids[tables.padding] != tables.padding:
        raise LmcompressError(
            f"the padding token must keep its id {tables.padding}, from which this model counts positions, and "
            f"only {len(order)} tokens are kept: raise max_size or lower min_count to keep more"
        )
    return new_ids
