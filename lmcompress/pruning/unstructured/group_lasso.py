"""Structured sparsity learning: groups of the weights of any matrix become exactly zero together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from lmcompress.errors import LmcompressError, nearest
from lmcompress.families.weights import Weighted, weighted_modules
from lmcompress.method import StepCallback, SteppedMethod, inner_optimizer
from lmcompress.pruning.proximal import group_norms, proximal_factor
from lmcompress.pruning.unstructured.planning import Planned
from lmcompress.schedules import Phase, linear, phase_share

GroupKind = Literal["rows", "columns", "channels", "shapes", "matrix"]
STEER_EVERY = 10
STEER_RATE = 0.25


class GroupRule(BaseModel):
    """Into which groups some matrices are divided, and how many are to stay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modules: Annotated[str, Field(min_length=1, description="Parts or paths; * and ? stand for any.")]
    groups: Annotated[
        GroupKind,
        Field(
            description="rows: all inputs of an output (with its bias), or a filter; columns: all weights that read an "
            "input; channels: all weights of a convolution that read a channel; shapes: the weights of all filters at "
            "one place of their window; matrix: all of it, for what a shortcut leads around."
        ),
    ]
    span: Annotated[
        int,
        Field(ge=1, description="columns: neighbours that are one group, such as the places of a channel once flat."),
    ] = 1
    keep: Annotated[
        int | None,
        Field(
            ge=1,
            description="Groups that stay in the end, to which the penalty is steered; null: what it leaves.",
        ),
    ] = None
    strength: Annotated[float, Field(gt=0, description="Times the penalty of the configuration, at first.")] = 1.0


