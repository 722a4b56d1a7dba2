"""Vocabulary pruning: rows of the embeddings that a corpus never uses go, and the tokenizer is rewritten to match.

Nothing is trained and nothing is approximated: a text whose tokens all stay is cut into the same pieces by the new
tokenizer, and the model gives it the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError
from lmcompress.families import Anatomy, anatomy_of
from lmcompress.pruning.vocabulary.tokenizers import (
    Merges,
    Vocabulary,
    alphabet_of,
    checked_texts,
    compare,
    count_ids,
    fast_backend,
    new_order,
    plain_backend,
    processor_ids,
    read_vocabulary,
    rebuilt,
    unknown_words,
)

Reason = Literal["special", "added", "asked for", "alphabet", "unknown words", "corpus", "merges"]

REASONS: dict[Reason, str] = {
    "special": "special tokens, and every token that the tokenizer's templates or the model's configs name by its id",
    "added": "tokens that were added to the tokenizer by hand",
    "asked for": "named in `keep`",
    "alphabet": "bytes, or single characters at the start and inside of a word: with them unseen text can be read",
    "unknown words": "pieces by which WordPiece finds that a word of the corpus is unknown, as it has to stay",
    "corpus": "counted at least `min_count` times in the corpus",
    "merges": "steps on the way from bytes to a token that stays",
}
"""Why a token stays, in the order in which the reasons are tried: the first that holds is reported."""

_MAX_SPARE_ROWS = 1024
_NAMED_IDS = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class VocabularyReport:
    """What vocabulary pruning did. Everything but ``kept`` and ``old_ids`` is a number.

    Attributes:
        rows_before, rows_after: rows of the embedding table.
        merges_before, merges_after: merge rules of a BPE tokenizer; 0 for WordPiece.
        bytes_saved: of the model's parameters in memory; a tied head counts once.
        coverage: share of the corpus, in tokens of the old tokenizer, whose token stayed; 1 where ``min_count`` is 1
            and ``max_size`` unset.
        tokens_before, tokens_after: length of the corpus in tokens, without special tokens; what was cut from the
            vocabulary makes texts longer.
        unknown_before, unknown_after: unknown tokens among them.
        texts, texts_changed: texts of the corpus, and those that are now cut into other pieces.
        kept: by reason (see :data:`REASONS`), the tokens that stayed for it and for none before it.
        old_ids: for each new id the old one. ``logits[..., old_ids]`` of the old model are the new model's.
    """

    rows_before: int
    rows_after: int
    merges_before: int
    merges_after: int
    bytes_saved: int
    coverage: float
    tokens_before: int
    tokens_after: int
    unknown_before: int
    unknown_after: int
    texts: int
    texts_changed: int
    kept: Mapping[Reason, tuple[str, ...]]
    old_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types, with how many tokens stayed for each reason in place of the lists."""
        values = {name: value for name, value in asdict(self).items() if name not in ("kept", "old_ids")}
        return values | {"kept": {reason: len(tokens) for reason, tokens in self.kept.items()}}


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """How often each token occurs in ``texts``, as the model would see them, whole: nothing is cut off or padded.

    Args:
        tokenizer: a fast one.
        texts: the corpus; of pairs of sentences, all first and all second ones. Special tokens that the tokenizer puts
            around a text are not counted.

    Returns:
        Count by token, in the tokenizer's spelling (``"##ing"``, ``"Ġcat"``).

    Raises:
        LmcompressError: the tokenizer is a slow one, or ``texts`` is one string or holds something else than strings.
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
        LmcompressError: the tokenizer is slow or of another kind; model and tokenizer do not belong together; the
            embeddings are quantized or packed; the corpus is empty; a token of ``keep`` is not there; nothing would
            stay, or nothing would go.
        EquivalenceError: a text would be cut into other pieces although all its tokens stay; nothing was changed.
        UnknownFamilyError: :mod:`lmcompress.families` does not describe the model.

    Note:
        TextPruner keeps all merges of a byte-level BPE, which then lead to tokens that are no longer there, and keeps
        neither the bytes nor what lies on the way to a token.

    Reference:
        Yang, Cui & Chen, *TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models*, 2022,
        https://arxiv.org/abs/2203.15996, "Vocabulary Pruning".
    """
    _check_numbers(min_count, max_size)
    tables = _tables_of(model)
    vocabulary = read_vocabulary(tokenizer)
    special = _special_ids(model, tokenizer, tables, vocabulary)
    texts = checked_texts(texts)
    backend = plain_backend(tokenizer)
    counts = count_ids(backend, texts)
    if not counts:
        raise LmcompressError(
            f"the corpus must hold some text, got {len(texts)} texts without a single token; "
            "give the texts that the model is to read"
        )

    reasons: dict[str, Reason] = {vocabulary.names[number]: "special" for number in sorted(special)}
    for reason, tokens in (
        ("added", vocabulary.added),
        ("asked for", _asked_for(keep, vocabulary)),
        ("alphabet", alphabet_of(vocabulary, keep_characters)),
        ("unknown words", unknown_words(vocabulary, backend, texts, counts)),
    ):
        for token in tokens:
            reasons.setdefault(token, cast(Reason, reason))
    merges = Merges(vocabulary)
    for token in list(reasons):
        for part in merges.take(token):
            reasons.setdefault(part, "merges")
    _choose(reasons, merges, vocabulary, counts, min_count, max_size)

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
    pruned = rebuilt(tokenizer, vocabulary, new_ids, merges.used)
    compared = compare(backend, plain_backend(pruned), texts, new_ids, vocabulary.unknown)
    bytes_saved = _shrink(model, tables, order, new_ids)

    total = sum(counts.values())
    kept: dict[Reason, list[str]] = {reason: [] for reason in REASONS}
    for old in order:
        kept[reasons[vocabulary.names[old]]].append(vocabulary.names[old])
    report = VocabularyReport(
        rows_before=rows,
        rows_after=len(order),
        merges_before=len(merges.ranks),
        merges_after=len(merges.used),
        bytes_saved=bytes_saved,
        coverage=sum(count for number, count in counts.items() if number in new_ids) / total,
        tokens_before=total,
        tokens_after=compared.tokens,
        unknown_before=counts[vocabulary.unknown] if vocabulary.unknown is not None else 0,
        unknown_after=compared.unknown,
        texts=len(texts),
        texts_changed=compared.changed,
        kept={reason: tuple(tokens) for reason, tokens in kept.items() if tokens},
        old_ids=tuple(order),
    )
    return pruned, report


