"""Structured sparsity learning: groups of the weights of any matrix become exactly zero together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.method import SteppedMethod, inner_optimizer
from lmcompress.pruning.proximal import STEER_EVERY, proximal_factor, steering_factor
from lmcompress.pruning.unstructured.groups import GroupRule, Groups, groups_of
from lmcompress.schedules import Phase, linear, phase_share


class GroupLassoConfig(Phase):
    """A penalty on the norms of groups, with a proximal step after each optimizer step (SSL)."""

    rules: Annotated[tuple[GroupRule, ...], Field(min_length=1, description="Groups of the matrices.")]
    end: Annotated[
        float,
        Field(gt=0, le=1, description="Share of training after which zero groups are final and there is no penalty."),
    ] = 0.6
    warmup: Annotated[
        float, Field(ge=0, le=1, description="For keep: share of the phase over which groups are reduced to it.")
    ] = 0.5
    penalty: Annotated[float, Field(gt=0, description="Strength λ, in units of the learning rate.")] = 0.1

    @model_validator(mode="after")
    def _span_of_columns(self) -> GroupLassoConfig:
        for rule in self.rules:
            if rule.span != 1 and rule.groups != "columns":
                raise ValueError(f"span is of columns, got {rule.span} for {rule.groups} of {rule.modules!r}")
        return self


@dataclass(frozen=True)
class GroupRow:
    """The remaining groups of one matrix.

    Attributes:
        path: path of its module.
        groups: kind of the groups.
        before: number of nonzero groups when training began.
        after: number of remaining groups.
    """

    path: str
    groups: str
    before: int
    after: int


@dataclass(frozen=True)
class GroupReport:
    """The remaining groups.

    Attributes:
        config: the configuration, as JSON types.
        rows: one for each matrix and kind of group.
    """

    config: dict[str, Any]
    rows: list[GroupRow]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


class GroupSparsity(SteppedMethod):
    """Drives groups of weights to exactly zero by a group lasso while the model is trained.

    After each optimizer step every group is shrunk, :math:`w_g \\leftarrow \\max(0, 1 - t / \\|w_g\\|) w_g` with
    :math:`t = \\eta \\lambda \\sqrt{|g|}`. If a rule says how many groups to keep, its λ is adjusted so that the
    number of zero groups follows. After the end of the phase, zero groups stay zero, and the rest is trained
    without a penalty. Then :func:`~lmcompress.pruning.unstructured.cut_zero_units` cuts plain networks, and
    :func:`lmcompress.pruning.structured.groups.zero_units` finds the units that structured pruning's surgery cuts from
    transformers.

    Args:
        config: the groups, their numbers, and the phase.

    Attributes:
        report: the result; set by :meth:`finish`.

    Note:
        Wen et al. take subgradient steps and set small groups to 0 at the end. The factor :math:`\\sqrt{|g|}` is
        that of Yuan & Lin 2006, so that large groups and small ones are penalized equally.

    Reference:
        Wen, Wu, Wang, Chen & Li, *Learning Structured Sparsity in Deep Neural Networks*, NIPS 2016,
        https://arxiv.org/abs/1608.03665, equations 1 to 4.
    """

    name = "group_sparsity"
    changes_values = True

    def __init__(self, config: GroupLassoConfig) -> None:
        self.config = config
        self.report: GroupReport | None = None
        self._trainer: Any = None
        self._optimizer: Any = None
        self._step, self._begin, self._end = 0, 0, -1

    def prepare(self, trainer: Any) -> None:
        """Find the groups.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If a rule matches nothing, groups do not divide a matrix, or more are to be kept than
                exist.
        """
        self._trainer = trainer
        self.attach(trainer.student)

    def attach(self, model: nn.Module) -> None:
        """The effect of :meth:`prepare` on the model, without a trainer.

        Args:
            model: not wrapped.

        Raises:
            LmcompressError: As :meth:`prepare`.
        """
        self.groups = groups_of(model, self.config.rules)
        self._before = [int((one.norms() > 0).sum()) for one in self.groups]
        self._state = _State(self.groups, self.config)
        self._handles = []
        for number, one in enumerate(self.groups):
            for parameter in (one.planned.weight, one.bias):
                if parameter is not None and parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._masking(number, parameter is one.bias)))

    # called by the trainer in every step

    def modules(self) -> dict[str, nn.Module]:
        """Strengths, final groups and whether they are final, for checkpoints."""
        return {"state": self._state}

    def freeze(self) -> None:
        """Make zero groups final; the weights are ordinary ones from then on.

        Raises:
            LmcompressError: If training has not begun.
        """
        if self._trainer is not None and self._end < 0:
            raise LmcompressError("no group was shrunk: finish() must come after train()")
        if not self._final:
            self._decide()
        self.detach()

    def detach(self) -> None:
        """Stop masking gradients; groups that are zero stay zero."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def complete(self) -> bool:
        """Whether the zero groups are final."""
        return self._final

    def finish(self) -> None:
        """Write the report.

        Raises:
            LmcompressError: If training has not begun.
        """
        if self.report is None:
            self.freeze()
            self.report = GroupReport(self.config.model_dump(mode="json"), self._rows())

    # called by the callback

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: the model's optimizer.

        Raises:
            LmcompressError: If no step lies between begin and end.
        """
        self._optimizer = optimizer
        self._begin, self._end = self.config.steps(max_steps, "a group lasso")
        self.restored()

    def restored(self) -> None:
        """Whether groups are final as in the checkpoint that was loaded."""
        self._final = bool(self._state.final)

    def advance(self, step: int) -> None:
        """The action due before an optimizer step.

        Args:
            step: optimizer steps done.
        """
        self._step = step
        if step >= self._end and not self._final:
            self._decide()
        elif self._begin <= step and step % STEER_EVERY == 0:
            self._steer()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Shrink every group, or keep finally pruned ones at 0."""
        if self._final:
            for one, gate in zip(self.groups, self._state.gates(), strict=True):
                one.multiply_(gate)
            return
        if self._step < self._begin:
            return
        rate = inner_optimizer(self._optimizer).param_groups[0]["lr"]
        for number, one in enumerate(self.groups):
            norms = one.norms()
            wanted = self._wanted(one)
            # groups shrunk together reach zero together: none is shrunk while enough are zero
            if wanted is not None and int((norms > 0).sum()) <= wanted:
                continue
            factor = proximal_factor(norms, rate * float(self._state.strengths[number]) * one.size**0.5)
            if wanted is not None:
                # groups of similar size would reach zero in one step: the largest of them are spared
                greatest = torch.argsort(norms, descending=True, stable=True)[:wanted]
                factor[greatest] = torch.where(factor[greatest] == 0, 1.0, factor[greatest])
            one.multiply_(factor)
            if bool(((factor == 0) & (norms > 0)).any()):
                self._forget(one, factor != 0)

    def metrics(self) -> dict[str, float]:
        """Share of all groups that is zero, for the log."""
        alive = sum(int((one.norms() > 0).sum()) for one in self.groups)
        return {"group_sparsity": 1 - alive / sum(one.count for one in self.groups)}

    # private below

    _final = False

    def _masking(self, number: int, bias: bool) -> Any:
        def hook(gradient: Tensor) -> Tensor | None:
            if not self._final:
                return None
            one, gate = self.groups[number], self._state.gates()[number].to(gradient.dtype)
            return gradient * (gate.expand_as(gradient) if bias else one.kept(gate))

        return hook

    def _wanted(self, one: Groups) -> int | None:
        """Number of groups that may remain at this step."""
        if one.rule.keep is None:
            return None
        phase = phase_share(self._step, self._begin, self._end)
        way = linear(min(1.0, phase / max(self.config.warmup, 1e-9)))
        return one.count - round(way * (one.count - one.rule.keep))

    @torch.no_grad()
    def _steer(self) -> None:
        for number, one in enumerate(self.groups):
            wanted = self._wanted(one)
            if wanted is not None and one.rule.keep is not None and one.count > one.rule.keep:
                gap = (int((one.norms() > 0).sum()) - wanted) / (one.count - one.rule.keep)
                self._state.strengths[number] *= steering_factor(gap)

    @torch.no_grad()
    def _decide(self) -> None:
        """The groups that are zero from now on: zero ones, and the smallest until the desired number is left."""
        for one, gate in zip(self.groups, self._state.gates(), strict=True):
            norms = one.norms()
            keep = one.count if one.rule.keep is None else one.rule.keep
            chosen = torch.argsort(norms, descending=True, stable=True)[:keep]
            gate.zero_()
            gate[chosen] = True
            gate &= norms > 0
            one.multiply_(gate)
            self._forget(one, gate)
        self._state.final.fill_(1)
        self._final = True

    def _forget(self, one: Groups, gate: Tensor) -> None:
        """Zero the optimizer's moments of groups that are zero."""
        if self._optimizer is None:
            return
        states = inner_optimizer(self._optimizer).state
        for parameter, kept in ((one.planned.weight, one.kept(gate)), (one.bias, gate)):
            for moment in states.get(parameter, {}).values():
                if isinstance(moment, Tensor) and parameter is not None and moment.shape == parameter.shape:
                    moment.mul_(kept.expand_as(moment))

    def _rows(self) -> list[GroupRow]:
        return [
            GroupRow(one.planned.path, one.rule.groups, before, int((one.norms() > 0).sum()))
            for one, before in zip(self.groups, self._before, strict=True)
        ]


class _State(nn.Module):
    """The state a checkpoint needs to resume."""

    strengths: Tensor
    final: Tensor

    def __init__(self, groups: Sequence[Groups], config: GroupLassoConfig) -> None:
        super().__init__()
        self._count = len(groups)
        device = groups[0].planned.weight.device
        strengths = torch.tensor([config.penalty * one.rule.strength for one in groups], dtype=torch.float64)
        self.register_buffer("strengths", strengths)
        self.register_buffer("final", torch.zeros((), dtype=torch.long))
        for number, one in enumerate(groups):
            self.register_buffer(f"gate_{number}", torch.ones(one.count, dtype=torch.bool, device=device))

    def gates(self) -> list[Tensor]:
        """For each matrix ``(count,)`` bool, False for finally pruned groups."""
        return [self.get_buffer(f"gate_{number}") for number in range(self._count)]
