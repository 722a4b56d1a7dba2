"""Vocabulary pruning: rows of the embeddings that a corpus never uses go, and the tokenizer is rewritten to match.

Nothing is trained and nothing is approximated: a text whose tokens all stay is cut into the same pieces by the new
tokenizer, and the model gives it the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError
from lmcompress.pruning.vocabulary.report import REASONS, Reason, VocabularyReport
from lmcompress.pruning.vocabulary.staying import asked_for, special_ids, staying
from lmcompress.pruning.vocabulary.tables import Tables, shrink, tables_of
from lmcompress.pruning.vocabulary.tokenizers import (
    Vocabulary,
    alphabet_of,
    checked_texts,
    compare,
    count_ids,
    fast_backend,
    new_order,
    plain_backend,
    read_vocabulary,
    rebuilt,
    unknown_words,
)


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """How often each token occurs in ``texts``, as the model would see them, whole: nothing is cut off or padded.

    Args:
        tokenizer: a fast one.
        texts: the corpus; of pairs of sentences, all first and all second ones. Special tokens that the tokenizer puts
            around a text are not counted.

    Returns:
        Count by token, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``).

    Raises:
        LmcompressError: If the tokenizer is a slow one, or ``texts`` is one string or holds something else than
            strings.
    """
    texts = checked_texts(texts)
    names = {number: token for token, number in fast_backend(tokenizer).get_vocab(with_added_tokens=True).items()}
    counts = count_ids(plain_backend(tokenizer), texts)
    return Counter({names[number]: count for number, count in counts.items()})


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    keep: Collection[str] = (),
    max_size: int | None = None,
    keep_characters: bool = True,
) -> tuple[PreTrainedTokenizerBase, VocabularyReport]:
    """Cut a model's vocabulary down to what ``texts`` use, and make the tokenizer that goes with it.

    Embeddings, the head over the vocabulary and its bias lose the same rows; tied ones stay tied. Ids are renumbered
    in their old order, in the tokenizer, in ``model.config`` and in ``model.generation_config``; the padding token
    keeps its id wherever that exists (RoBERTa counts positions from it). Special and added tokens always stay.

    - **WordPiece** (BERT, DistilBERT, ELECTRA): a word is cut into the longest pieces there are, so a word whose pieces
      stay is cut as before.
    - **Byte-level BPE** (GPT-2, RoBERTa): of the merges, those stay by which a token that stays is made from bytes, and
      so do the tokens on that way. Merges that a word uses are then there in their order, and no others come between:
      it is cut as before.

    Both are checked on all of ``texts`` before the model is touched; when anything is refused, model and tokenizer are
    as they were.

    Args:
        model: changed in place, with or without a head; make optimizers afterwards, for the parameters are new ones.
        tokenizer: the model's, a fast one; left as it is.
        texts: what the model will have to read, or a good part of it; read twice, and kept in memory meanwhile. Of
            pairs of sentences give both.
        min_count: a token stays if it occurs so often.
        keep: tokens that stay in any case, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``).
        max_size: the most rows that may stay; the most frequent tokens do. With BPE a token counts together with those
            it is merged from, and is passed over where all of them do not fit.
        keep_characters: keep every single character of a WordPiece vocabulary, so that words the corpus does not have
            can still be spelled; without, they become unknown tokens. The bytes of a byte-level BPE stay in any case.

    Returns:
        The new tokenizer and the report.

    Raises:
        LmcompressError: If the tokenizer is slow or of another kind, model and tokenizer do not belong together, the
            embeddings are quantized or packed, the corpus is empty, a token of ``keep`` is not there, or nothing would
            stay or be pruned.
        EquivalenceError: If a text would be cut into other pieces although all its tokens stay; nothing was changed.
        UnknownFamilyError: :mod:`lmcompress.families` does not describe the model.

    Note:
        TextPruner keeps all merges of a byte-level BPE, which then lead to tokens that are no longer there, and keeps
        neither the bytes nor what lies on the way to a token.

    Reference:
        Yang, Cui & Chen, *TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models*, 2022,
        https://arxiv.org/abs/2203.15996, "Vocabulary Pruning".
    """
    _check_numbers(min_count, max_size)
    tables = tables_of(model)
    vocabulary = read_vocabulary(tokenizer)
    special = special_ids(model, tokenizer, tables, vocabulary)
    texts = checked_texts(texts)
    backend = plain_backend(tokenizer)
    counts = count_ids(backend, texts)
    if not counts:
        raise LmcompressError(
            f"the corpus must hold some text, got {len(texts)} texts without a single token; "
            "give the texts that the model is to read"
        )

    reasons, merges = staying(
        vocabulary,
        counts,
        (
            ("special", [vocabulary.names[number] for number in sorted(special)]),
            ("added", vocabulary.added),
            ("asked for", asked_for(keep, vocabulary)),
            ("alphabet", alphabet_of(vocabulary, keep_characters)),
            ("unknown words", unknown_words(vocabulary, backend, texts, counts)),
        ),
        min_count,
        max_size,
    )
    rows = tables.embedding.num_embeddings
    new_ids = _renumbered(tables, vocabulary, reasons, min_count)
    order = list(new_ids)
    pruned = rebuilt(tokenizer, vocabulary, new_ids, merges.used)
    compared = compare(backend, plain_backend(pruned), texts, new_ids, vocabulary.unknown)
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
        texts=len(texts),
        texts_changed=compared.changed,
        kept={reason: tokens for reason, tokens in kept.items() if tokens},
        old_ids=tuple(order),
    )
    return pruned, report


def _check_numbers(min_count: int, max_size: int | None) -> None:
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise LmcompressError(f"min_count must be a whole number from 1, got {min_count!r}")
    if max_size is not None and (not isinstance(max_size, int) or isinstance(max_size, bool) or max_size < 1):
        raise LmcompressError(f"max_size must be a whole number of rows from 1, or None, got {max_size!r}")


def _renumbered(
    tables: Tables, vocabulary: Vocabulary, reasons: Mapping[str, Reason], min_count: int
) -> dict[int, int]:
    """The new id of each token that stays by its old one, in the order of the new ones."""
    rows = tables.embedding.num_embeddings
    if len(reasons) == rows:
        raise LmcompressError(
            f"all {rows} tokens stay, so there is nothing to prune: raise min_count (now {min_count}), set max_size, "
            "or give the texts of a narrower task"
        )
    order = new_order(vocabulary, reasons, tables.padding)
    new_ids = {old: new for new, old in enumerate(order)}
    if tables.counts_positions and tables.padding is not None and new_ids[tables.padding] != tables.padding:
        raise LmcompressError(
            f"the padding token must keep its id {tables.padding}, from which this model counts positions, and "
            f"only {len(order)} tokens stay: raise max_size or lower min_count until more than that do"
        )
    return new_ids
