"""Progress of a run: headlines, and one bar per stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from lmcompress.recipes.planning import Plan

SECONDS_BETWEEN_LINES = 10.0
"""Seconds between reports of training where there is no terminal."""


class StageBar(TrainerCallback):  # type: ignore[misc]
    """A bar over the optimizer steps of one stage, with the latest loss; lines where there is no terminal.

    Args:
        console: console for the bar.
        label: label of the bar.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.label, self.console = label, console
        self.said = time.monotonic()
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar.

        Args:
            args: unused.
            state: has the number of steps.
            control: unused.
            **kwargs: unused.
        """
        self.progress.start()
        self.task = self.progress.add_task(self.label, total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar.

        Args:
            args: unused.
            state: has the step.
            control: unused.
            **kwargs: unused.
        """
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the loss.

        Args:
            args: unused.
            state: has the step.
            control: unused.
            logs: the trainer's log.
            **kwargs: unused.
        """
        if self.task is None or not logs or "loss" not in logs:
            return
        loss = f"loss {float(logs['loss']):.3f}"
        self.progress.update(self.task, loss=loss)
        if not self.console.is_terminal and time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            steps = f"step {state.global_step:,} of {state.max_steps:,}"
            self.console.print(f"  {self.label}: {steps}, {loss}", highlight=False)

    def close(self) -> None:
        """Remove the bar, however training ended."""
        self.progress.stop()


def print_cautions(console: Console, planned: Plan) -> None:
    """What its owner should know before a run begins.

    Args:
        console: console for the lines.
        planned: the plan.
    """
    for caution in planned.cautions:
        console.print(f"[yellow]note:[/] {escape(caution)}", highlight=False)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, Transformers and datasets print only errors, without progress bars."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    data_verbosity, data_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    # truncations and dropped rows are noted in the report
    own = logging.getLogger("lmcompress")
    level = own.level
    own.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        own.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        datasets.logging.set_verbosity(data_verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
