"""The criteria by name, and what each is fed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lmcompress.pruning.structured import criteria
from lmcompress.pruning.structured.units import PARTS, PER_BLOCK, Part

Needs = Literal["nothing", "weights", "gates", "products", "activations", "pooled", "norms", "attention", "blocks"]


@dataclass(frozen=True)
class Criterion:
    """A function of :mod:`lmcompress.pruning.structured.criteria`, and what it is fed with.

    ============== =============================================================================== ==============
    needs          ``function``                                                                    then
    ============== =============================================================================== ==============
    ``nothing``    ``(units, generator) -> (units,)``
    ``weights``    ``(group (units, n)) -> (units,)``, the coupled weights
    ``gates``      ``(gradient (batch, units)) -> (batch, units)``, of gates, by each own loss     mean of examples
    ``products``   ``(list of (batch, units)) -> (batch, units)``, weights · gradients by matrix   mean of examples
    ``activations``  ``(activations (tokens, units[, size])) -> (units,)``, a mean over tokens     mean of tokens
    ``pooled``     ``(means (examples, units)) -> (units,)``, of all examples at once
    ``norms``      ``(weight (out, in), norm (in,)) -> (out, in)``, of what reads the units        sum of columns
    ``attention``  ``(probabilities, mask, causal=) -> (batch, heads + 1)``, sums and count        1 - mean
    ``blocks``     ``(before (tokens, d), after (tokens, d)) -> (tokens,)``                        mean of tokens
    ============== =============================================================================== ==============

    Attributes:
        name: for messages and configurations.
        needs: see the table.
        parts: that it has a meaning for.
        function: see the table.
        signed: whether the score is a sum of values of both signs, which has a meaning with given labels only.
        flip: whether a greater value means that a unit goes sooner; the score is then 1 minus the value.
    """

    name: str
    needs: Needs
    parts: tuple[Part, ...]
    function: Callable[..., Tensor]
    signed: bool = False
    flip: bool = False


_IN_BLOCKS: tuple[Part, ...] = ("heads", "neurons", "attention", "ffn", "layers")

CRITERIA: dict[str, Criterion] = {
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
}
"""The criteria by name. Another ``epsilon`` or number of bins: ``replace(criterion, function=partial(...))``."""
