"""Optimizer steps of several trainers in turn, to say what one of them costs over another."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from speeds import Row, clock_of, cost_columns

from lmcompress.evaluation import Sample, Turns, take_turns, timed
from lmcompress.evaluation.speed import name_again

BASELINE = "baseline"


class StepByStep:
    """Optimizer steps of a trainer, one at a time, with its callbacks, so that several trainers can take turns.

    The model is prepared as the trainer's own loop prepares it: with ``bf16``, its forward pass is in bfloat16.

    Args:
        trainer: one of transformers' or ours, not begun.
        batch: that every step is on.
        teacher: makes a forward pass without gradient in every step, whose outputs nobody reads.
    """

    def __init__(self, trainer: Any, batch: Mapping[str, torch.Tensor], teacher: Any = None) -> None:
        self.trainer, self.batch = trainer, batch
        args = trainer.args
        trainer.create_optimizer_and_scheduler(args.max_steps)
        self._model = trainer.accelerator.prepare_model(trainer.model)
        self._teacher = teacher
        if teacher is not None:
            self._teacher = trainer.accelerator.prepare_model(teacher.eval().to(args.device), evaluation_mode=True)
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
        trainer.training_step(self._model, dict(self.batch), items)
        if self._teacher is not None:
            with torch.no_grad():
                self._teacher(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"])
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._tell("on_pre_optimizer_step")
        trainer.optimizer.step()
        self._tell("on_optimizer_step")
        self._model.zero_grad()
        trainer.state.global_step += 1

    def _tell(self, event: str) -> None:
        getattr(self.handler, event)(self.trainer.args, self.trainer.state, self.trainer.control)


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Within the block, torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turn(
    trainers: Mapping[str, StepByStep], repeats: int, threads: int, warmup: int = 2
) -> tuple[Turns, dict[str, Sample]]:
    """Times of steps, and the mean of what schedules do before one: it comes in few of them only."""
    between: dict[str, list[Sample]] = {name: [] for name in trainers}

    def step(name: str, trainer: StepByStep) -> Callable[[], Sample]:
        before, after = timed(trainer.between), timed(trainer.step, trainer.trainer.args.device)

        def both() -> Sample:
            between[name].append(before())
            return after()

        return both

    with on_threads(threads):
        calls = {name: step(name, trainer) for name, trainer in trainers.items()}
        turns = take_turns(calls, repeats=repeats, warmup=warmup)
    # the first of them is called twice in each round
    means = {name: map(statistics.mean, zip(*taken[warmup:], strict=True)) for name, taken in between.items()}
    return turns, {name: Sample(*mean) for name, mean in means.items()}


def overhead(trainers: Mapping[str, StepByStep], repeats: int, threads: int, warmup: int = 2) -> list[Row]:
    """Steps over those of the trainer ``baseline``, which is the first, in turn.

    Args:
        trainers: by name.
        repeats: steps of each that count.
        threads: torch's.
        warmup: steps of each before that.

    Returns:
        A row for each but the baseline, and before them one for the baseline over itself.
    """
    turns, between = in_turn(trainers, repeats, threads, warmup)
    base, clock = turns.milliseconds(BASELINE, "wall").median, clock_of(threads)
    rows = []
    for name in (None, *trainers):
        if name == BASELINE:
            continue
        batch, length = trainers[name or BASELINE].batch["input_ids"].shape
        taken = Sample(0.0, 0.0) if name is None else between[name]
        added = 1000 * getattr(taken, clock) / turns.milliseconds(BASELINE, clock).median
        about = {"kind": "again" if name is None else "other", "method": name or name_again(BASELINE)}
        costs = cost_columns(turns, name, BASELINE, threads, added)
        about |= {"batch": batch, "length": length, "repeats": repeats}
        about |= {"baseline_ms": base, "between_ms": 1000 * taken.wall, "ratio_of_steps": costs["ratio"] - added}
        rows.append(about | costs)
    return rows
