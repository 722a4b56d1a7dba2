"""Latency: the time of sub-layers by their width, measured on this machine."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.schema import Structure
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.evaluation.speed import compare_latency, machine
from lmcompress.evaluation.timing import steady_clock
from lmcompress.families import Anatomy, anatomy_of, choose_layers_in_config
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.units import full

FILE_VERSION = 1

Points = tuple[tuple[int, float], ...]
"""``(count, milliseconds)``, by count."""


class LatencyTable(BaseModel):
    """Measured times of sub-layers by width, whose sum is the time of a model, as in ZipLM.

    Attributes:
        machine: processor or GPU, and threads, of the measurement.
        dtype: dtype of the weights.
        batch_size: rows.
        length: tokens of a row.
        model_type: model family.
        hidden: width of the residual stream.
        head_size: width of the output of a head, that of its queries.
        heads: milliseconds of attention by number of heads, from 0.
        ffn: milliseconds of a feed-forward network by number of neurons, from 0.
        block_ms: milliseconds of the rest of a block, without heads and neurons.
        base_ms: milliseconds of everything outside the blocks.
        unit: unit of the cost.

    Reference:
        Kurtic, Frantar & Alistarh, *ZipLM: Inference-Aware Structured Pruning of Language Models*, NeurIPS 2023,
        https://arxiv.org/abs/2302.04089, section 3.2.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    machine: Annotated[str, Field(max_length=400)]
    dtype: Annotated[str, Field(max_length=40)]
    batch_size: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=1)]
    model_type: Annotated[str, Field(max_length=80)]
    hidden: Annotated[int, Field(ge=1)]
    head_size: Annotated[int, Field(ge=1)]
    heads: Annotated[Points, Field(min_length=2)]
    ffn: Annotated[Points, Field(min_length=2)]
    block_ms: Annotated[float, Field(ge=0)]
    base_ms: Annotated[float, Field(ge=0)]
    unit: Literal["ms"] = "ms"

    @field_validator("heads", "ffn")
    @classmethod
    def _ascends(cls, points: Points) -> Points:
        counts, times = zip(*points, strict=True)
        if counts[0] != 0 or list(counts) != sorted(set(counts)) or list(times) != sorted(times) or times[0] < 0:
            raise ValueError("counts must ascend from 0, and times never fall or be negative")
        return points

    @property
    def key(self) -> str:
        """The key of a table in a file."""
        return table_key(
            self.machine, self.dtype, self.batch_size, self.length, f"{self.model_type}-{self.hidden}x{self.head_size}"
        )

    def cost(self, structure: Structure) -> float:
        """Milliseconds of one forward pass, interpolated between the measured counts.

        Args:
            structure: the shapes.

        Raises:
            LmcompressError: If hidden size or head size differ from the table's, or there are more heads or neurons.
        """
        width = structure.head_width
        if structure.hidden not in (None, self.hidden) or width != self.head_size:
            raise LmcompressError(
                f"this latency table is of hidden size {self.hidden} with heads of {self.head_size}, got "
                f"{structure.hidden or self.hidden} with {width}: times do not carry over; measure a "
                "model of that width, or target flops_share if hidden dimensions are pruned"
            )
        blocks = sum(
            self.block_ms + _interpolated(self.heads, shape.heads, "heads") + _interpolated(self.ffn, shape.ffn, "ffn")
            for shape in structure.blocks
        )
        return self.base_ms + blocks

    def save(self, path: str | Path) -> None:
        """Add the table to a JSON file, next to those of other machines, types, batches and lengths.

        Args:
            path: created if it does not exist; a table with the same key is replaced.

        Raises:
            LmcompressError: If there is a file that holds no latency tables.
        """
        file = Path(path)
        tables = _read_tables(file) if file.exists() else {}
        tables[self.key] = self
        content = {key: table.model_dump(mode="json") for key, table in sorted(tables.items())}
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format_version": FILE_VERSION, "tables": content}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def find(cls, path: str | Path, model: PreTrainedModel, *, batch_size: int, length: int) -> LatencyTable | None:
        """As :meth:`load`, but None if the file does not exist or has no such table.

        Args:
            path: file written by :meth:`save`.
            model: determines dtype, device and widths.
            batch_size: rows.
            length: tokens of a row.

        Raises:
            LmcompressError: If there is a file that holds no latency tables.
        """
        file = Path(path)
        key = table_key(_machine_name(model.device), _dtype_name(model), batch_size, length, _widths(model))
        return _read_tables(file).get(key) if file.exists() else None

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, *, batch_size: int, length: int) -> LatencyTable:
        """The table of this machine for a model, from a file.

        Args:
            path: file written by :meth:`save`.
            model: determines dtype, device and widths.
            batch_size: rows.
            length: tokens of a row.

        Raises:
            LmcompressError: If the file is missing, holds no latency tables, or not this one; the message lists the
                existing ones.
        """
        tables = _read_tables(Path(path))
        key = table_key(_machine_name(model.device), _dtype_name(model), batch_size, length, _widths(model))
        if key not in tables:
            raise LmcompressError(
                f"{str(path)!r} must have a latency table for {key!r}, it has: {', '.join(map(repr, sorted(tables)))}. "
                "Times are only valid where they were measured: create one here with measure_latency"
            )
        return tables[key]


