"""Many-to-many layer distillation: the earth mover's distance between the hidden states of two models (BERT-EMD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.capture import Features
from lmcompress.distillation.config import EmdMatch
from lmcompress.distillation.matches.features import hidden_mse
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.step import FeatureTerm, scheduled
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, Term

if TYPE_CHECKING:
    from types import ModuleType


class EmdTerm(FeatureTerm):
    """The earth mover's distance between all blocks of student and teacher, as a term of the loss.

    Args:
        emd: the configuration.
        student: not wrapped.
        teachers: all teachers; it names one that runs.
        seed: seed of the projection, if the widths differ.

    Raises:
        LmcompressError: If the teacher does not exist or does not run, or POT is not installed.
    """

    def __init__(self, emd: EmdMatch, student: PreTrainedModel, teachers: Sequence[Teacher], *, seed: int) -> None:
        teacher = teachers[emd.which].model if emd.which < len(teachers) else None
        if teacher is None:
            raise LmcompressError(
                f"emd needs a teacher that runs, number {emd.which} is none; there are {len(teachers)}"
            )
        self.emd, self.which, self.learning_rate = emd, emd.which, emd.projection_learning_rate
        self.student, self.teacher = (
            [("hidden", layer) for layer in range(1, len(anatomy_of(model).block_list) + 1)]
            for model in (student, teacher)
        )
        widths = anatomy_of(student).hidden_size, anatomy_of(teacher).hidden_size
        self._projection = Projection(*widths, seed=seed) if widths[0] != widths[1] else None
        self.modules = {} if self._projection is None else {"emd": self._projection}
        try:
            mine, theirs = ([torch.zeros(1, 2, width)] for width in widths)
            emd_hidden_mse(mine, theirs, torch.ones(1, 2), projection=self._projection)
        except ImportError as error:
            raise LmcompressError(str(error)) from error

    def terms(self, student: Features, teacher: Features, step: Step, mask: Tensor) -> dict[str, Term]:
        """The term ``emd`` of one micro-batch; see :class:`FeatureTerm`.

        Args:
            student: features of the student.
            teacher: features of the teacher.
            step: the step, with the progress.
            mask: ``(batch, length)``.

        Returns:
            One term, by its name.
        """
        mine, theirs = [student[feature] for feature in self.student], [teacher[feature] for feature in self.teacher]
        total = emd_hidden_mse(mine, theirs, mask, projection=self._projection).sum()
        weight = scheduled(self.emd.weight, self.emd.weight_schedule, step.progress)
        return {"emd": Term(total, "tokens", weight)}


def earth_mover_flow(
    cost: Tensor, student_weights: Tensor | None = None, teacher_weights: Tensor | None = None
) -> Tensor:
    r"""The cheapest transport between layers: the flow of the earth mover's distance.

    .. math:: \arg\min_{f \ge 0} \sum_{ij} f_{ij} c_{ij}, \quad \sum_j f_{ij} = w^S_i, \; \sum_i f_{ij} = w^T_j

    Solved exactly (network simplex, POT) in float64 on the CPU.

    Args:
        cost: ``(S, T)`` or ``(batch, S, T)`` finite: the distance of each student layer from each teacher layer.
        student_weights: ``(S,)`` >= 0, scaled to sum 1; default all equal.
        teacher_weights: ``(T,)``, same as above.

    Returns:
        The flow, with the shape and device of ``cost``, float32, without gradient; each sums to 1.

    Raises:
        LmcompressError: If a cost is not finite or has another shape, or weights are not a distribution.
        ImportError: If POT is not installed.

    Reference:
        Li et al., *BERT-EMD*, 2020, https://arxiv.org/abs/2010.06133, section 3.

    Example:
        >>> earth_mover_flow(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    ot = _import_ot()
    if cost.dim() not in (2, 3):
        raise LmcompressError(f"cost must be (student layers, teacher layers), got shape {tuple(cost.shape)}")
    if not torch.isfinite(cost).all():
        raise LmcompressError("costs between layers must be finite; did training diverge?")
    student = _distribution(student_weights, cost.shape[-2], "student").numpy()
    teacher = _distribution(teacher_weights, cost.shape[-1], "teacher").numpy()
    matrices = cost.detach().double().cpu().reshape(-1, *cost.shape[-2:])
    flows = [torch.from_numpy(ot.emd(student, teacher, matrix.numpy())) for matrix in matrices]
    return torch.stack(flows).reshape(cost.shape).to(device=cost.device, dtype=torch.float32)


def emd_hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
    student_weights: Tensor | None = None,
    teacher_weights: Tensor | None = None,
) -> Tensor:
    r"""Earth mover's distance between the layers of two models, with squared distances of hidden states as costs.

    .. math:: \sum_{ij} f_{ij} \sum_l m_l \frac{1}{d} \| W s^i_l - t^j_l \|_2^2

    The flow :math:`f` is computed for each example separately (so that 8 x 1 equals 1 x 8) and is constant: no
    gradient flows through it.

    Args:
        student: ``(batch, length, d_s)`` for each participating student layer.
        teacher: ``(batch, length, d_t)`` for each participating teacher layer.
        mask: ``(batch, length)``, 1 = real token.
        projection: from the student's width to the teacher's, one for all layers; may be omitted if they are equal.
        student_weights: ``(S,)``, see :func:`earth_mover_flow`.
        teacher_weights: ``(T,)``.

    Returns:
        ``(batch,)`` float32 sums over tokens (unit ``tokens``); 0 if the layers are the same sets.

    Raises:
        LmcompressError: If there are no layers, or their shapes differ.
        ImportError: If POT is not installed.

    Reference:
        Li et al., *BERT-EMD*, 2020, https://arxiv.org/abs/2010.06133, section 3, which computes one flow for the batch.
    """
    costs = emd_costs(student, teacher, mask, projection=projection)
    return (earth_mover_flow(costs, student_weights, teacher_weights) * costs).sum(dim=(1, 2))


