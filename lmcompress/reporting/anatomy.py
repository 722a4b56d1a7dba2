"""The page's sections on a model's structure: heads and neurons by block, bytes by part, bits by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmcompress.families import BLOCK_PARTS
from lmcompress.reporting.models import Model, what_is_pruned
from lmcompress.reporting.tables import pruned_blocks
from lmcompress.reporting.wording import megabytes

_COLOURS = {"embeddings": "--p1", "attention": "--p2", "feed-forward": "--p3", "head": "--p4", "other": "--p5"}
_NAMES = {"head": "pooler and head", "other": "norms, tokenizer, config"}
_COLUMNS = BLOCK_PARTS


def pruning_maps(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Remaining heads and neurons in each block of each model.

    Args:
        models: models of a report; controls are omitted.
    """
    return [_pruning_map(model) for model in models if model.row.get("pruning") and model.kind != "control"]


def vocabulary_notes(models: Sequence[Model]) -> list[str]:
    """The effect of vocabulary pruning on each model.

    Args:
        models: models of a report.
    """
    return [
        f"{model.name}: Its vocabulary has {found['rows_after']:,} tokens, {found['rows_before']:,} before; "
        f"{found['bytes_saved'] / 1e6:.2f} MB less; {found['texts_changed']:,} of {found['texts']:,} texts are split "
        "into other tokens."
        for model in models
        if (found := model.row.get("vocabulary"))
    ]


def part_legend(models: Sequence[Model]) -> list[dict[str, str]]:
    """Names and colours of the parts in the byte chart.

    Args:
        models: models of a report.
    """
    present = {entry["part"] for model in models for entry in model.row.get("modules") or ()}
    return [{"name": _NAMES.get(part, part), "colour": colour} for part, colour in _COLOURS.items() if part in present]


