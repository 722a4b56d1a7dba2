"""Quantization of a model that no task is named for: sentence encoders, and models whose rows are elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.data.columns import check_texts, find_text_columns
from lmcompress.data.sources import read_files
from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation import cosine_similarities, size_on_disk
from lmcompress.families.positions import positions_of
from lmcompress.model import CompressedModel
from lmcompress.quantization.planning import plan
from lmcompress.quantization.ptq import check_post_training, quantize
from lmcompress.recipes.checks import check_writable
from lmcompress.recipes.lookup import found
from lmcompress.recipes.one_model import load_compressed
from lmcompress.recipes.parts.quantization import StageQuantization
from lmcompress.recipes.progress import quiet_libraries
from lmcompress.recipes.single import refuse_what_is_there
from lmcompress.sentences import SentenceEncoder, is_sentence_encoder

_ROWS_OF_A_BATCH = 8
_LENGTH = 128


@dataclass(frozen=True)
class Alone:
    """What was done to a model without a task.

    Attributes:
        matrices: number of quantized matrices.
        bits_per_weight: of these, scales included.
        bytes_before: bytes of all tensors.
        bytes_after: the same, packed.
        files: bytes of the folder written; None if nothing was.
        cosine: for a sentence encoder with texts, the mean cosine of the embeddings before and after.
        loads_with: the line of Python that loads the folder.
    """

    matrices: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    files: int | None = None
    cosine: float | None = None
    loads_with: str = ""


def quantize_without_task(
    model: str,
    output: Path,
    quantization: StageQuantization,
    *,
    texts: Sequence[str] = (),
    max_length: int | None = None,
    save: str = "native",
    storage: str = "plain",
    seed: int = 0,
    overwrite: bool = False,
) -> Alone:
    """Quantize a model without training and without measuring its quality.

    Args:
        model: folder, or name on the Hub: any model, or a folder of sentence-transformers, which stays one.
        output: folder of the resulting model.
        quantization: the quantization, including the rounding method.
        texts: to calibrate on, where the method or static ranges need it.
        max_length: longest text in tokens; None: 128, or what the model has positions for.
        save: format of the folder, ``native`` or ``self_loading``.
        storage: storage of its weights in the file.
        seed: seed of the choice of texts.
        overwrite: whether a model that lmcompress wrote there may be replaced.

    Returns:
        What was done.

    Raises:
        LmcompressError: If something is at ``output`` already, the model does not exist, or the quantization is not
            possible, or needs texts and there are none; nothing was written.
    """
    refuse_what_is_there(output, overwrite)
    check_writable(output)
    with quiet_libraries():
        encoder = SentenceEncoder.from_pretrained(model) if is_sentence_encoder(model) else None
        compressed = load_compressed(model) if encoder is None else CompressedModel.wrap(encoder.model)
        config, method = quantization.config(seed, trains=False), quantization.method or "rtn"
        inner = compressed.model.eval()
        check_post_training(inner, plan(inner, config), method)
        needs = method != "rtn" or (config.activations is not None and config.activations.range == "static")
        if needs and not texts:
            raise LmcompressError(
                f"{'static ranges' if method == 'rtn' else f'the method {method}'} must be calibrated on texts: give "
                f"{argument('task')}, or texts with {argument('data')}"
            )
        tokenizer = _tokenizer(model) if encoder is None else encoder.tokenizer
        chosen = _drawn(texts, config.calibration_rows, seed)
        dense = None if encoder is None or not chosen else encoder.encode(chosen)
        batches = _batches(chosen, inner, tokenizer, max_length, model)
        report = quantize(inner, config, batches or None, method=method, progress=False)
        options: dict[str, Any] = {"format": save, "storage": storage, "batches": batches[:2] or None}
        options["report"] = {"quantization": report.to_dict()}
        if encoder is not None:
            encoder.save_pretrained(output, **options)
        else:
            compressed.save_pretrained(output, tokenizer=tokenizer, **options)
        cosine = None
        if encoder is not None and dense is not None:
            cosine = float(cosine_similarities(dense, encoder.encode(chosen)).mean())
    return Alone(
        matrices=len(report.matrices),
        bits_per_weight=report.bits_per_weight,
        bytes_before=report.bytes_before,
        bytes_after=report.bytes_after,
        files=size_on_disk(output).total_bytes,
        cosine=cosine,
        loads_with=_loading(inner, output, encoder is not None, save),
    )


def read_texts(path: str, text_columns: Sequence[str] | None) -> list[str]:
    """The texts of a file to calibrate on.

    Args:
        path: a file of rows, or of plain text with one text in each line.
        text_columns: the columns of a table; None: the usual names.

    Returns:
        all texts that are not empty.

    Raises:
        LmcompressError: If the file or a column does not exist, or there is no text.
    """
    rows = read_files([Path(path)])
    columns = find_text_columns(rows.column_names, text_columns)
    for column in columns:
        check_texts(rows, column, "train", words=False)
    plain = Path(path).name.removesuffix(".gz").removesuffix(".xz").endswith(".txt")
    values = [text for column in columns for text in rows[column]]
    lines = [line for text in values for line in (text.splitlines() if plain else [text]) if line.strip()]
    if not lines:
        raise LmcompressError(f"{path} holds no text")
    return lines


def _tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    if not Path(model).is_dir() or any(Path(model).glob("tokenizer*")) or any(Path(model).glob("vocab*")):
        with found(model, "tokenizer"):
            return AutoTokenizer.from_pretrained(model)
    return None


def _drawn(texts: Sequence[str], count: int, seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count]
    return [texts[i] for i in order.tolist()]


def _batches(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    name: str,
) -> list[dict[str, Any]]:
    if not texts:
        return []
    if tokenizer is None:
        raise LmcompressError(f"{name} holds no tokenizer, which texts need; save that of the model there")
    length = min(max_length or _LENGTH, positions_of(model.config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    spans = [texts[i : i + _ROWS_OF_A_BATCH] for i in range(0, len(texts), _ROWS_OF_A_BATCH)]
    return [
        dict(tokenizer(span, padding=True, truncation=True, max_length=length, return_tensors="pt")) for span in spans
    ]


def _loading(model: PreTrainedModel, output: Path, sentences: bool, save: str) -> str:
    trust = "trust_remote_code=True" if save == "self_loading" else ""
    first = "" if trust else "import lmcompress; "
    more = f", {trust}" if trust else ""
    name = type(model).__name__
    if sentences:
        return (
            f"{first}from sentence_transformers import SentenceTransformer\n"
            f"  model = SentenceTransformer({str(output)!r}{more})"
        )
    loader = "AutoModel" if model.base_model is model else name
    return f"{first}from transformers import {loader}\n  model = {loader}.from_pretrained({str(output)!r}{more})"