@dataclass(frozen=True)
class _Tables:
    """The parts of a model that have a row for each token."""

    embedding: nn.Embedding
    head: nn.Linear | None
    padding: int | None
    counts_positions: bool


def _check_numbers(min_count: int, max_size: int | None) -> None:
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise LmcompressError(f"min_count must be a whole number from 1, got {min_count!r}")
    if max_size is not None and (not isinstance(max_size, int) or isinstance(max_size, bool) or max_size < 1):
        raise LmcompressError(f"max_size must be a whole number of rows from 1, or None, got {max_size!r}")


def _tables_of(model: PreTrainedModel) -> _Tables:
    if not isinstance(model, PreTrainedModel):
        raise LmcompressError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; "
            "of a CompressedModel give its .model"
        )
    anatomy = anatomy_of(model)
    embedding = anatomy.embedding("word_embeddings")
    if not isinstance(embedding, nn.Embedding) or not _is_plain(embedding, embedding.num_embeddings):
        raise LmcompressError(
            "the word embeddings must be a plain nn.Embedding with a floating-point weight, got "
            f"{_describe(embedding)}; if they are quantized, packed or parametrized, prune the vocabulary first"
        )
    head = model.get_output_embeddings()
    rows = embedding.num_embeddings
    if head is not None and not (isinstance(head, nn.Linear) and _is_plain(head, rows)):
        raise LmcompressError(
            f"the head over the vocabulary must be a plain nn.Linear with {rows} rows, as the embeddings have, got "
            f"{_describe(head)}; if it is quantized or packed, prune the vocabulary first"
        )
    if model.config.vocab_size != rows:
        raise LmcompressError(
            f"model.config.vocab_size must be the embeddings' number of rows, {rows}, got {model.config.vocab_size}; "
            "change sizes with model.resize_token_embeddings, which sets both"
        )
    return _Tables(embedding, head, embedding.padding_idx, _counts_positions(anatomy))


