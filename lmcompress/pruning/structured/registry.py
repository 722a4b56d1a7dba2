"""The criteria by name, and the inputs of each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lmcompress.errors import LmcompressError, nearest
from lmcompress.pruning.structured import criteria
from lmcompress.pruning.structured.units import PARTS, PER_BLOCK, Part
from lmcompress.registry import Registry

Needs = Literal["nothing", "weights", "gates", "products", "activations", "pooled", "norms", "attention", "blocks"]

_IN_BLOCKS: tuple[Part, ...] = ("heads", "neurons", "attention", "ffn", "layers")


@dataclass(frozen=True)
class Criterion:
    """A function that scores units, such as those of :mod:`lmcompress.pruning.structured.criteria`, and what it needs.

    ============== =============================================================================== ==============
    needs          ``function``                                                                    then
    ============== =============================================================================== ==============
    ``nothing``    ``(units, generator) -> (units,)``
    ``weights``    ``(group (units, n)) -> (units,)``, the coupled weights
    ``gates``      ``(gradient (batch, units)) -> (batch, units)``, of gates, by each own loss     mean of examples
    ``products``   ``(list of (batch, units)) -> (batch, units)``, weights · gradients by matrix   mean of examples
    ``activations``  ``(activations (tokens, units[, size])) -> (units,)``, a mean over tokens     mean of tokens
    ``pooled``     ``(means (examples, units)) -> (units,)``, of all examples at once
    ``norms``      ``(weight (out, in), norm (in,)) -> (out, in)``, of weights that read the units sum of columns
    ``attention``  ``(probabilities, mask, causal=) -> (batch, heads + 1)``, sums and count        mean
    ``blocks``     ``(before (tokens, d), after (tokens, d)) -> (tokens,)``                        mean of tokens
    ============== =============================================================================== ==============

    Attributes:
        name: name in messages and reports.
        needs: see the table.
        parts: parts it can score.
        function: see the table; units with higher scores are kept longer.
        signed: whether the score is a sum of values of both signs, which is meaningful only with given labels.
        flip: whether units with higher values are pruned sooner; the score is then 1 minus the value.

    Example:
        >>> spread = Criterion("spread", "weights", ("heads", "neurons"), lambda group: group.std(dim=1))
        >>> spread.by_gradients, spread.needs_data
        (False, False)
    """

    name: str
    needs: Needs
    parts: tuple[Part, ...]
    function: Callable[..., Tensor]
    signed: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        if self.needs not in get_args(Needs):
            valid = nearest(self.needs, get_args(Needs))
            raise LmcompressError(f"the criterion {self.name} needs {self.needs!r}, which is not known{valid}")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            valid = nearest(unknown[0], PARTS) if unknown else f", one or more of {', '.join(PARTS)}"
            raise LmcompressError(f"the criterion {self.name} must name parts, got {tuple(self.parts)}{valid}")

    @property
    def needs_data(self) -> bool:
        """Whether scores depend on calibration data."""
        return self.needs not in ("nothing", "weights")

    @property
    def by_gradients(self) -> bool:
        """Whether scores depend on a loss, and so on labels."""
        return self.needs in ("gates", "products")

    @property
    def sums_in_training(self) -> bool:
        """Whether training can accumulate it (``scores: training``): it uses only the gradients of gates."""
        return self.needs == "gates"


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    {
        criterion.name: criterion
        for criterion in (
            Criterion("l1", "weights", PARTS, criteria.l1_norm),
            Criterion("l2", "weights", PARTS, criteria.l2_norm),
            Criterion("taylor_weights", "products", _IN_BLOCKS, criteria.taylor_weights),
            Criterion("taylor_gates", "gates", PARTS, criteria.taylor_gates),
            Criterion("fisher", "gates", PARTS, criteria.fisher),
            Criterion("movement", "gates", PARTS, criteria.movement, signed=True),
            Criterion("apoz", "activations", ("neurons",), criteria.apoz, flip=True),
            Criterion("mean_activation", "activations", (*PER_BLOCK, "hidden"), criteria.mean_activation),
            Criterion("activation_entropy", "pooled", PER_BLOCK, criteria.activation_entropy),
            Criterion("attention_entropy", "attention", ("heads",), criteria.attention_entropy, flip=True),
            Criterion("wanda", "norms", PER_BLOCK, criteria.wanda),
            Criterion("block_influence", "blocks", ("layers",), criteria.block_influence),
            Criterion("random", "nothing", PARTS, criteria.random_scores),
        )
    },
    lambda part: isinstance(part, Criterion),
    "a lmcompress.pruning.Criterion",
)
"""The criteria by name; a custom one is a :class:`Criterion`, or its name ``module:attribute``.

To change ``epsilon`` or the number of bins: ``replace(criterion, function=partial(...))``.
"""


def criteria_for(parts: Collection[Part]) -> str:
    """Names of the built-in criteria that can score given parts, for messages.

    Args:
        parts: parts that all must be scored.
    """
    return ", ".join(name for name, criterion in CRITERIA.items() if set(parts) <= set(criterion.parts))