def table_key(machine_name: str, dtype: str, batch_size: int, length: int, widths: str) -> str:
    """The key of a table in a file.

    Args:
        machine_name: processor or GPU, and threads.
        dtype: dtype of the weights.
        batch_size: rows.
        length: tokens of a row.
        widths: family, hidden size and head size.
    """
    return f"{machine_name} | {dtype} | {batch_size}x{length} | {widths}"


def measure_latency(
    model: PreTrainedModel,
    *,
    batch_size: int = 32,
    length: int = 128,
    points: int = 5,
    copies: int = 4,
    repeats: int = 15,
    warmup: int = 2,
) -> LatencyTable:
    """Measure a model's sub-layers at several widths, on the model's machine and device.

    Whole models are timed, not single sub-layers: copies of this one in which every attention has n heads,
    or every feed-forward network n neurons. All of them are in one process and timed in rounds of random order, and
    their times are the dense model's median over medians of pairs within rounds, so that slowdowns and load affect all
    equally; on one thread of a CPU, these ratios are of CPU time. Times are made monotone in the width.

    Args:
        model: dense, of a known family; not modified.
        batch_size: rows.
        length: tokens of a row.
        points: number of widths of each kind besides 0; the smallest (one head, 1/32 of the neurons) and the full width
            are among them.
        copies: number of blocks of the narrower models; more are closer to the cache behaviour of the real model and
            take more memory. Embeddings are shared.
        repeats: timed calls of each.
        warmup: untimed calls before those.

    Returns:
        The table. It reproduces the measured time of the dense model.

    Raises:
        LmcompressError: If there are fewer than 2 points, no copies, or a block without heads or neurons, or as
            :func:`~lmcompress.evaluation.speed.compare_latency`.
    """
    anatomy, structure = anatomy_of(model), structure_of(model)
    heads, ffn = {b.heads for b in structure.blocks}, {b.ffn for b in structure.blocks}
    if points < 2 or copies < 1:
        raise LmcompressError(f"points must be >= 2 and copies >= 1, got {points} and {copies}")
    if len(heads) != 1 or len(ffn) != 1 or 0 in heads | ffn:
        raise LmcompressError(
            f"a latency table must be measured on a model with equal blocks, got heads {sorted(heads)} and FFN "
            f"widths {sorted(ffn)}; measure the dense model that this one was cut from"
        )
    (most_heads,), (most_ffn,) = heads, ffn
    depth, small = len(anatomy.blocks), min(copies, len(anatomy.blocks))
    head_counts = _grid(most_heads, 1, points)
    ffn_counts = _grid(most_ffn, max(1, most_ffn // 32), points)
    models = {"dense": model, "one block": _with_blocks(anatomy, 1), "small": _with_blocks(anatomy, small)}
    for count in head_counts[:-1]:
        models[f"heads {count}"] = _narrow(anatomy, small, "heads", count)
    for count in ffn_counts[:-1]:
        models[f"ffn {count}"] = _narrow(anatomy, small, "neurons", count)
    rows = compare_latency(
        models, batch_sizes=(batch_size,), sequence_length=length, repeats=max(3, repeats), warmup=warmup
    )
    clock = steady_clock(torch.get_num_threads(), model.device)
    # of pairs within rounds, and so of equal conditions
    times = {row.model: rows[0].median_ms / row.speedup(clock).median for row in rows}
    times[f"heads {most_heads}"] = times[f"ffn {most_ffn}"] = times["small"]
    head_points = _points(times, "heads", head_counts, small)
    ffn_points = _points(times, "ffn", ffn_counts, small)
    own = head_points[-1][1] + ffn_points[-1][1]
    block = max(own, (times["dense"] - times["one block"]) / (depth - 1)) if depth > 1 else own
    # speed-ups are relative to the dense model's time: the table must reproduce it exactly
    block = min(block, times["dense"] / depth)
    shrink = min(1.0, block / own) if own > 0 else 1.0
    return LatencyTable(
        machine=_machine_name(model.device),
        dtype=_dtype_name(model),
        batch_size=batch_size,
        length=length,
        model_type=model.config.model_type,
        hidden=anatomy.hidden_size,
        head_size=structure.head_width,
        heads=tuple((count, ms * shrink) for count, ms in head_points),
        ffn=tuple((count, ms * shrink) for count, ms in ffn_points),
        block_ms=max(0.0, block - own * shrink),
        base_ms=max(0.0, times["dense"] - depth * block),
    )


def _interpolated(points: Points, count: int, what: str) -> float:
    counts, times = zip(*points, strict=True)
    if count > counts[-1]:
        raise LmcompressError(f"this latency table goes up to {counts[-1]} {what}, got {count}; measure a wider model")
    return float(np.interp(count, counts, times))


def _grid(most: int, least: int, points: int) -> list[int]:
    return sorted({0, least, *(round(most * i / (points - 1)) for i in range(1, points))})


def _points(times: dict[str, float], kind: str, counts: Sequence[int], copies: int) -> Points:
    raw = np.array([(times[f"{kind} {count}"] - times[f"{kind} 0"]) / copies for count in counts])
    # halfway between the lowest and the highest monotone curve: noise goes both ways
    rising = (np.maximum.accumulate(raw) + np.minimum.accumulate(raw[::-1])[::-1]) / 2
    return tuple((count, float(ms)) for count, ms in zip(counts, np.maximum(rising - rising[0], 0), strict=True))


def _with_blocks(anatomy: Anatomy, count: int) -> PreTrainedModel:
    """A copy with the first blocks only, which are copies; everything else is shared with the model."""
    blocks = nn.ModuleList(copy.deepcopy(module) for module in anatomy.block_list[:count])
    memo: dict[int, Any] = {id(anatomy.block_list): blocks}
    inside = {id(p) for p in anatomy.block_list.parameters()}
    memo |= {id(p): p for p in anatomy.model.parameters() if id(p) not in inside}
    clone = copy.deepcopy(anatomy.model, memo)
    choose_layers_in_config(clone.config, anatomy.family, range(count))
    return clone


def _narrow(anatomy: Anatomy, blocks: int, part: Literal["heads", "neurons"], count: int) -> PreTrainedModel:
    clone = _with_blocks(anatomy, blocks)
    everything = full(clone, [part])
    cut(clone, everything.map(lambda mask: torch.arange(len(mask)) < count))
    return clone


def _machine_name(device: torch.device) -> str:
    facts = machine()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{facts['processor']}, {facts['threads']} threads"


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _widths(model: PreTrainedModel) -> str:
    return f"{model.config.model_type}-{anatomy_of(model).hidden_size}x{structure_of(model).head_width}"


def _read_tables(file: Path) -> dict[str, LatencyTable]:
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format_version"] != FILE_VERSION:
            version = content["format_version"]
            raise LmcompressError(
                f"{str(file)!r} must have format version {FILE_VERSION}, got {version!r}; measure anew"
            )
        return {key: LatencyTable.model_validate(table) for key, table in content["tables"].items()}
    except OSError as error:
        raise LmcompressError(f"{str(file)!r} must be a file of latency tables: {error.strerror}") from error
    except ValidationError as error:
        raise LmcompressError(f"{str(file)!r} has a damaged latency table: {error.errors()[0]['msg']}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, LmcompressError):
            raise
        raise LmcompressError(f"{str(file)!r} must be a file of latency tables, it is not: {error!r}") from error
