"""Optimizer steps of several trainers in turn, to say what one of them costs over another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class StepByStep:
    """Optimizer steps of a trainer, one at a time, with its callbacks, so that several trainers can take turns.

    Args:
        trainer: one of transformers' or ours, not begun.
        batch: that every step is on.
    """

    def __init__(self, trainer: Any, batch: Mapping[str, torch.Tensor]) -> None:
        self.trainer, self.batch = trainer, batch
        args = trainer.args
        trainer.create_optimizer_and_scheduler(args.max_steps)
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.max_steps = args.max_steps
        self.handler = trainer.callback_handler
        self.handler.optimizer = trainer.optimizer
        self._tell("on_train_begin")

    def between(self) -> None:
        """What schedules do before a step."""
        self._tell("on_step_begin")

    def step(self) -> None:
        """Forward, backward, optimizer, and what methods add to each."""
        trainer = self.trainer
        _, items = trainer.get_batch_samples(iter([self.batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, dict(self.batch), items)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        self._tell("on_pre_optimizer_step")
        trainer.optimizer.step()
        self._tell("on_optimizer_step")
        trainer.model.zero_grad()
        trainer.state.global_step += 1
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()

    def _tell(self, event: str) -> None:
        getattr(self.handler, event)(self.trainer.args, self.trainer.state, self.trainer.control)


def overhead(trainers: Mapping[str, StepByStep], repeats: int, warmup: int = 2) -> list[dict[str, Any]]:
    """Steps over those of the trainer ``baseline``, in turn.

    What schedules do between steps is a mean over all of them, as it comes in few of them only.

    Args:
        trainers: by name; one of them is ``baseline``.
        repeats: steps of each that count.
        warmup: steps of each before that.

    Returns:
        A row for each but the baseline.
    """
    times: dict[str, list[float]] = {name: [] for name in trainers}
    between: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(repeats + warmup):
        for name, trainer in trainers.items():
            before, taken = _seconds(trainer.between), _seconds(trainer.step)
            if number >= warmup:
                times[name].append(taken)
                between[name].append(before)
    baseline = statistics.median(times["baseline"])
    rows = []
    for name, trainer in trainers.items():
        if name == "baseline":
            continue
        # of pairs side by side, so that a slow minute of the machine hits both
        pairs = [ours / base for ours, base in zip(times[name], times["baseline"], strict=True)]
        lower, median, upper = statistics.quantiles(pairs, n=4)
        added = statistics.mean(between[name]) / baseline
        batch, length = trainer.batch["input_ids"].shape
        rows.append(
            {
                "method": name, "batch": batch, "length": length, "baseline_ms": 1000 * baseline,
                "ms": 1000 * statistics.median(times[name]), "between_ms": 1000 * statistics.mean(between[name]),
                "ratio": median + added, "ratio_of_steps": median, "ratio_quartiles": [lower + added, upper + added],
                "repeats": repeats,
            }
        )  # fmt: skip
    return rows


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
