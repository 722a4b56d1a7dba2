"""Texts that a model writes: generation over a data set, and the metrics of summaries and translations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.running import batches_by_length, evaluating, with_progress
from lmcompress.errors import LmcompressError, nearest
from lmcompress.evaluation.predict import Collator, Rows
from lmcompress.families import input_names

WRITTEN_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf")
"""Metrics of texts, each in per cent."""

_OF_TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")


def written_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Rows,
    collator: Collator,
    *,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> list[str]:
    """The text that an encoder–decoder writes for each row; rows of similar length share a batch.

    Nothing is sampled. The model runs on its device, in evaluation mode; its modules' modes are restored afterwards.

    Args:
        model: a model that generates.
        tokenizer: its tokenizer, which decodes.
        dataset: rows for the collator, with ``input_ids``.
        collator: makes a batch of rows; labels are not used.
        batch_size: rows of a batch.
        num_beams: beams of the search; 1 is greedy.
        max_new_tokens: most tokens of a text.
        progress: whether to show a bar, on a terminal.

    Returns:
        The texts in the order of the rows, without special tokens.

    Raises:
        LmcompressError: If the model cannot generate, or a number is less than 1.
    """
    if not model.can_generate():
        raise LmcompressError(
            f"a {type(model).__name__} writes no texts: load the model with its head, by AutoModelForSeq2SeqLM"
        )
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise LmcompressError(f"{name} must be >= 1, got {value}")
    names = input_names(model).difference(_OF_TARGETS)
    batches = batches_by_length([len(dataset[index]["input_ids"]) for index in range(len(dataset))], batch_size)
    texts = [""] * len(dataset)
    with evaluating(model):
        for indices in with_progress(batches, "generate", enabled=progress):
            batch = collator([dataset[index] for index in indices])
            inputs = {name: value.to(model.device) for name, value in batch.items() if name in names}
            said = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
            for index, text in zip(indices, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True):
                texts[index] = text.strip()
    return texts


def written_scores(names: Iterable[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The named metrics of texts, with the names and values of ``evaluate``'s ``rouge`` and ``sacrebleu``, in per cent.

    Args:
        names: of :data:`WRITTEN_METRICS`: ROUGE's F-measures with stemming, the mean over the texts (``rougeLsum``
            splits summaries at line breaks); BLEU and chrF of the whole corpus.
        predictions: the texts written.
        references: one text for each.

    Returns:
        Name to value, from 0 to 100.

    Raises:
        LmcompressError: If a name is unknown, there are no texts or not as many of both, or the package that computes a
            metric is missing.

    Example:
        >>> written_scores(["rouge1"], ["a cat sat"], ["a cat sat down"])["rouge1"] > 80
        True
    """
    chosen = list(names)
    for name in chosen:
        if name not in _SCORERS:
            raise LmcompressError(f"unknown metric {name!r}{nearest(name, _SCORERS)}")
    if not predictions or len(predictions) != len(references):
        raise LmcompressError(
            f"each text must have one reference, got {len(predictions)} texts and {len(references)} references"
        )
    return {name: _SCORERS[name](predictions, references) for name in chosen}


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing(kind, "rouge-score") from error
    scorer = RougeScorer([kind], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    return 100 * float(np.mean([scorer.score(wanted, text)[kind].fmeasure for wanted, text in pairs]))


def _sacrebleu(kind: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing(kind, "sacrebleu") from error
    metric = sacrebleu.corpus_bleu if kind == "bleu" else sacrebleu.corpus_chrf
    return float(metric(list(predictions), [list(references)]).score)


def _missing(metric: str, package: str) -> LmcompressError:
    return LmcompressError(f'{metric} needs {package}: pip install "lmcompress[text-metrics]"')


_SCORERS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    name: partial(_rouge if name.startswith("rouge") else _sacrebleu, name) for name in WRITTEN_METRICS
}
