"""Scores of single weights; weights with the lowest scores are pruned first.

=============== ================================ ============================================== ===============
criterion       source                           uses                                           compared within
=============== ================================ ============================================== ===============
``magnitude``   Han et al. 2015                  weights                                        the matrix
``obd``         LeCun et al. 1989                curvature: exact Gauss-Newton, all classes     the model
``fisher``      LeCun et al. 1989 with the       gradients of single examples, *labels*         the model
                empirical Fisher information
``taylor``      Molchanov et al. 2017            gradients of single examples, *labels*         the model
``movement``    Sanh et al. 2020, section 4      gradients of training, or of data, *labels*    the model
``wanda``       Sun et al. 2023, eq. 1           weights and inputs                             the row
``sparsegpt``   Frantar & Alistarh 2023          weights and second moments of inputs           column blocks
``random``      the control                      nothing                                        the matrix
=============== ================================ ============================================== ===============
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest
from lmcompress.registry import Registry

Scope = Literal["global", "layer", "row"]
Needs = Literal["nothing", "weights", "examples", "classes", "inputs", "moments"]


@dataclass(frozen=True)
class Criterion:
    """A function that scores weights, and its inputs.

    ============ ================================================================================ ===============
    needs        ``function``; ``weight`` is ``(out, in)`` with inputs, else as stored            then
    ============ ================================================================================ ===============
    ``nothing``  ``(weight, generator) -> scores`` of the weight's shape
    ``weights``  ``(weight) -> scores``
    ``examples`` ``(weight, gradient) -> summand``, from each example's own loss on its label     sum of examples
    ``classes``  ``(weight, gradient) -> summand``, from each log-probability of each example     sum, weighted
                                                                                                  by probability
    ``inputs``   ``(weight, norm (in,)) -> scores``, of norms of inputs over tokens
    ``moments``  none: it chooses while it compensates, from the second moments of inputs
    ============ ================================================================================ ===============

    Attributes:
        name: name in messages and reports.
        needs: see the table.
        function: see the table; float32, weights with higher scores are kept longer.
        scope: default scope of the comparison.
        finish: ``(weight, sum) -> scores``, for sums that have the weight as a factor.
        in_training: whether it is a sum over the steps of training, from the gradient of each batch, and the pruned
            weights are trained behind the mask. Without training, the sum is that over ``examples``.

    Example:
        >>> cube = Criterion("cube", "weights", lambda weight: weight.float().abs() ** 3)
        >>> cube.needs_data
        False
    """

    name: str
    needs: Needs
    function: Callable[..., Tensor]
    scope: Scope = "layer"
    finish: Callable[[Tensor, Tensor], Tensor] | None = None
    in_training: bool = False

    def __post_init__(self) -> None:
        for value, valid in ((self.needs, get_args(Needs)), (self.scope, get_args(Scope))):
            if value not in valid:
                raise LmcompressError(
                    f"the criterion {self.name} has {value!r}, which is unknown{nearest(value, valid)}"
                )
        if self.in_training and self.needs != "examples":
            raise LmcompressError(f"the criterion {self.name} must need examples to be a sum over training")

    @property
    def needs_data(self) -> bool:
        """Whether scores depend on calibration data."""
        return self.needs not in ("nothing", "weights")


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``.

    Args:
        weight: any shape.

    Returns:
        The same shape, float32.

    Reference:
        Han, Pool, Tran & Dally, *Learning both Weights and Connections for Efficient Neural Networks*, NIPS 2015,
        https://arxiv.org/abs/1506.02626, section 3.

    Example:
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    return weight.float().abs()


def obd(weight: Tensor, curvature: Tensor) -> Tensor:
    r"""Increase of the loss when a weight is deleted at a minimum: :math:`h_{kk} w_k^2 / 2`.

    Args:
        weight: any shape.
        curvature: the same shape: diagonal of the Hessian, >= 0, a mean over examples.

    Returns:
        The same shape, float32, >= 0.

    Reference:
        LeCun, Denker & Solla, *Optimal Brain Damage*, NIPS 1989, section 2, equation 5.

    Example:
        >>> obd(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0]))
        tensor([1.0000, 1.5000])
    """
    return curvature.float() * weight.float().square() / 2


def squared_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""The summand of a weight's curvature, :math:`(\partial L / \partial w)^2`.

    Args:
        weight: unused.
        gradient: gradient of the loss of an example, or of a log-probability.

    Returns:
        The gradient's shape, float32, >= 0.
    """
    return gradient.float().square()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""First-order change of an example's loss when a weight is deleted, :math:`|w \, \partial L / \partial w|`.

    Args:
        weight: any shape.
        gradient: the same shape, of one example's loss; the score is the mean over examples.

    Returns:
        The same shape, float32, >= 0.

    Reference:
        Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*, ICLR 2017,
        https://arxiv.org/abs/1611.06440, section 2.2, for single weights. The absolute value is taken per
        example, so that it does not depend on the batch size.

    Example:
        >>> taylor(torch.tensor([2.0, 1.0]), torch.tensor([-0.5, 0.25]))
        tensor([1.0000, 0.2500])
    """
    return (weight.float() * gradient.float()).abs()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""Movement of a weight away from zero in a training step: :math:`-w \, \partial L / \partial w`.

    Args:
        weight: any shape, the value behind the mask.
        gradient: the same shape, of the masked model's loss.

    Returns:
        The same shape, float32, of either sign; summed over steps.

    Reference:
        Sanh, Wolf & Rush, *Movement Pruning*, NeurIPS 2020, https://arxiv.org/abs/2005.07683, section 4, equation 2.

    Example:
        >>> movement(torch.tensor([2.0, 1.0]), torch.tensor([-0.5, 0.25]))
        tensor([ 1.0000, -0.2500])
    """
    return (weight.float() * gradient.float()).neg_()


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|w| * ||x||``: an upper bound of a weight's contribution to the output, compared within an output.

    Args:
        weight: ``(out, in)``.
        input_norm: ``(in,)``, Euclidean norm of each input over the calibration tokens; for an embedding
            ``(tokens, 1)``, the root of the number of occurrences of each token.

    Returns:
        ``(out, in)`` float32.

    Reference:
        Sun, Liu, Bair & Kolter, *A Simple and Effective Pruning Approach for Large Language Models*, 2023,
        https://arxiv.org/abs/2306.11695, equation 1.

    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5]))
        tensor([[3., 1.]])
    """
    return weight.float().abs() * input_norm.float()


def random_scores(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random scores.

    Args:
        weight: determines shape and device.
        generator: on the CPU, so that a seed gives the same scores on every machine.

    Returns:
        The weight's shape, float32 in [0, 1).
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def no_scores(weight: Tensor) -> Tensor:
    """Refuse to score: SparseGPT's scores depend on the weights it has pruned before.

    Args:
        weight: unused.

    Raises:
        LmcompressError: Always.
    """
    raise LmcompressError("the criterion sparsegpt chooses while it compensates, it has no scores of its own")


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    {
        criterion.name: criterion
        for criterion in (
            Criterion("magnitude", "weights", magnitude),
            Criterion("obd", "classes", squared_gradient, "global", finish=obd),
            Criterion("fisher", "examples", squared_gradient, "global", finish=obd),
            Criterion("taylor", "examples", taylor, "global"),
            Criterion("movement", "examples", movement, "global", in_training=True),
            Criterion("wanda", "inputs", wanda, "row"),
            Criterion("sparsegpt", "moments", no_scores),
            Criterion("random", "nothing", random_scores),
        )
    },
    lambda part: isinstance(part, Criterion),
    "a lmcompress.pruning.unstructured.Criterion",
)
"""The criteria by name; a custom one is a :class:`Criterion`, or its name ``module:attribute``."""


def quality_threshold(weight: Tensor, quality: float) -> Tensor:
    """Han's threshold of a matrix: a quality parameter times the standard deviation of its weights.

    Args:
        weight: any shape; weights that are exactly 0 are pruned already and do not count.
        quality: number of standard deviations.

    Returns:
        0-d float32; magnitudes below it are removed. 0 if fewer than two weights are left.

    Reference:
        Han et al. 2015, https://arxiv.org/abs/1506.02626, section 4.

    Example:
        >>> quality_threshold(torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0]), 0.5)
        tensor(0.5774)
    """
    left = weight[weight != 0].float()
    return quality * left.std() if len(left) > 1 else torch.zeros((), device=weight.device)


def surgery_threshold(weight: Tensor, rate: float) -> Tensor:
    r"""The threshold of dynamic network surgery: :math:`\max(\mu + c \sigma, 0)` of the magnitudes.

    Args:
        weight: any shape; mean and deviation are those of weights that are not 0.
        rate: c.

    Returns:
        0-d float32.

    Reference:
        Guo, Yao & Chen, *Dynamic Network Surgery for Efficient DNNs*, NIPS 2016, https://arxiv.org/abs/1608.04493,
        section 3.2; as in the authors' code, https://github.com/yiwenguo/Dynamic-Network-Surgery, except that the bias
        is excluded.

    Example:
        >>> surgery_threshold(torch.tensor([1.0, -3.0, 0.0]), 1.0)
        tensor(3.)
    """
    left = weight[weight != 0].float().abs()
    if not len(left):
        return torch.zeros((), device=weight.device)
    return (left.mean() + rate * left.std(correction=0)).clamp(min=0)


def splice(mask: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    r"""The next mask of dynamic network surgery: cut below one threshold, splice above the other, else unchanged.

    Args:
        mask: bool.
        weight: the same shape, the values behind the mask.
        low: :math:`a_k`.
        high: :math:`b_k`, at least ``low``.

    Returns:
        Bool of the same shape.

    Reference:
        Guo, Yao & Chen 2016, https://arxiv.org/abs/1608.04493, equation 3.

    Example:
        >>> mask, weight = torch.tensor([True, False, False]), torch.tensor([0.5, 1.0, 2.0])
        >>> splice(mask, weight, torch.tensor(0.9), torch.tensor(1.1))
        tensor([False, False,  True])
    """
    size = weight.abs()
    return (mask & (size >= low)) | (size >= high)