def byte_stacks(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Bytes on disk of each model by part, all on one scale.

    Args:
        models: models of a report; controls, and models of unknown size, are omitted.
    """
    shown = [model for model in models if model.size and model.kind != "control"]
    most = max((model.size or 0 for model in shown), default=1)
    stacks = []
    for model in shown:
        bars: list[dict[str, Any]] = [
            {"width": round(100 * size / most, 2), "colour": colour, "title": f"{name}: {megabytes(size)}"}
            for name, colour, size in _parts(model)
        ]
        label = ", ".join(bar["title"] for bar in bars)
        stacks.append(
            {"name": model.name, "kind": model.kind, "total": megabytes(model.size or 0), "label": label, "bars": bars}
        )
    return stacks


def bit_tables(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Bits of each quantized matrix, by block and place, and the parts that they are in.

    Args:
        models: models of a report; controls are omitted.

    Returns:
        For each quantized model ``name``, ``columns``, ``rows`` (a block each), ``others`` (matrices outside of the
        blocks), ``dense`` (the dense modules, and why).
    """
    tables = []
    for model in models:
        quantization = model.row.get("quantization")
        if not quantization or model.kind == "control":
            continue
        matrices = quantization["matrices"]
        blocks: dict[int, dict[str, Any]] = {}
        for matrix in matrices:
            number = _block(matrix["path"])
            if number is not None and matrix.get("part") in _COLUMNS:
                blocks.setdefault(number, {})[matrix["part"]] = _bits(matrix)
        columns = [column for column in _COLUMNS if any(column in cells for cells in blocks.values())]
        tables.append(
            {
                "name": model.name,
                "columns": [column.replace("_", " ") for column in columns],
                "rows": [(n, [blocks[n].get(column) for column in columns]) for n in sorted(blocks)],
                "others": [
                    {"path": matrix["path"], **_bits(matrix)}
                    for matrix in matrices
                    if _block(matrix["path"]) is None or matrix.get("part") not in _COLUMNS
                ],
                "dense": sorted((quantization.get("dense") or {}).items()),
                "text": _quantization_text(quantization),
            }
        )
    return tables


def bits_per_weight(quantization: Mapping[str, Any]) -> float:
    """Bits of codes and scales for each quantized weight.

    Args:
        quantization: entry of a row.
    """
    matrices = quantization["matrices"]
    return 8 * sum(m["bytes_after"] for m in matrices) / max(1, sum(m["weights"] for m in matrices))


def module_table(model: Model) -> list[dict[str, Any]]:
    """Bytes of each module of a model, in the order of the file.

    Args:
        model: model of a report.
    """
    return [
        {"path": entry["path"] or "(others)", "colour": _COLOURS[entry["part"]], "size": f"{entry['bytes']:,}"}
        for entry in model.row.get("modules") or ()
    ]


def _pruning_map(model: Model) -> dict[str, Any]:
    pruning = model.row["pruning"]
    blocks = []
    for block, kept in zip(pruned_blocks(pruning), pruning["kept_heads"], strict=True):
        share = round(100 * block["ffn"] / max(1, block["ffn_before"]), 1)
        cells = [{"number": head, "on": head in kept} for head in range(block["heads_before"])]
        blocks.append({**block, "cells": cells, "share": share})
    asked = f" (target: {100 * pruning['asked']:.1f} %)" if pruning.get("asked") is not None else ""
    heads, heads_before = (sum(block[key] for block in blocks) for key in ("heads", "heads_before"))
    neurons, neurons_before = (sum(block[key] for block in blocks) for key in ("ffn", "ffn_before"))
    method, stock = pruning.get("method") or {}, pruning["stock"]
    text = [
        f"{100 * pruning['removed']:.1f} % of {what_is_pruned(pruning)} are pruned{asked}: "
        f"{heads:,} of {heads_before:,} heads and {neurons:,} of {neurons_before:,} neurons are kept."
    ]
    if method.get("criterion"):
        text.append(f"Criterion: {method['criterion']}; ranking: {method.get('ranking')}.")
    text.append(
        "It loads with stock Transformers." if stock["loads"] else f"It needs lmcompress to load: {stock['reason']}."
    )
    most = max((block["heads_before"] for block in blocks), default=0)
    return {"name": model.name, "blocks": blocks, "heads_before": most, "text": " ".join(text)}


def _parts(model: Model) -> list[tuple[str, str, int]]:
    """Name, colour and bytes of each part."""
    sums = dict.fromkeys(_COLOURS, 0)
    for entry in model.row.get("modules") or ():
        sums[entry["part"]] += entry["bytes"]
    if not any(sums.values()):
        return [("all files", f"--{model.kind}", model.size or 0)]
    return [(_NAMES.get(part, part), _COLOURS[part], size) for part, size in sums.items() if size]


def _bits(matrix: Mapping[str, Any]) -> dict[str, Any]:
    bits = matrix["bits"]
    level = {2: 1, 3: 2, 4: 3, 8: 5}.get(bits, 4) if isinstance(bits, int) else 1
    size = matrix["bytes_after"]
    inputs = f", activations {matrix['inputs']} bits" if matrix.get("inputs") else ""
    title = f"{matrix['path']}: {8 * size / max(1, matrix['weights']):.2f} bits a weight, {size:,} bytes{inputs}"
    return {"bits": bits, "level": level, "title": title, "size": _kilobytes(size)}


def _kilobytes(size: int) -> str:
    return f"{size / 1e3:.1f} kB" if size < 1e6 else megabytes(size)


def _quantization_text(quantization: Mapping[str, Any]) -> str:
    matrices = quantization["matrices"]
    inputs = {matrix.get("inputs") for matrix in matrices if matrix.get("part") != "embeddings"} - {None}
    activations = f"activations in {'/'.join(map(str, sorted(inputs)))} bits" if inputs else "activations in float"
    how = {"trained": "trained quantization", "rtn": "round-to-nearest"}.get(
        quantization["method"], quantization["method"].upper()
    )
    return (
        f"{len(matrices)} matrices in {bits_per_weight(quantization):.2f} bits a weight, scales included; "
        f"{activations}; {how}. Darker cells have more bits."
    )


def _block(path: str) -> int | None:
    return next((int(piece) for piece in path.split(".") if piece.isdecimal()), None)
