"""How many bytes does a multilingual model lose that is cut to one language or two, and which other texts change?

- opus-mt-en-fr: its tokenizer (Marian, two SentencePiece models), with a Marian of its shape and random weights, cut to
  English and French, and to English alone (a model that only reads).
- XLM-R-base: its shape with random weights, and a Unigram tokenizer trained here on the 15 languages of XNLI, cut to
  English and French; then both vocabulary and int8 in one recipe.

The vocabulary is chosen from XNLI test, PAWS-X and Tatoeba; held out is XNLI validation, of the same languages. Of both
models only sizes are measured, no quality: their weights are random.

    python benchmarks/vocabulary.py --data ../shared/data --work runs

Needs ``sentencepiece`` for Marian.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from common import asked, write
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedTokenizerBase,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from lmcompress.pruning import prune_vocabulary
from lmcompress.recipes import parse_recipe, run

LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
KEPT = ("en", "fr")
ROWS, QUICK_ROWS = 250_002, 8_000
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def sentences(files: Sequence[Path], columns: Sequence[str]) -> list[str]:
    """The different texts of some columns, in order."""
    tables = [pq.read_table(file, columns=list(columns)) for file in files]
    return list(dict.fromkeys(text for table in tables for column in columns for text in table[column].to_pylist()))


def chosen_from(data: Path, language: str, quick: bool) -> list[str]:
    """Texts of a language from which the vocabulary is chosen."""
    folder = data / "multilingual"
    found = sentences([folder / "xnli" / language / "test.parquet"], ["premise", "hypothesis"])
    found += sentences(sorted((folder / "pawsx" / language).glob("*.parquet")), ["sentence1", "sentence2"])
    found += sentences([folder / "tatoeba" / "fr-en.parquet"], [{"fr": "lang", "en": "english"}[language]])
    return found[:500] if quick else found


def held_out(data: Path, language: str, quick: bool) -> list[str]:
    """Texts of a language that the vocabulary was not chosen from."""
    found = sentences([data / "multilingual" / "xnli" / language / "validation.parquet"], ["premise", "hypothesis"])
    return found[:500] if quick else found


def bytes_of(save: Callable[[Path], Any], pattern: str) -> int:
    """Size of the files that are saved."""
    with tempfile.TemporaryDirectory() as name:
        save(Path(name))
        return sum(file.stat().st_size for file in Path(name).glob(pattern))


def unchanged(
    before: Callable[[str], list[int]], after: Callable[[str], list[int]], old_ids: Sequence[int], texts: Sequence[str]
) -> float:
    """Share of texts that are split as before."""
    return sum(before(text) == [old_ids[i] for i in after(text)] for text in texts) / len(texts)


def cut(
    name: str, model: Any, tokenizer: PreTrainedTokenizerBase, texts: Any, targets: Any, held: dict[str, list[str]]
) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
    """A row of results: a model is cut to some texts, and read on others."""
    sizes = [bytes_of(model.save_pretrained, "*.safetensors")]
    files = [bytes_of(tokenizer.save_pretrained, "*")]
    start = time.perf_counter()
    small, report = prune_vocabulary(model, tokenizer, texts, target_texts=targets)
    seconds = time.perf_counter() - start
    sizes.append(bytes_of(model.save_pretrained, "*.safetensors"))
    files.append(bytes_of(small.save_pretrained, "*"))
    shares = {}
    for language, unseen in held.items():
        side = "text_target" if targets is not None and language == KEPT[1] else "text"

        def ids(text: str, reads: Any, side: str = side) -> list[int]:
            return list(reads(**{side: text})["input_ids"])

        shares[language] = unchanged(
            lambda text: ids(text, tokenizer), lambda text: ids(text, small), report.old_ids, unseen
        )
    row = {
        "model": name,
        "rows_before": report.rows_before,
        "rows_after": report.rows_after,
        "bytes_before": sizes[0],
        "bytes_after": sizes[1],
        "tokenizer_before": files[0],
        "tokenizer_after": files[1],
        "texts": report.texts,
        "texts_changed": report.texts_changed,
        "held_out": {language: len(unseen) for language, unseen in held.items()},
        "unchanged": shares,
        "seconds": seconds,
    }
    print(json.dumps(row), flush=True)
    return row, small


def marian_model(tokenizer: PreTrainedTokenizerBase) -> MarianMTModel:
    """A model of the shape of opus-mt-en-fr with random weights."""
    pad = int(tokenizer.pad_token_id)
    sizes = dict(d_model=512, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=2048, decoder_ffn_dim=2048)
    heads = dict(encoder_attention_heads=8, decoder_attention_heads=8, max_position_embeddings=512)
    ids = dict(
        pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=0, forced_eos_token_id=0, bad_words_ids=[[pad]]
    )
    torch.manual_seed(0)
    return MarianMTModel(MarianConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids))


def marian_rows(data: Path, quick: bool) -> list[dict[str, Any]]:
    """opus-mt-en-fr cut to its two languages, and to English."""
    english, french = (chosen_from(data, language, quick) for language in KEPT)
    held = {language: held_out(data, language, quick) for language in KEPT}
    rows = []
    for name, targets in (("English → French", french), ("English, read only", [])):
        tokenizer = MarianTokenizer.from_pretrained(data / "tokenizers" / "opus-mt-en-fr")
        model = marian_model(tokenizer)
        used = held if targets else {"en": held["en"]}
        rows.append(cut(f"opus-mt-en-fr shape, {name}", model, tokenizer, english, targets, used)[0])
    return rows


def unigram(data: Path, work: Path, quick: bool) -> PreTrainedTokenizerBase:
    """XLM-R's kind of tokenizer, trained on all languages; kept in ``work``."""
    rows = QUICK_ROWS if quick else ROWS
    folder = work / f"unigram-{rows}"
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=rows - 1, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False
        )
        for_all = [
            text
            for language in LANGUAGES
            for text in sentences(
                sorted((data / "multilingual" / "xnli" / language).glob("*.parquet")), ["premise", "hypothesis"]
            )
        ]
        tokenizer.train_from_iterator(for_all[:: 20 if quick else 1], trainer)
        pieces = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
        XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)]).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def xlm_roberta(rows: int) -> XLMRobertaForSequenceClassification:
    """A classifier of XLM-R-base's shape with random weights."""
    torch.manual_seed(0)
    return XLMRobertaForSequenceClassification(
        XLMRobertaConfig(vocab_size=rows, max_position_embeddings=514, type_vocab_size=1, num_labels=3)
    )


