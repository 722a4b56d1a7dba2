"""Groups of the weights of one matrix: rows, columns, channels, shapes, or all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from lmcompress.errors import LmcompressError, nearest
from lmcompress.families.weights import Weighted, weighted_modules
from lmcompress.pruning.proximal import group_norms
from lmcompress.pruning.unstructured.planning import Planned

GroupKind = Literal["rows", "columns", "channels", "shapes", "matrix"]


class GroupRule(BaseModel):
    """The kind of groups of some matrices, and the number to keep."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    modules: Annotated[str, Field(min_length=1, description="Parts or paths; * and ? are wildcards.")]
    groups: Annotated[
        GroupKind,
        Field(
            description="rows: all inputs of an output (with its bias), or a filter; columns: all weights that read an "
            "input; channels: all weights of a convolution that read a channel; shapes: the weights of all filters at "
            "one position of their window; matrix: all of it, for layers with a shortcut around them."
        ),
    ]
    span: Annotated[
        int,
        Field(ge=1, description="columns: neighbours per group, such as the positions of a channel once flattened."),
    ] = 1
    keep: Annotated[
        int | None,
        Field(
            ge=1,
            description="Number of groups to keep, to which the penalty is adjusted; null: determined by the penalty.",
        ),
    ] = None
    strength: Annotated[float, Field(gt=0, description="Initial factor of the configuration's penalty.")] = 1.0


class Groups:
    """The groups of one matrix, of one kind.

    Args:
        at: the matrix.
        rule: the kind of groups.

    Raises:
        LmcompressError: If a kind needs a convolution and the matrix is none, groups do not divide it, or more
            groups are to be kept than exist.
    """

    def __init__(self, at: Weighted, rule: GroupRule) -> None:
        self.rule = rule
        self.planned = Planned(at, at.weight, None, None, False)
        if rule.groups in ("channels", "shapes") and not isinstance(at.module, nn.Conv2d):
            raise LmcompressError(f"{rule.groups} are of convolutions, got {at.path}, a {type(at.module).__name__}")
        out, inputs = self._matrix().shape
        span = rule.span
        if isinstance(at.module, nn.Conv2d) and rule.groups == "channels":
            span = math.prod(at.module.kernel_size)
        if inputs % span:
            raise LmcompressError(f"groups must divide the inputs of {at.path}, got {span} for {inputs}")
        self.bias = getattr(at.module, "bias", None) if rule.groups in ("rows", "matrix") else None
        self._span = span
        self.count = {"rows": out, "matrix": 1}.get(rule.groups, inputs // span)
        if rule.keep is not None and rule.keep > self.count:
            raise LmcompressError(f"{at.path} has {self.count} {rule.groups}, got {rule.keep} to keep")
        self.size = sum(view[0].numel() for view in self._views())

    def norms(self) -> Tensor:
        """l2 norm of each group, ``(count,)`` float32."""
        return group_norms(self._views())

    def kept(self, gate: Tensor) -> Tensor:
        """The value of each weight's group.

        Args:
            gate: ``(count,)``.

        Returns:
            Same shape as the stored weight.
        """
        matrix = self._matrix()
        if self.rule.groups in ("rows", "matrix"):
            wide = gate[:, None].expand_as(matrix) if self.rule.groups == "rows" else gate[0].expand_as(matrix)
        else:
            wide = gate.repeat_interleave(self._span)[None, :].expand_as(matrix)
        return self.planned.stored(wide)

    @torch.no_grad()
    def multiply_(self, factor: Tensor) -> None:
        """Multiply the weights of each group, in place; exactly 0, and never -0, where the factor is 0.

        Args:
            factor: ``(count,)``.
        """
        weight = self.planned.weight
        wide = self.kept(factor.to(weight.dtype))
        weight.mul_(wide).masked_fill_(wide == 0, 0.0)
        if self.bias is not None:
            own = factor.to(self.bias.dtype).expand_as(self.bias)
            self.bias.mul_(own).masked_fill_(own == 0, 0.0)

    def _matrix(self) -> Tensor:
        return self.planned.matrix(self.planned.weight.detach())

    def _views(self) -> list[Tensor]:
        matrix = self._matrix()
        if self.rule.groups in ("rows", "matrix"):
            views = [matrix] if self.bias is None else [matrix, self.bias.detach()]
            return views if self.rule.groups == "rows" else [view.reshape(1, -1) for view in views]
        return [matrix.t().reshape(self.count, -1)]


def groups_of(model: nn.Module, rules: Sequence[GroupRule]) -> list[Groups]:
    """The groups that rules divide a model's matrices into.

    Args:
        model: a ``PreTrainedModel`` or any other module.
        rules: rules; a matrix may have groups of several kinds, which then overlap.

    Returns:
        One for each rule and matrix.

    Raises:
        LmcompressError: If a rule matches nothing, or as :class:`Groups`.
    """
    candidates = weighted_modules(model)
    found = []
    for rule in rules:
        matched = [candidate for candidate in candidates if candidate.matches(rule.modules)]
        if not matched:
            names = {name for c in candidates for name in (c.path, c.part, *c.tied) if name}
            raise LmcompressError(
                f"the rule for {rule.modules!r} matches no matrix of this model{nearest(rule.modules, names)}"
            )
        found += [Groups(candidate, rule) for candidate in matched]
    return found
