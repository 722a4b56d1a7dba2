"""One strategy for each schedule: its scores of units, its additions to a training step, and the gates it sets."""

from lmcompress.pruning.structured.schedules.base import Strategy
from lmcompress.pruning.structured.schedules.by_criterion import CriterionStrategy
from lmcompress.pruning.structured.schedules.group_lasso import GroupLassoStrategy
from lmcompress.pruning.structured.schedules.hard_concrete import HardConcreteStrategy
from lmcompress.pruning.structured.schedules.hard_thresholding import HardThresholdingStrategy
from lmcompress.pruning.structured.schedules.movement import MovementStrategy

STRATEGIES: dict[str, type[Strategy]] = {
    "one_shot": CriterionStrategy,
    "iterative": CriterionStrategy,
    "gradual": CriterionStrategy,
    "iht": HardThresholdingStrategy,
    "hard_concrete": HardConcreteStrategy,
    "movement": MovementStrategy,
    "group_lasso": GroupLassoStrategy,
}
"""The strategies by the ``kind`` of their schedule."""