RECIPE = """\
name: two-languages
model: {model}
task: {{name: {task}, max_length: 64, limit: 16}}
stages:
  - name: small
    vocabulary: {{}}
    quantization: {{}}
    training: {{max_steps: 0}}
evaluation: {{latency_batches: []}}
"""


def recipe_row(data: Path, tokenizer: PreTrainedTokenizerBase, quick: bool) -> dict[str, Any]:
    """Vocabulary and int8 in one recipe."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = xlm_roberta(len(tokenizer))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        del model
        for split, texts_of in (("train", chosen_from), ("validation", held_out)):
            texts = [text for language in KEPT for text in texts_of(data, language, quick)]
            (folder / "task").mkdir(exist_ok=True)
            with open(folder / "task" / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
                rows = ((text, "abc"[i % 3]) for i, text in enumerate(texts))
                csv.writer(file).writerows([("text", "label"), *rows])
        start = time.perf_counter()
        recipe = parse_recipe(RECIPE.format(model=folder / "model", task=folder / "task"))
        made = run(recipe, folder / "run", console=Console(quiet=True)).models["small"]
        seconds = time.perf_counter() - start
        before, after = (
            sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (folder / "model", Path(made))
        )
        small = AutoTokenizer.from_pretrained(made)
    row = {
        "model": "XLM-R-base shape, English and French, int8 (one recipe)",
        "rows_before": len(tokenizer),
        "rows_after": len(small),
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds multilingual/ and tokenizers/")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the trained tokenizer is kept")
    parser.add_argument("--quick", action="store_true", help="a small tokenizer and a few texts, to see that it runs")
    options = parser.parse_args()
    rows = marian_rows(options.data, options.quick)
    tokenizer = unigram(options.data, options.work / "vocabulary", options.quick)
    texts = [text for language in KEPT for text in chosen_from(options.data, language, options.quick)]
    held = {language: held_out(options.data, language, options.quick) for language in KEPT}
    model = xlm_roberta(len(tokenizer))
    rows.append(cut("XLM-R-base shape, English and French", model, tokenizer, texts, None, held)[0])
    del model
    rows.append(recipe_row(options.data, tokenizer, options.quick))
    less = 1 - rows[-1]["bytes_after"] / rows[-1]["bytes_before"]
    changed = sum(row.get("texts_changed", 0) for row in rows)
    wanted = [
        asked("XLM-R-base shape, vocabulary and int8 in one recipe: fewer bytes", ">= 0.85", less, less >= 0.85),
        asked("texts pruned for that are split otherwise", "0", changed, changed == 0),
    ]
    write("vocabulary", rows, wanted, quick=options.quick)


if __name__ == "__main__":
    main()
