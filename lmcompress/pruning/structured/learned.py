"""The arithmetic of learned masks: hard-concrete gates, the Lagrangian, movement scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.units import Part, Units

LOW, HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
LOG_ALPHA_LIMIT = math.log(100.0)
"""CoFi clamps ``log_alpha`` to ± this after every step, so that no gate leaves the reach of its gradient."""

_SHARPNESS = 0.8


def hard_concrete_sample(
    log_alpha: Tensor, uniform: Tensor, *, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH
) -> Tensor:
    r"""A sample of hard-concrete gates: exactly 0 and exactly 1 with positive probability, differentiable in between.

    .. math:: s = \sigma((\log u - \log(1 - u) + \log\alpha) / \beta), \quad z = \min(1, \max(0, s (\zeta - \gamma) +
        \gamma))

    Args:
        log_alpha: any shape, floating; larger is more open. Computed in float32.
        uniform: the same shape, noise in (0, 1); the caller draws it.
        temperature: :math:`\beta`.
        low: :math:`\gamma < 0`.
        high: :math:`\zeta > 1`.

    Returns:
        Gates in [0, 1], float32, with gradient to ``log_alpha``.

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Louizos, Welling & Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018,
        https://arxiv.org/abs/1712.01312, equations 10 and 11.

    Example:
        >>> hard_concrete_sample(torch.tensor([-9.0, 0.0, 9.0]), torch.full((3,), 0.5))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if uniform.shape != log_alpha.shape:
        raise LmcompressError(
            f"noise must have the shape of log_alpha {tuple(log_alpha.shape)}, got {tuple(uniform.shape)}"
        )
    # float32: in bfloat16, 1 - u is 1 for a third of all u near 0
    noise = uniform.float().clamp(1e-6, 1 - 1e-6)
    stretched = torch.sigmoid((torch.logit(noise) + log_alpha.float()) / temperature) * (high - low) + low
    return stretched.clamp(0.0, 1.0)


def hard_concrete_open(
    log_alpha: Tensor, *, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH
) -> Tensor:
    r"""Probability that a hard-concrete gate is not 0, the expected :math:`L_0` norm of each.

    .. math:: P(z \ne 0) = \sigma(\log\alpha - \beta \log(-\gamma / \zeta))

    Args:
        log_alpha: any shape.
        temperature: :math:`\beta`.
        low: :math:`\gamma < 0`.
        high: :math:`\zeta > 1`.

    Returns:
        In (0, 1), float32, with gradient.

    Reference:
        Louizos, Welling & Kingma, 2018, https://arxiv.org/abs/1712.01312, equation 12.

    Example:
        >>> hard_concrete_open(torch.zeros(1))
        tensor([0.8318])
    """
    return torch.sigmoid(log_alpha.float() - temperature * math.log(-low / high))


