"""Hard-concrete gates, driven to the target by a Lagrangian."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.method import Step, Term, inner_optimizer
from lmcompress.pruning.structured.config import HardConcrete
from lmcompress.pruning.structured.costs import ParameterCost
from lmcompress.pruning.structured.goals import along_chains, expected_costs
from lmcompress.pruning.structured.learned import (
    LOG_ALPHA_LIMIT,
    expected_cost,
    hard_concrete_open,
    hard_concrete_sample,
    hard_concrete_value,
    initial_log_alpha,
    lagrangian,
    without_expected_zeros,
)
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.schedules.base import rows_in
from lmcompress.pruning.structured.schedules.learned import LearnedStrategy
from lmcompress.pruning.structured.units import Units, unit_shapes


class HardConcreteStrategy(LearnedStrategy):
    """Samples gates for each micro-batch, from a generator that depends only on seed, step and micro-batch."""

    schedule: HardConcrete
    folds: ClassVar[bool] = True

    def __init__(self, run: PruningRun) -> None:
        super().__init__(run)
        run.state.learned.data.fill_(initial_log_alpha(self.schedule.drop))
        shapes = unit_shapes(run.sizes.structure, run.sizes.hidden)
        self._heads, self._neurons = shapes["heads"], shapes["neurons"]
        self._costs = expected_costs(run.sizes, run.goal.counted).to(run.device)
        # the latency outside the blocks
        self._elsewhere = run.goal.dense - float(expected_cost(Units(), self._costs, self._heads, self._neurons))
        self._last_removed: Tensor | float = 0.0

    def begin(self) -> None:
        """Check the optimizer.

        Raises:
            LmcompressError: If it cannot ascend.
        """
        optimizer = inner_optimizer(self.run.optimizer)
        if "maximize" not in optimizer.defaults:
            raise LmcompressError(
                f"the optimizer must be able to ascend for the Lagrange multipliers, got {type(optimizer).__name__}, "
                "which has no 'maximize'; use optim='adamw_torch' or 'sgd'"
            )

    def scores(self) -> Units:
        """Probabilities that units are open, each times those of its sub-layer and its layer."""
        return along_chains(self._opened())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The gates, and the multipliers, which ascend."""
        state, schedule = self.run.state, self.schedule
        return [
            {"params": [state.learned], "lr": schedule.learning_rate},
            {"params": [state.multipliers], "lr": schedule.multiplier_learning_rate, "maximize": True},
        ]

    def set_gates(self, step: Step) -> bool:
        """Sample the gates.

        Args:
            step: unused.

        Returns:
            Whether the phase continues.
        """
        if self.learning:
            self.run.gates.set(self.run.layout.split(hard_concrete_sample(self.run.state.learned, self.noise())))
        return self.learning

    def noise(self) -> Tensor:
        """Uniform noise of this micro-batch, ``(units,)``, on the device."""
        run, seed = self.run, 0
        rank = 0 if run.trainer is None else run.trainer.args.process_index
        for number in (run.config.seed, run.step, run.micro, rank):
            seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.rand(run.layout.size, generator=torch.Generator().manual_seed(seed)).to(run.device)

    @torch.no_grad()
    def values(self) -> Units:
        """Gates without noise, of which as many are 0 as are expected to be closed."""
        if not self.learning:
            return super().values()
        values = self.run.layout.split(hard_concrete_value(self.run.state.learned))
        return values.zip(self._opened(), without_expected_zeros)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The Lagrangian.

        Args:
            step: the step, for its number of rows.

        Returns:
            ``sparsity``, a mean over examples, so that it is added once to an optimizer step.
        """
        run = self.run
        opened = run.layout.split(hard_concrete_open(run.state.learned))
        blocks = expected_cost(opened, self._costs, self._heads, self._neurons)
        removed = 1 - (blocks + self._expected_elsewhere(opened)) / run.goal.dense
        self._last_removed = removed.detach()
        penalty = lagrangian(removed, self.wanted(), *run.state.multipliers.unbind())
        return {"sparsity": Term(penalty * rows_in(step.inputs), "examples")}

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keep every gate within reach of its gradient."""
        if self.learning:
            self.run.state.learned.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    def removed(self) -> float:
        """Expected removed share of the cost."""
        return float(self._last_removed) if self.learning else super().removed()

    def metrics(self) -> dict[str, float]:
        """The multipliers, while they act."""
        if not self.learning:
            return {}
        first, second = self.run.state.multipliers.detach().tolist()
        return {"pruning_lambda_1": first, "pruning_lambda_2": second}

    def open_blocks(self) -> Units:
        """A mask with one entry for all heads of a block and one for all its neurons.

        Everything that every step needs to know, in one transfer from the GPU and without sorting thousands of gates.
        """
        learned = self.run.layout.split(self.run.state.learned.detach().cpu())
        opened = learned.map(hard_concrete_open)
        outer = opened.updated(heads=None, neurons=None)
        mask = outer.zip(learned, lambda p, alpha: without_expected_zeros(hard_concrete_value(alpha), p) != 0)
        # of these, as many are closed as are expected to be
        inner = Units(heads=opened.heads, neurons=opened.neurons)
        some = inner.map(lambda p: torch.tensor([round(len(p) - float(p.double().sum())) < len(p)]))
        return with_something(mask.updated(heads=some.heads, neurons=some.neurons))

    def final_values(self, mask: Units) -> Units:
        """Gates without noise where the mask is open, to be folded into the weights.

        Args:
            mask: bool, on the CPU.
        """
        soft = self.run.layout.split(hard_concrete_value(self.run.state.learned.detach())).map(Tensor.cpu)
        values = super().final_values(mask).zip(soft, torch.mul)
        # half a block has no weights to be folded into
        return values if mask.layers is None else values.updated(layers=mask.layers.float())

    def _opened(self) -> Units:
        return self.run.layout.split(hard_concrete_open(self.run.state.learned.detach()))

    def _expected_elsewhere(self, opened: Units) -> Tensor | float:
        """Expected cost outside the blocks."""
        counted = self.run.goal.counted
        if not isinstance(counted, ParameterCost):
            return self._elsewhere
        if opened.hidden is None:
            return counted.outside(float(self.run.sizes.hidden))
        # embeddings become narrower with the stream
        return counted.outside(opened.hidden.sum())