def _is_plain(module: nn.Module, rows: int) -> bool:
    # a parametrized weight is not among the module's own parameters
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() == 2 and len(weight) == rows


def _describe(module: nn.Module | None) -> str:
    weight = getattr(module, "weight", None)
    of = f" with a weight of {weight.dtype}, {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return type(module).__name__ + of


def _counts_positions(anatomy: Anatomy) -> bool:
    """Whether positions are counted from the padding id, as RoBERTa's are: its position table has a padding row."""
    positions = anatomy.embedding("position_embeddings")
    return isinstance(positions, nn.Embedding) and positions.padding_idx is not None


def _special_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tables: _Tables, vocabulary: Vocabulary
) -> set[int]:
    """Every id that something names, once it is known that model and tokenizer belong together."""
    rows, largest = tables.embedding.num_embeddings, max(vocabulary.names, default=-1)
    if not largest < rows <= largest + 1 + _MAX_SPARE_ROWS:
        raise LmcompressError(
            f"model and tokenizer must belong together: the tokenizer's ids go up to {largest}, the embeddings have "
            f"{rows} rows (up to {_MAX_SPARE_ROWS} spare ones are taken for padding of the table). Load both from the "
            "same checkpoint, or call model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
    for name in _NAMED_IDS:
        said, own = getattr(model.config, f"{name}_token_id", None), getattr(tokenizer, f"{name}_token_id", None)
        several = said if isinstance(said, (list, tuple)) else [said]
        inside = [number for number in several if isinstance(number, int) and 0 <= number < rows]
        if inside and own is not None and own not in inside:
            raise LmcompressError(
                f"model and tokenizer must agree on {name}_token_id: model.config says {said}, the tokenizer {own}. "
                "They are not a pair, or one was changed: load both from the same checkpoint, or correct the wrong one"
            )
    special = {token["id"] for token in vocabulary.json["added_tokens"] if token["special"]}
    special |= {vocabulary.ids[token] for token in tokenizer.all_special_tokens if token in vocabulary.ids}
    special |= set(processor_ids(vocabulary.json["post_processor"]))
    if vocabulary.json["padding"] is not None:
        special.add(vocabulary.json["padding"]["pad_id"])
    if vocabulary.unknown is not None:
        special.add(vocabulary.unknown)
    named: dict[str, Sequence[Any]] = {"the embeddings' padding_idx": [tables.padding]}
    for config in _configs(model):
        for name, value in vars(config).items():
            if _is_token_id(name):
                named[f"{type(config).__name__}.{name}"] = value if isinstance(value, (list, tuple)) else [value]
    for where, numbers in named.items():
        for number in numbers:
            # GPT-2's config names 50256 by default, however small its vocabulary: that is of no row, and stays as it is
            if isinstance(number, int) and 0 <= number < rows:
                if number not in vocabulary.names:
                    raise LmcompressError(
                        f"{where} is {number}, which is no token of the tokenizer and would lose its row; "
                        "add that token to the tokenizer or set the field to a token's id"
                    )
                special.add(number)
    return special


def _configs(model: PreTrainedModel) -> list[Any]:
    # only models that generate have a generation config
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]


def _is_token_id(field: str) -> bool:
    return field.endswith("_token_id") and not field.startswith("_")