def emd_costs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Distances of all student layers from all teacher layers: :math:`\sum_l m_l \frac{1}{d} \|W s^i_l - t^j_l\|^2`.

    Args:
        student: ``(batch, length, d_s)`` for each student layer.
        teacher: ``(batch, length, d_t)`` for each teacher layer.
        mask: ``(batch, length)``, 1 = real token.
        projection: from the student's width to the teacher's.

    Returns:
        ``(batch, S, T)`` float32 sums over tokens, with gradient to the student.

    Raises:
        LmcompressError: If there are no layers, or their shapes differ.
    """
    if len(student) == 0 or len(teacher) == 0:
        raise LmcompressError(f"need layers on both sides, got {len(student)} of the student, {len(teacher)} teacher's")
    projected = [hidden if projection is None else projection(hidden) for hidden in student]
    return torch.stack([torch.stack([hidden_mse(s, t, mask) for t in teacher], dim=-1) for s in projected], dim=1)


def cost_attention(
    flow: Tensor, cost: Tensor, student_weights: Tensor, teacher_weights: Tensor, *, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    r"""BERT-EMD's update of layer weights: layers that are cheap to match get more weight.

    .. math:: C_i = \frac{\sum_j f_{ij} c_{ij}}{w_i}, \quad w_i' = \frac{1 / C_i}{\sum_k 1 / C_k}

    for the student's layers, and the same with rows and columns exchanged for the teacher's. The caller keeps the
    weights between steps, as part of its training state.

    Args:
        flow: ``(S, T)`` or ``(batch, S, T)``, from :func:`earth_mover_flow`; a batch is averaged.
        cost: same shape.
        student_weights: ``(S,)`` > 0, those used for the flow.
        teacher_weights: ``(T,)`` > 0.
        eps: lower bound of the divisor.

    Returns:
        New student weights ``(S,)`` and teacher weights ``(T,)``, float32, each summing to 1, without gradient.

    Raises:
        LmcompressError: If the shapes do not fit, or a weight is not > 0.

    Reference:
        Li et al., *BERT-EMD*, 2020, https://arxiv.org/abs/2010.06133, section 3 (cost attention), in the form of the
        authors' code. A layer of zero cost gets the largest weight here; in the code it gets none.

    Example:
        >>> flow, cost = torch.eye(2) / 2, torch.tensor([[1.0, 9.0], [9.0, 3.0]])
        >>> cost_attention(flow, cost, torch.full((2,), 0.5), torch.full((2,), 0.5))[0]
        tensor([0.7500, 0.2500])
    """
    if flow.shape != cost.shape or flow.shape[-2:] != (len(student_weights), len(teacher_weights)):
        raise LmcompressError(
            f"flow and cost must have shape (..., {len(student_weights)}, {len(teacher_weights)}), as there are "
            f"weights; got {tuple(flow.shape)} and {tuple(cost.shape)}"
        )
    if not bool((student_weights > 0).all() and (teacher_weights > 0).all()):
        raise LmcompressError("layer weights must be > 0: a layer that no flow reaches has no cost to learn from")
    work = (flow.detach() * cost.detach()).double().reshape(-1, *flow.shape[-2:]).mean(dim=0)
    updated = []
    for paid, weights in ((work.sum(dim=1), student_weights), (work.sum(dim=0), teacher_weights)):
        inverse = 1 / (paid / weights.detach().to(paid)).clamp(min=eps)
        updated.append((inverse / inverse.sum()).float())
    return updated[0], updated[1]


def _distribution(weights: Tensor | None, layers: int, side: str) -> Tensor:
    if weights is None:
        return torch.full((layers,), 1 / layers, dtype=torch.float64)
    weights = weights.detach().double().cpu()
    if weights.shape != (layers,) or not bool((weights >= 0).all() and 0 < weights.sum() < float("inf")):
        raise LmcompressError(f"{side} weights must be {layers} numbers >= 0 with a sum > 0, got {weights.tolist()}")
    return weights / weights.sum()


def _import_ot() -> ModuleType:
    try:
        import ot
    except ImportError as error:
        raise ImportError('the earth mover\'s flow needs POT: pip install "lmcompress[emd]"') from error
    module: Any = ot
    return module