def hard_concrete_value(log_alpha: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    r"""Noise-free value of a gate that is kept: :math:`\sigma(0.8 \log\alpha / \beta)`, never exactly 0.

    Args:
        log_alpha: any shape.
        temperature: :math:`\beta`.

    Returns:
        In (0, 1), float32, with gradient.

    Reference:
        The code of Xia, Zhong & Chen, *CoFi*, 2022, https://arxiv.org/abs/2204.00408 (after FLOP); Louizos et al.
        stretch and clip instead, which gives 0 to gates that a target keeps.

    Example:
        >>> hard_concrete_value(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([0.0082, 0.5000, 0.9918])
    """
    return torch.sigmoid(_SHARPNESS * log_alpha.float() / temperature)


def initial_log_alpha(drop: float) -> float:
    """The initial ``log_alpha`` of gates: ``logit(1 - drop)``, within ± :data:`LOG_ALPHA_LIMIT`.

    Args:
        drop: share of gates that are closed initially, in [0, 1); 0 gives the limit.

    Returns:
        One number for all gates.

    Raises:
        LmcompressError: If ``drop`` is outside [0, 1).

    Example:
        >>> round(initial_log_alpha(0.05), 3)
        2.944
    """
    if not 0 <= drop < 1:
        raise LmcompressError(f"the share of gates that are closed initially must be in [0, 1), got {drop}")
    return LOG_ALPHA_LIMIT if drop == 0 else min(LOG_ALPHA_LIMIT, max(-LOG_ALPHA_LIMIT, math.log((1 - drop) / drop)))


def without_expected_zeros(values: Tensor, open_probability: Tensor) -> Tensor:
    """Values with as many of the smallest set to 0 as are expected to be closed.

    Args:
        values: ``(n,)``, values of gates.
        open_probability: ``(n,)``, see :func:`hard_concrete_open`.

    Returns:
        ``(n,)``, without gradient; among equal values the later ones are set to 0 first.

    Reference:
        Xia, Zhong & Chen, *CoFi*, 2022, the authors' ``_deterministic_z``.

    Example:
        >>> without_expected_zeros(torch.tensor([0.9, 0.1, 0.8]), torch.tensor([0.9, 0.2, 0.9]))
        tensor([0.9000, 0.0000, 0.8000])
    """
    result = values.detach().clone()
    zeros = round(len(result) - float(open_probability.detach().double().sum()))
    if zeros > 0:
        result[torch.argsort(result, descending=True, stable=True)[len(result) - zeros :]] = 0.0
    return result


def lagrangian(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    r"""The penalty on the expected sparsity's deviation: :math:`\lambda_1 (\hat s - t) + \lambda_2 (\hat s - t)^2`.

    Minimized over the gates, maximized over the multipliers, so that deviations on either side are penalized.

    Args:
        sparsity: 0-d, expected share removed, with gradient.
        target: share to remove.
        linear: 0-d, :math:`\lambda_1`, of either sign.
        quadratic: 0-d, :math:`\lambda_2`.

    Returns:
        0-d float32, with gradient to all three tensors.

    Reference:
        Xia, Zhong & Chen, *CoFi*, 2022, https://arxiv.org/abs/2204.00408, section 3.1; after Wang et al. 2020,
        https://arxiv.org/abs/1910.04732, section 3.3.

    Example:
        >>> lagrangian(torch.tensor(0.5), 0.75, torch.tensor(2.0), torch.tensor(4.0))
        tensor(-0.2500)
    """
    gap = sparsity.float() - target
    return linear.float() * gap + quadratic.float() * gap.square()


def threshold_mask(scores: Tensor, threshold: float) -> Tensor:
    r"""1 where :math:`\sigma(S) > \tau`, else 0; the gradient passes straight through to the scores.

    Args:
        scores: any shape.
        threshold: :math:`\tau` in [0, 1).

    Returns:
        0 or 1, float32, with the gradient of the identity.

    Reference:
        Sanh, Wolf & Rush, *Movement Pruning*, 2020, https://arxiv.org/abs/2005.07683, section 4 (soft movement);
        Lagunas et al., *Block Pruning*, 2021, https://arxiv.org/abs/2109.04838 (``sigmoied_threshold``).

    Example:
        >>> threshold_mask(torch.tensor([-3.0, 0.0]), 0.1)
        tensor([0., 1.])
    """
    wide = scores.float()
    hard = (torch.sigmoid(wide.detach()) > threshold).float()
    return hard + (wide - wide.detach())


def movement_penalty(scores: Tensor) -> Tensor:
    r"""The mean of :math:`\sigma(S)`, which pushes scores below the threshold.

    Args:
        scores: any shape, not empty.

    Returns:
        0-d float32 in (0, 1), with gradient.

    Reference:
        Sanh, Wolf & Rush, 2020, https://arxiv.org/abs/2005.07683, section 4; the mean for the sum, as in nn_pruning.

    Example:
        >>> movement_penalty(torch.zeros(5))
        tensor(0.5000)
    """
    return torch.sigmoid(scores.float()).mean()


@dataclass(frozen=True)
class UnitCosts:
    """The cost of units as a polynomial that is linear in every count: one product for every chain of gates.

    A block costs ``heads × (per_head · D + per_head_fixed) + neurons × (per_neuron · D + per_neuron_fixed) +
    per_layer · D``, with D the width of the residual stream; and zero once the block is pruned.

    Attributes:
        per_head, per_head_fixed: ``(blocks,)``.
        per_neuron, per_neuron_fixed: ``(blocks,)``.
        per_layer: ``(blocks,)``.
        hidden: D before anything is cut.
    """

    per_head: Tensor
    per_head_fixed: Tensor
    per_neuron: Tensor
    per_neuron_fixed: Tensor
    per_layer: Tensor
    hidden: int

    def to(self, device: torch.device) -> UnitCosts:
        """The same on another device.

        Args:
            device: the device.
        """
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return UnitCosts(hidden=self.hidden, **tensors)


def expected_cost(open_probability: Units, costs: UnitCosts, heads: Sequence[int], neurons: Sequence[int]) -> Tensor:
    """Expected cost of the blocks when every gate is open independently with its probability.

    A head is weighted by the product of its own gate, its attention's, its layer's, and the sum of the hidden gates;
    a neuron in the same way.

    Args:
        open_probability: in [0, 1]; parts that are None are open.
        costs: costs of the units.
        heads: number of heads of each block.
        neurons: number of neurons of each block.

    Returns:
        0-d float32, with gradient; in the unit of ``costs``.

    Raises:
        LmcompressError: If the numbers of blocks differ.

    Reference:
        Xia, Zhong & Chen, *CoFi*, 2022, https://arxiv.org/abs/2204.00408, section 3.1 (equation for the expected
        sparsity), biases and norms included.
    """
    blocks = len(costs.per_head)
    if len(heads) != blocks or len(neurons) != blocks:
        raise LmcompressError(f"costs are of {blocks} blocks, got heads of {len(heads)} and neurons of {len(neurons)}")
    device = costs.per_head.device
    every = torch.ones(blocks, device=device)

    def counts(part: Part, sizes: Sequence[int]) -> Tensor:
        tensors = open_probability.tensors(part)
        if not tensors:
            return torch.tensor([float(n) for n in sizes], device=device)
        return torch.stack([tensor.float().sum() for tensor in tensors])

    def gate(part: Part) -> Tensor:
        tensors = open_probability.tensors(part)
        return tensors[0].float() if tensors else every

    width = gate("hidden").sum() if open_probability.hidden is not None else torch.tensor(float(costs.hidden))
    width = width.to(device)
    attention = counts("heads", heads) * gate("attention") * (costs.per_head * width + costs.per_head_fixed)
    ffn = counts("neurons", neurons) * gate("ffn") * (costs.per_neuron * width + costs.per_neuron_fixed)
    return (gate("layers") * (attention + ffn + costs.per_layer * width)).sum()
