"""Latency of models compared in one process, conservative verdicts on it, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError, argument, nearest

Mode = Literal["forward", "generate"]
MODES: tuple[Mode, ...] = ("forward", "generate")


@dataclass(frozen=True)
class LatencyRow:
    """The latency of one model at one batch size.

    Attributes:
        model: its name.
        batch_size: rows.
        sequence_length: tokens of a row; for ``generate``, of the prompt.
        mode: ``forward`` or ``generate``.
        median_ms: median of one call.
        lower_ms: first quartile.
        upper_ms: third quartile.
        speedup_vs_first: the first model's median over this one's; above 1 is faster.
    """

    model: str
    batch_size: int
    sequence_length: int
    mode: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    speedup_vs_first: float


def compare_latency(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    sequence_length: int = 128,
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device | None = None,
    threads: int | None = None,
    mode: Mode = "forward",
    new_tokens: int = 32,
) -> list[LatencyRow]:
    """Latency of models, measured in turn (A, B, A, B…), so that a machine that slows down slows all of them.

    All get the same random ids, without padding, in evaluation mode and ``inference_mode``. Modes and devices of the
    models and torch's threads are restored afterwards.

    Args:
        models: by name; the first is the reference.
        batch_sizes: batch sizes, each measured separately.
        sequence_length: tokens of a row.
        repeats: timed calls of each model, at least 3.
        warmup: calls before those, not timed.
        device: device to measure on; default: that of the models, which must be the same.
        threads: torch's threads during the measurement; default: unchanged.
        mode: ``forward``, or ``generate`` for greedy generation of ``new_tokens`` tokens.
        new_tokens: tokens generated per call.

    Returns:
        a row for each batch size and model, in the given order, models within batch sizes.

    Raises:
        LmcompressError: If there is nothing to measure, the mode is unknown, the length exceeds a model's positions,
            or models are on several devices.
    """
    _check(models, batch_sizes, sequence_length, repeats, warmup, mode, new_tokens)
    with _placed(models, device) as place, _threads(threads), torch.inference_mode():
        rows = []
        for batch_size in batch_sizes:
            ids = _random_ids(models, batch_size, sequence_length).to(place)
            calls = {name: _call(model, ids, mode, new_tokens) for name, model in models.items()}
            times = _interleaved_ms(calls, repeats, warmup, place)
            first = statistics.median(next(iter(times.values())))
            for name, values in times.items():
                lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
                rows.append(LatencyRow(name, batch_size, sequence_length, mode, median, lower, upper, first / median))
    return rows


def verdict(rows: Sequence[LatencyRow]) -> list[str]:
    """The verdict on each row compared with the first row of its batch size, in words.

    A difference counts if the interquartile ranges of the two do not overlap; otherwise there is no verdict.

    Args:
        rows: from :func:`compare_latency`.

    Returns:
        one text per row: ``"baseline"``, ``"1.80x faster"``, ``"0.70x: slower"`` or ``"no measurable difference"``.

    Example:
        >>> teacher = LatencyRow("teacher", 1, 128, "forward", 9.0, 8.8, 9.3, 1.0)
        >>> student = LatencyRow("student", 1, 128, "forward", 5.0, 4.9, 5.1, 1.8)
        >>> verdict([teacher, student])
        ['baseline', '1.80x faster']
    """
    firsts: dict[tuple[int, int, str], LatencyRow] = {}
    texts = []
    for row in rows:
        first = firsts.setdefault((row.batch_size, row.sequence_length, row.mode), row)
        texts.append("baseline" if first is row else _words(first, row))
    return texts


def machine() -> dict[str, str | int | float | None]:
    """The machine of a measurement, for the JSON of results.

    Returns:
        processor, cores, torch's threads, memory, GPU (None if there is none), operating system and versions.
    """
    memory = _proc_value("/proc/meminfo", "MemTotal")
    return {
        "processor": _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "lmcompress": _own_version(),
    }


def _check(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int],
    sequence_length: int,
    repeats: int,
    warmup: int,
    mode: str,
    new_tokens: int,
) -> None:
    if not models or not batch_sizes:
        raise LmcompressError(f"there must be models and batch sizes, got {list(models)} and {list(batch_sizes)}")
    if mode not in MODES:
        raise LmcompressError(f"unknown mode {mode!r}{nearest(mode, MODES)}")
    if repeats < 3:
        raise LmcompressError(
            f"{argument('repeats')} must be >= 3, got {repeats}: fewer have no spread, and so no verdict"
        )
    least = {"sequence_length": (sequence_length, 1), "new_tokens": (new_tokens, 1), "warmup": (warmup, 0)}
    for name, (given, minimum) in (least | {"batch_sizes": (min(batch_sizes), 1)}).items():
        if given < minimum:
            raise LmcompressError(f"{argument(name)} must be >= {minimum}, got {given}")
    needed = sequence_length + (new_tokens if mode == "generate" else 0)
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and needed > positions:
            raise LmcompressError(
                f"{name!r} has {positions} positions, {needed} are needed; shorten {argument('sequence_length')}"
            )
        if mode == "generate" and not model.can_generate():
            raise LmcompressError(f"{name!r} is a {type(model).__name__}, which cannot generate; use mode='forward'")


@contextmanager
def _placed(models: Mapping[str, PreTrainedModel], device: str | torch.device | None) -> Iterator[torch.device]:
    """Within the block, all models are on one device and in evaluation mode."""
    homes = {name: model.device for name, model in models.items()}
    if device is None and len(set(homes.values())) > 1:
        raise LmcompressError(f"models must be on one device to be compared, got {homes}; give device=")
    place = torch.device(device) if device is not None else next(iter(homes.values()))
    training = [module for model in models.values() for module in model.modules() if module.training]
    try:
        for name, model in models.items():
            model.eval()
            # a bitsandbytes model refuses .to() even where it is already
            if homes[name] != place:
                model.to(place)
        yield place
    finally:
        for name, model in models.items():
            if model.device != homes[name]:
                model.to(homes[name])
        for module in training:
            module.training = True


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    # of very many, the threads of OpenMP take the process down
    if threads is not None and not 1 <= threads <= cores:
        raise LmcompressError(
            f"{argument('threads')} must be in [1, {cores}], the cores of this machine, got {threads}"
        )
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _random_ids(models: Mapping[str, PreTrainedModel], batch_size: int, sequence_length: int) -> Tensor:
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, sequence_length), generator=generator)


def _call(model: PreTrainedModel, ids: Tensor, mode: Mode, new_tokens: int) -> Callable[[], Any]:
    mask = torch.ones_like(ids)
    if mode == "forward":
        return lambda: model(input_ids=ids, attention_mask=mask)
    # min_new_tokens: a model that ends early would look fast
    return lambda: model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )


def _interleaved_ms(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if turn >= warmup:
                times[name].append((time.perf_counter() - start) * 1000)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _words(first: LatencyRow, row: LatencyRow) -> str:
    apart = row.upper_ms < first.lower_ms or row.lower_ms > first.upper_ms
    speedup = first.median_ms / row.median_ms
    if not apart or f"{speedup:.2f}" == "1.00":
        return "no measurable difference"
    return f"{speedup:.2f}x faster" if speedup > 1 else f"{speedup:.2f}x: slower"


def _proc_value(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _own_version() -> str | None:
    try:
        return version("lmcompress")
    except PackageNotFoundError:
        return None