class GroupLassoConfig(Phase):
    """A penalty on the norms of groups, with a proximal step after each optimizer step (SSL)."""

    rules: Annotated[tuple[GroupRule, ...], Field(min_length=1, description="What is divided into which groups.")]
    end: Annotated[
        float,
        Field(gt=0, le=1, description="Share of training after which zero groups are final and the penalty is gone."),
    ] = 0.6
    warmup: Annotated[
        float, Field(ge=0, le=1, description="keep: share of the phase over which the number of groups falls to it.")
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
    """What became of the groups of one matrix.

    Attributes:
        path: of its module.
        groups: what kind.
        before: how many were not zero when training began.
        after: how many are left.
    """

    path: str
    groups: str
    before: int
    after: int


@dataclass(frozen=True)
class GroupReport:
    """Which groups are left.

    Attributes:
        config: what was asked for, as JSON types.
        rows: of each matrix and kind of group.
    """

    config: dict[str, Any]
    rows: list[GroupRow]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


class Groups:
    """The groups of one matrix, of one kind.

    Args:
        at: the matrix.
        rule: into which groups.

    Raises:
        LmcompressError: the matrix is no convolution where there must be one, groups that do not divide it, or more
            groups to keep than there are.
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
        """Of a value for each group, that of each weight.

        Args:
            gate: ``(count,)``.

        Returns:
            Of the weight's shape, as it is stored.
        """
        matrix = self._matrix()
        if self.rule.groups in ("rows", "matrix"):
            wide = gate[:, None].expand_as(matrix) if self.rule.groups == "rows" else gate[0].expand_as(matrix)
        else:
            wide = gate.repeat_interleave(self._span)[None, :].expand_as(matrix)
        return self.planned.stored(wide)

    @torch.no_grad()
    def multiply_(self, factor: Tensor) -> None:
        """Multiply the weights of each group, in place; exactly 0, and never -0, where the factor is.

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


class GroupSparsity(SteppedMethod):
    """Drives groups of weights to exactly zero by a group lasso while the model is trained.

    After each optimizer step every group is shrunk, :math:`w_g \\leftarrow \\max(0, 1 - t / \\|w_g\\|) w_g` with
    :math:`t = \\eta \\lambda \\sqrt{|g|}`. Where a rule says how many groups stay, its λ is steered so that the
    number of zero groups follows. From the end of the phase on, zero groups stay as they are, and the rest recovers
    without a penalty. Then :func:`~lmcompress.pruning.unstructured.cut_zero_units` cuts plain networks, and
    :func:`lmcompress.pruning.structured.groups.zero_units` tells structured pruning's surgery what to cut from
    transformers.

    Args:
        config: what is divided into which groups, how many stay, and when.

    Attributes:
        report: what was done; after :meth:`finish`.

    Note:
        Wen et al. take subgradient steps and set what is nearly zero to 0 in the end. The factor :math:`\\sqrt{|g|}` is
        that of Yuan & Lin 2006, so that large groups and small ones are pressed alike.

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
            LmcompressError: a rule that names nothing, groups that do not divide a matrix, more to keep than there are,
                or the best checkpoint is to be loaded at the end.
        """
        if trainer.args.load_best_model_at_end:
            raise LmcompressError(
                "load_best_model_at_end must be false with group sparsity: an earlier checkpoint has fewer zeros than "
                "the last. Compare checkpoints after the run, or train for fewer steps"
            )
        self._trainer = trainer
        self.attach(trainer.student)
        trainer.add_callback(StepCallback(self))

    def attach(self, model: nn.Module) -> None:
        """What :meth:`prepare` does to the model, without a trainer.

        Args:
            model: not wrapped.

        Raises:
            LmcompressError: as :meth:`prepare`.
        """
        self.groups = groups_of(model, self.config.rules)
        self._before = [int((one.norms() > 0).sum()) for one in self.groups]
        self._state = _State(self.groups, self.config)
        self._handles = []
        for number, one in enumerate(self.groups):
            for parameter in (one.planned.weight, one.bias):
                if parameter is not None and parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._masking(number, parameter is one.bias)))

    # what the trainer calls in every step

    def modules(self) -> dict[str, nn.Module]:
        """Strengths, final groups and whether they are final, for checkpoints."""
        return {"state": self._state}

    def settle(self) -> None:
        """Make zero groups final; the weights are ordinary ones from then on.

        Raises:
            LmcompressError: training has not begun.
        """
        if self._trainer is not None and self._end < 0:
            raise LmcompressError("no group was shrunk: finish() must come after train()")
        if not self._final:
            self._decide()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Say what was done.

        Raises:
            LmcompressError: training has not begun.
        """
        if self.report is None:
            self.settle()
            self.report = GroupReport(self.config.model_dump(mode="json"), self._rows())

    # what the callback calls

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.

        Raises:
            LmcompressError: no steps between begin and end.
        """
        self._optimizer = optimizer
        self._begin, self._end = round(self.config.begin * max_steps), round(self.config.end * max_steps)
        if self._end <= self._begin:
            raise LmcompressError(
                f"a group lasso must have optimizer steps between begin and end, got {self._end - self._begin} of "
                f"{max_steps}: train longer, or let the phase take a larger share"
            )
        self._final = bool(self._state.final)

    def advance(self, step: int) -> None:
        """What is due before an optimizer step.

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
        """Shrink every group; or keep at 0 what is finally gone."""
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
            # groups that press on together also reach zero together: none is pressed while enough are there
            if wanted is not None and int((norms > 0).sum()) <= wanted:
                continue
            factor = proximal_factor(norms, rate * float(self._state.strengths[number]) * one.size**0.5)
            if wanted is not None:
                # groups of like size would die in one step: the greatest of them wait
                greatest = torch.argsort(norms, descending=True, stable=True)[:wanted]
                factor[greatest] = torch.where(factor[greatest] == 0, 1.0, factor[greatest])
            one.multiply_(factor)
            if bool(((factor == 0) & (norms > 0)).any()):
                self._forget(one, factor != 0)

    def metrics(self) -> dict[str, float]:
        """Share of all groups that is zero, for the log."""
        alive = sum(int((one.norms() > 0).sum()) for one in self.groups)
        return {"group_sparsity": 1 - alive / sum(one.count for one in self.groups)}

    # below: nobody else's business

    _final = False

    def _masking(self, number: int, bias: bool) -> Any:
        def hook(gradient: Tensor) -> Tensor | None:
            if not self._final:
                return None
            one, gate = self.groups[number], self._state.gates()[number].to(gradient.dtype)
            return gradient * (gate.expand_as(gradient) if bias else one.kept(gate))

        return hook

    def _wanted(self, one: Groups) -> int | None:
        """Groups that may be left by now."""
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
                # a factor, so that no scale has to be guessed; bounded, so that it cannot run away between two looks
                gap = (int((one.norms() > 0).sum()) - wanted) / (one.count - one.rule.keep)
                self._state.strengths[number] *= math.exp(STEER_RATE * max(-1.0, min(1.0, 5 * gap)))

    @torch.no_grad()
    def _decide(self) -> None:
        """Which groups are zero from now on: those that are, and the smallest until as few are left as wanted."""
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
        """What the optimizer knows of groups that are zero."""
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


def groups_of(model: nn.Module, rules: Sequence[GroupRule]) -> list[Groups]:
    """The groups that rules divide a model's matrices into.

    Args:
        model: a ``PreTrainedModel`` or any other module.
        rules: a matrix may have groups of several kinds, which then overlap.

    Returns:
        One for each rule and matrix.

    Raises:
        LmcompressError: a rule that names nothing, or what :class:`Groups` refuses.
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


class _State(nn.Module):
    """What a checkpoint needs to go on."""

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
        """For each matrix ``(count,)`` bool, False where a group is finally gone."""
        return [self.get_buffer(f"gate_{number}") for number in range(self._count)]
