"""Several tasks in one training run: each batch is of one task, sampled by a tempered share of the tasks' sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from lmcompress.errors import LmcompressError, nearest

Row = dict[str, Any]


def sampling_probabilities(sizes: Sequence[int], tau: float = 1.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    r"""The probability of each task, :math:`p_i = n_i^\tau / \sum_j n_j^\tau`.

    Args:
        sizes: rows of each task.
        tau: 1 samples tasks in proportion to their rows, 0 uniformly.

    Returns:
        ``(tasks,)`` float64 that sums to 1.

    Raises:
        LmcompressError: If a size or ``tau`` is out of range.

    Reference:
        Raffel et al., *Exploring the Limits of Transfer Learning*, 2020,
        https://arxiv.org/abs/1910.10683, section 3.5.2
        ("temperature-scaled mixing", its temperature is 1 / ``tau``).

    Example:
        >>> sampling_probabilities([900, 100], tau=0.5)
        array([0.75, 0.25])
    """
    if not len(sizes) or min(sizes) < 1:
        raise LmcompressError(f"every task must have at least one row, got sizes {list(sizes)}")
    if not 0 <= tau <= 1:
        raise LmcompressError(f"tau must be in [0, 1], got {tau}")
    weights = np.asarray(sizes, dtype=np.float64) ** tau
    return weights / weights.sum()


class MultiTaskDataset(TorchDataset[Row]):
    """The rows of several data sets one after another, each with its task's name under ``"task"``.

    Args:
        datasets: tokenized rows by task name.

    Raises:
        LmcompressError: If there are no data sets, or one is empty.

    Example:
        >>> both = MultiTaskDataset({"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]})
        >>> len(both), both[1]
        (3, {'x': 2, 'task': 'b'})
    """

    def __init__(self, datasets: Mapping[str, Sequence[Row]]) -> None:
        if not datasets:
            raise LmcompressError("a multi-task data set needs at least one task, got none")
        if empty := [name for name, rows in datasets.items() if not len(rows)]:
            raise LmcompressError(f"every task must have at least one row, but these have none: {', '.join(empty)}")
        self.datasets = dict(datasets)
        self._names = list(datasets)
        self._starts = np.cumsum([0, *self.sizes.values()])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows of each task, in the order of the rows, for :class:`TaskSampledBatches`."""
        return {name: len(rows) for name, rows in self.datasets.items()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        task = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = self._names[task]
        return {**self.datasets[name][index - int(self._starts[task])], "task": name}


class TaskSampledBatches(Sampler[list[int]]):
    """Batches of row numbers of a :class:`MultiTaskDataset`, each of one task; tasks as :func:`sampling_probabilities`.

    Within a task, rows are shuffled, and none is repeated before all have been used. Batches always have
    ``batch_size`` rows. The sequence depends only on ``seed`` and :meth:`set_epoch`, so that a resumed run continues
    with the same batches. ``num_processes`` successive batches share their task: Accelerate distributes batches in
    turn, so all processes have the same task at each step and their gradients are of one model head.

    Args:
        sizes: rows of each task, in the order in which they are joined.
        batch_size: rows of a batch, per process.
        tau: see :func:`sampling_probabilities`.
        seed: seed of the sampling.
        num_batches: length of an epoch over all processes, rounded up to a multiple of ``num_processes``; default:
            enough to hold each row about once.
        num_processes: number of processes that share the batches.

    Raises:
        LmcompressError: If a number is out of range.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        tau: float = 1.0,
        seed: int = 0,
        num_batches: int | None = None,
        num_processes: int = 1,
    ) -> None:
        for name, value in [("batch_size", batch_size), ("num_batches", num_batches), ("num_processes", num_processes)]:
            if value is not None and value < 1:
                raise LmcompressError(f"{name} must be >= 1, got {value}")
        self.sizes = dict(sizes)
        self.batch_size = batch_size
        # read by Accelerate, which distributes the batches to the processes
        self.drop_last = False
        self.probabilities = sampling_probabilities(list(sizes.values()), tau)
        self.seed = seed
        self.epoch = 0
        self.num_processes = num_processes
        self._steps = -(-(num_batches or -(-sum(sizes.values()) // batch_size)) // num_processes)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._steps * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        starts = np.cumsum([0, *self.sizes.values()])
        rows = [
            _endless_shuffle(size, int(start), np.random.default_rng((self.seed, self.epoch, task)))
            for task, (size, start) in enumerate(zip(self.sizes.values(), starts, strict=False))
        ]
        for task in rng.choice(len(rows), size=self._steps, p=self.probabilities):
            for _ in range(self.num_processes):
                yield [next(rows[task]) for _ in range(self.batch_size)]


class MultiTaskCollator:
    """Pads the rows of one task with that task's collator and adds the task's name under ``"task"``.

    Args:
        collators: one for each task, such as :func:`~lmcompress.data.collators.collator` makes.
    """

    def __init__(self, collators: Mapping[str, Callable[[list[Row]], dict[str, torch.Tensor]]]) -> None:
        self.collators = dict(collators)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            rows: rows of one task, each with ``"task"``.

        Returns:
            the batch of the task's collator, and ``"task"``, a string.

        Raises:
            LmcompressError: If the rows are of several tasks, or of a task without a collator.
        """
        names = sorted({row["task"] for row in rows})
        if len(names) != 1:
            raise LmcompressError(
                f"a batch must be of one task, got rows of {', '.join(names)}; draw batches with TaskSampledBatches"
            )
        (name,) = names
        if name not in self.collators:
            raise LmcompressError(f"no collator for task {name!r}{nearest(name, self.collators)}")
        bare = [{key: value for key, value in row.items() if key != "task"} for row in rows]
        return {**self.collators[name](bare), "task": name}


def _endless_shuffle(size: int, start: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (rng.permutation(size) + start).tolist()
