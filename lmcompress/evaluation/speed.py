"""Latency of models compared side by side, conservative verdicts on it, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import torch
import transformers
from torch import Tensor, nn

from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.evaluation.timing import Clock, Quartiles, Turns, is_clear, is_one, take_turns, waited
from lmcompress.evaluation.workers import Mode, ModelLike, can_generate, modules_of, timed_call
from lmcompress.families.positions import positions_of

MODES: tuple[Mode, ...] = get_args(Mode)
BUSY = "no verdict: the machine was busy"
"""Verdict on the models of a measurement in which the first model differs from itself, or models waited for a core."""

_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")

Kind = Literal["first", "again", "other"]


@dataclass(frozen=True)
class LatencyRow:
    """The latency of one model at one batch size.

    Attributes:
        model: its name.
        batch_size: rows.
        sequence_length: tokens of a row; for ``generate``, of the prompt.
        mode: ``forward`` or ``generate``.
        median_ms: median of one call, in milliseconds that passed.
        lower_ms: first quartile.
        upper_ms: third quartile.
        speedup_vs_first: time of the first model over this one's, median of pairs within rounds; above 1 is faster.
        speedup_lower: first quartile of those pairs.
        speedup_upper: third quartile of those pairs.
        cpu_ms: median of one call, in milliseconds that all threads of its process computed.
        cpu_lower_ms: first quartile.
        cpu_upper_ms: third quartile.
        cpu_speedup_vs_first: as ``speedup_vs_first``, of CPU time.
        cpu_speedup_lower: first quartile.
        cpu_speedup_upper: third quartile.
        threads: torch's threads.
        kind: ``first`` for the model that others are compared with, ``again`` for its second timing in the same
            rounds, whose ratio is 1 on a quiet machine, ``other`` otherwise.
    """

    model: str
    batch_size: int
    sequence_length: int
    mode: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    speedup_vs_first: float
    speedup_lower: float
    speedup_upper: float
    cpu_ms: float
    cpu_lower_ms: float
    cpu_upper_ms: float
    cpu_speedup_vs_first: float
    cpu_speedup_lower: float
    cpu_speedup_upper: float
    threads: int
    kind: Kind

    def speedup(self, clock: Clock) -> Quartiles:
        """The first model's time over this one's, of pairs within rounds.

        Args:
            clock: wall or CPU time.
        """
        if clock == "cpu":
            return Quartiles(self.cpu_speedup_lower, self.cpu_speedup_vs_first, self.cpu_speedup_upper)
        return Quartiles(self.speedup_lower, self.speedup_vs_first, self.speedup_upper)


def compare_latency(
    models: Mapping[str, ModelLike],
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
    """Latency of models, measured in rounds: each once in every round, in random order, and the first one twice.

    A machine that slows down thus slows all of them, and what the first model's second timing differs from its first
    by is what the machine does. All get the same random ids, without padding, in evaluation mode and
    ``inference_mode``. Modes and devices of the models and torch's threads are restored afterwards.

    A runtime whose threads wait actively disturbs the models after it: give it as a
    :class:`~lmcompress.evaluation.Worker`, which runs and times it in a process of its own.

    Args:
        models: by name; the first is the reference. Models of Transformers, or anything that is called like one and has
            ``config``, ``device`` and ``eval``; for ``generate``, ``can_generate`` and ``generate`` as well.
        batch_sizes: batch sizes, each measured separately.
        sequence_length: tokens of a row.
        repeats: timed calls of each model, at least 3.
        warmup: calls before those, not timed.
        device: device to measure on; default: that of the models, which must be the same.
        threads: torch's threads during the measurement; default: unchanged. Workers and other runtimes have their own.
        mode: ``forward``, or ``generate`` for greedy generation of ``new_tokens`` tokens.
        new_tokens: tokens generated per call.

    Returns:
        a row for each batch size and model, in the given order, models within batch sizes; after the first model its
        second timing, of kind ``again``.

    Raises:
        LmcompressError: If there is nothing to measure, the mode is unknown, the length exceeds a model's positions,
            or models are on several devices.
    """
    _check(models, batch_sizes, sequence_length, repeats, warmup, mode, new_tokens)
    rows: list[LatencyRow] = []
    with _placed(models, device) as place, _threads(threads), torch.inference_mode():
        for batch_size in batch_sizes:
            ids = _random_ids(models, batch_size, sequence_length).to(place)
            calls = {name: timed_call(model, ids, mode, new_tokens) for name, model in models.items()}
            turns = take_turns(calls, repeats=repeats, warmup=warmup)
            about = (batch_size, sequence_length, mode)
            rows += [_row(turns, name, kind, *about) for name, kind in _kinds(turns)]
    return rows


def verdict(rows: Sequence[LatencyRow], clock: Clock = "wall") -> list[str]:
    """The verdict on each row compared with the first row of its batch size, in words.

    A difference counts if the quartiles of its ratio do not overlap those of the first model over itself. If the first
    model differs from itself, the machine was busy and there is no verdict at all. So it is, for wall time, if much
    more time passed than was computed: a call that is longer than the scheduler's slice is then interrupted in every
    round, a short one in none, and the first model still equals itself.

    Args:
        rows: from :func:`compare_latency`.
        clock: wall or CPU time.

    Returns:
        one text per row: ``"baseline"``, ``"1.80x faster"``, ``"0.70x: slower"``, ``"no measurable difference"`` or
        :data:`BUSY`; of the first model's second timing its ratio with quartiles.
    """
    itself = {_place(row): row.speedup(clock) for row in rows if row.kind == "again"}
    crowded = {_place(row) for row in rows if waited(row.median_ms, row.cpu_ms)} if clock == "wall" else set()
    return [_words(row, row.speedup(clock), itself.get(_place(row)), _place(row) in crowded) for row in rows]


def name_again(first: str) -> str:
    """Name of the row of a model that was timed a second time.

    Args:
        first: the model's name.
    """
    return f"{first}, again"


def machine() -> dict[str, str | int | float | None]:
    """The machine of a measurement, for the JSON of results.

    Returns:
        processor, its instruction sets on which the speed of narrow numbers depends (None if the system does not say,
        as only Linux does), cores, torch's threads, memory, GPU (None if there is none), operating system and versions.
    """
    memory, flags = _proc_value("/proc/meminfo", "MemTotal"), _proc_value("/proc/cpuinfo", "flags")
    return {
        "processor": _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "instructions": None if flags is None else ", ".join(name for name in _INSTRUCTIONS if name in flags.split()),
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
    models: Mapping[str, ModelLike],
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
        positions = positions_of(model.config)
        if needed > positions:
            raise LmcompressError(
                f"{name!r} has {positions} positions, {needed} are needed; shorten {argument('sequence_length')}"
            )
        if mode == "generate" and not can_generate(model):
            raise LmcompressError(f"{name!r} is a {type(model).__name__}, which cannot generate; use mode='forward'")


@contextmanager
def _placed(models: Mapping[str, ModelLike], device: str | torch.device | None) -> Iterator[torch.device]:
    """Within the block, all models are on one device and in evaluation mode."""
    homes = {name: model.device for name, model in models.items()}
    if device is None and len(set(homes.values())) > 1:
        raise LmcompressError(f"models must be on one device to be compared, got {homes}; give device=")
    place = torch.device(device) if device is not None else next(iter(homes.values()))
    fixed = [name for name, model in models.items() if homes[name] != place and not isinstance(model, nn.Module)]
    if fixed:
        raise LmcompressError(
            f"{fixed[0]!r} is computed on {homes[fixed[0]]} by another runtime and cannot move to {place}; give "
            f"{argument('device')}={homes[fixed[0]].type!r}"
        )
    training = [module for model in models.values() for module in modules_of(model) if module.training]
    try:
        for name, model in models.items():
            model.eval()
            # a bitsandbytes model refuses .to() even where it is already
            if homes[name] != place:
                _move(model, place)
        yield place
    finally:
        for name, model in models.items():
            if model.device != homes[name]:
                _move(model, homes[name])
        for module in training:
            module.training = True


def _move(model: ModelLike, place: torch.device) -> None:
    if isinstance(model, nn.Module):
        model.to(place)


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


def _random_ids(models: Mapping[str, ModelLike], batch_size: int, sequence_length: int) -> Tensor:
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, sequence_length), generator=generator)


def _kinds(turns: Turns) -> list[tuple[str, Kind]]:
    others: list[tuple[str, Kind]] = [(name, "other") for name in turns.samples if name != turns.first]
    return [(turns.first, "first"), (turns.first, "again"), *others]


def _row(turns: Turns, name: str, kind: Kind, batch_size: int, length: int, mode: Mode) -> LatencyRow:
    timed = None if kind == "again" else name
    wall, cpu = turns.milliseconds(timed, "wall"), turns.milliseconds(timed, "cpu")
    speedup, cpu_speedup = (turns.ratio(turns.first, timed, clock) for clock in get_args(Clock))
    return LatencyRow(
        model=name_again(name) if kind == "again" else name,
        batch_size=batch_size,
        sequence_length=length,
        mode=mode,
        median_ms=wall.median,
        lower_ms=wall.lower,
        upper_ms=wall.upper,
        speedup_vs_first=speedup.median,
        speedup_lower=speedup.lower,
        speedup_upper=speedup.upper,
        cpu_ms=cpu.median,
        cpu_lower_ms=cpu.lower,
        cpu_upper_ms=cpu.upper,
        cpu_speedup_vs_first=cpu_speedup.median,
        cpu_speedup_lower=cpu_speedup.lower,
        cpu_speedup_upper=cpu_speedup.upper,
        threads=torch.get_num_threads(),
        kind=kind,
    )


def _place(row: LatencyRow) -> tuple[int, int, str, int]:
    return row.batch_size, row.sequence_length, row.mode, row.threads


def _words(row: LatencyRow, speedup: Quartiles, itself: Quartiles | None, waited: bool) -> str:
    if row.kind == "first":
        return "baseline"
    if itself is None:
        raise LmcompressError(
            f"rows must hold the second timing of the first model, of kind 'again', got none beside {row.model!r}"
        )
    if row.kind == "again":
        return f"{speedup.median:.2f}x ({speedup.lower:.2f} – {speedup.upper:.2f}) of itself"
    if waited or not is_one(itself):
        return BUSY
    if not is_clear(speedup, itself):
        return "no measurable difference"
    return f"{speedup.median:.2f}x faster" if speedup.median > 1 else f"{speedup.median:.2f}x: slower"


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