def _asked_for(keep: Collection[str], vocabulary: Vocabulary) -> list[str]:
    if isinstance(keep, str):
        raise LmcompressError(f"keep must be several tokens, got the one string {keep!r}; put it into a list")
    for token in keep:
        if token not in vocabulary.ids:
            inside = f"a piece inside a word begins with {vocabulary.prefix}"
            written = "a space is written Ġ" if vocabulary.is_bpe else inside
            near = get_close_matches(str(token), vocabulary.ids, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise LmcompressError(
                f"keep must name tokens of the tokenizer, got {token!r}, which is none; {hint}({written}; what "
                "tokenizer.tokenize(text) gives are tokens)"
            )
    return sorted(keep, key=vocabulary.ids.__getitem__)


def _choose(
    reasons: dict[str, Reason],
    merges: Merges,
    vocabulary: Vocabulary,
    counts: Counter[int],
    min_count: int,
    max_size: int | None,
) -> None:
    """Add the corpus's tokens to ``reasons``, the most frequent first, as many as may stay."""
    if max_size is not None and len(reasons) > max_size:
        groups = Counter(reasons.values())
        listed = ", ".join(f"{groups[reason]} {reason}" for reason in REASONS if groups[reason])
        raise LmcompressError(
            f"max_size must be at least {len(reasons)}, for so many tokens stay in any case ({listed}); got {max_size}"
            + ("" if vocabulary.is_bpe else ". keep_characters=False lets go of the alphabet")
        )
    special = {vocabulary.ids[token] for token, reason in reasons.items() if reason == "special"}
    frequent = [number for number, count in counts.items() if count >= min_count and number not in special]
    if not frequent:
        most = max((count for number, count in counts.items() if number not in special), default=0)
        raise LmcompressError(
            f"min_count must leave some of the corpus's tokens, got {min_count}; the most frequent one that is not "
            f"special occurs {most} times"
        )
    for number in sorted(frequent, key=lambda number: (-counts[number], number)):
        token = vocabulary.names[number]
        if reasons.get(token, "merges") != "merges":
            continue
        missing = {token, *merges.parts(token)} - reasons.keys()
        if max_size is None or len(reasons) + len(missing) <= max_size:
            reasons[token] = "corpus"
            for part in merges.take(token):
                reasons.setdefault(part, "merges")


def _shrink(model: PreTrainedModel, tables: _Tables, order: Sequence[int], new_ids: Mapping[int, int]) -> int:
    """Take the rows away, in everything that has them; the bytes that this saves."""
    rows, embedding, head = tables.embedding.num_embeddings, tables.embedding, tables.head
    tensors: list[Tensor | None] = [embedding.weight]
    if head is not None:
        tensors += [head.weight, head.bias]
        # BERT and RoBERTa keep the head's bias a second time, beside the head: the same tensor only where it is tied
        around = (module for module in model.modules() if any(child is head for child in module.children()))
        tensors += [p for module in around for p in module.parameters(recurse=False) if tuple(p.shape) == (rows,)]
    old = {id(tensor): tensor for tensor in tensors if tensor is not None}
    index = torch.tensor(list(order), device=embedding.weight.device)
    new = {
        key: nn.Parameter(tensor.detach()[index.to(tensor.device)].clone(), requires_grad=tensor.requires_grad)
        for key, tensor in old.items()
    }
    # by identity and in every module, so that what was tied stays tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
    embedding.num_embeddings = len(order)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_ids[embedding.padding_idx]
    if head is not None:
        head.out_features = len(order)
    model.config.vocab_size = len(order)
    for config in _configs(model):
        _renumber_config(config, new_ids)
    return sum((old[key].numel() - new[key].numel()) * old[key].element_size() for key in old)


def _renumber_config(config: Any, new_ids: Mapping[int, int]) -> None:
    """Renumber the fields of a model's or a generation config that name tokens.

    Ids that are of no row stay as they are. What a generation config says about tokens that have gone goes with them:
    they can no longer be generated.
    """
    for name, value in list(vars(config).items()):
        if value is None:
            continue
        if _is_token_id(name):
            several = isinstance(value, (list, tuple))
            setattr(config, name, [new_ids.get(i, i) for i in value] if several else new_ids.get(value, value))
        elif name in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(config, name, [new_ids[i] for i in value if i in new_ids] or None)
        elif name == "bad_words_ids":
            stay = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)]
            setattr(config, name, stay or None)
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            biases = [([new_ids[i] for i in ids], bias) for ids, bias in pairs if all(i in new_ids for i in ids)]
            as_dict = {tuple(ids): bias for ids, bias in biases}
            setattr(config, name, (as_dict if isinstance(value, dict) else [list(b) for b in biases]) or None)
