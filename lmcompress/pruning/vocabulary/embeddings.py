"""Vocabulary pruning: embeddings of tokens that a corpus never uses are removed, and the tokenizer is rewritten.

Nothing is trained and nothing is approximated: a text whose tokens are all kept is tokenized in the same way by the new
tokenizer, and the model's output for it is the same.
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    keep: Collection[str] = (),
    max_size: int | None = None,
    keep_characters: bool = True,
) -> tuple[PreTrainedTokenizerBase, VocabularyReport]:
    """Reduce a model's vocabulary to the tokens that ``texts`` use, and create the matching tokenizer.

    Embeddings, the vocabulary head and its bias lose the same rows; tied ones stay tied. Ids are renumbered
    in their old order, in the tokenizer, in ``model.config`` and in ``model.generation_config``; the padding token
    keeps its id if the model depends on it (RoBERTa counts positions from it). Special and added tokens are always
    kept.

    - **WordPiece** (BERT, DistilBERT, ELECTRA): a word is split into the longest pieces available, so a word whose
      pieces are kept is split as before.
    - **Byte-level BPE** (GPT-2, RoBERTa): the merges that build a kept token from bytes are kept, and
      so are the intermediate tokens. The merges that a word uses then exist in their order, and no others come between:
      it is split as before.

    Both are checked on all of ``texts`` before the model is changed; on any error, model and tokenizer are
    unchanged.

    Args:
        model: modified in place, with or without a head; create optimizers afterwards, since the parameters are new
            ones.
        tokenizer: the model's, a fast one; unchanged.
        texts: a representative sample of the texts the model will read; read twice, and kept in memory meanwhile. For
            pairs of sentences pass both.
        min_count: minimum number of occurrences of a token that is kept.
        keep: tokens to keep in any case, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``).
        max_size: maximum number of embeddings; the most frequent tokens are kept. With BPE a token counts together with
            those it is merged from, and is skipped if they do not all fit.
        keep_characters: whether to keep every single character of a WordPiece vocabulary, so that words outside the
            corpus can still be spelled; without, they become unknown tokens. The bytes of a byte-level BPE are kept in
            any case.

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
    tables = tables_of(model)
    vocabulary = read_vocabulary(tokenizer)
    special = special_ids(model, tokenizer, tables, vocabulary)
    texts = checked_texts(texts)
    backend = plain_backend(tokenizer)
    counts = count_ids(backend, texts)
    if not counts:
        raise LmcompressError(
            f"the corpus must hold some text, got {len(texts)} texts without a single token; "
            "give the texts that the model will read"
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
    """The new id of each kept token by its old one, in the order of the new ones."""
    rows = tables.embedding.num_embeddings
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
