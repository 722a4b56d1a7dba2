"""Which weights matter least: scores of single weights, the lowest of which are removed first.

=============== ================================ ============================================== ===============
criterion       source                           looks at                                       compared within
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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "layer", "row"]
Needs = Literal["nothing", "weights", "examples", "classes", "inputs", "moments"]


@dataclass(frozen=True)
class Criterion:
    """What a criterion needs to know.

    Attributes:
        needs: ``examples``: the gradients of each example's loss; ``classes``: those of each class's log-probability;
            ``inputs``: norms of inputs; ``moments``: all their second moments.
        scope: within what its scores are compared, where nothing else is said.
    """

    needs: Needs
    scope: Scope


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion("weights", "layer"),
    "obd": Criterion("classes", "global"),
    "fisher": Criterion("examples", "global"),
    "taylor": Criterion("examples", "global"),
    "movement": Criterion("examples", "global"),
    "wanda": Criterion("inputs", "row"),
    "sparsegpt": Criterion("moments", "layer"),
    "random": Criterion("nothing", "layer"),
}
"""The criteria by name, for configurations."""


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
    r"""How much the loss grows when a weight is deleted at a minimum: :math:`h_{kk} w_k^2 / 2`.

    Args:
        weight: any shape.
        curvature: the same shape: the diagonal of the second derivatives, >= 0, a mean over examples.

    Returns:
        The same shape, float32, >= 0.

    Reference:
        LeCun, Denker & Solla, *Optimal Brain Damage*, NIPS 1989, section 2, equation 5.

    Example:
        >>> obd(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0]))
        tensor([1.0000, 1.5000])
    """
    return curvature.float() * weight.float().square() / 2


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""First-order change of an example's loss when a weight is deleted, :math:`|w \, \partial L / \partial w|`.

    Args:
        weight: any shape.
        gradient: the same shape, of one example's loss; the score is the mean over examples.

    Returns:
        The same shape, float32, >= 0.

    Reference:
        Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*, ICLR 2017,
        https://arxiv.org/abs/1611.06440, section 2.2, of single weights. The absolute value is taken example by
        example, so that it does not depend on the size of a batch.

    Example:
        >>> taylor(torch.tensor([2.0, 1.0]), torch.tensor([-0.5, 0.25]))
        tensor([1.0000, 0.2500])
    """
    return (weight.float() * gradient.float()).abs()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""Whether a step of training moves a weight away from zero: :math:`-w \, \partial L / \partial w`.

    Args:
        weight: any shape, as it is behind the mask.
        gradient: the same shape, of the masked model's loss.

    Returns:
        The same shape, float32, of either sign; summed over steps.

    Reference:
        Sanh, Wolf & Rush, *Movement Pruning*, NeurIPS 2020, https://arxiv.org/abs/2005.07683, section 4, equation 2.

    Example:
        >>> movement(torch.tensor([2.0, 1.0]), torch.tensor([-0.5, 0.25]))
        tensor([ 1.0000, -0.2500])
    """
    return -(weight.float() * gradient.float())


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|w| * ||x||``: what a weight adds to the output at most, compared within an output.

    Args:
        weight: ``(out, in)``.
        input_norm: ``(in,)``, Euclidean norm of each input over the calibration tokens; of an embedding ``(words, 1)``,
            the root of how often each word occurs.

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
    """Scores that know nothing.

    Args:
        weight: of whose shape and on whose device they are.
        generator: on the CPU, so that a seed gives the same scores on every machine.

    Returns:
        The weight's shape, float32 in [0, 1).
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def quality_threshold(weight: Tensor, quality: float) -> Tensor:
    """Han's threshold of a matrix: a quality parameter times the standard deviation of its weights.

    Args:
        weight: any shape; weights that are exactly 0 are gone already and do not count.
        quality: how many standard deviations.

    Returns:
        0-d float32; magnitudes below it are removed. 0 where fewer than two weights are left.

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
        section 3.2; as in the authors' code, https://github.com/yiwenguo/Dynamic-Network-Surgery, though of the weights
        alone, without the bias.

    Example:
        >>> surgery_threshold(torch.tensor([1.0, -3.0, 0.0]), 1.0)
        tensor(3.)
    """
    left = weight[weight != 0].float().abs()
    if not len(left):
        return torch.zeros((), device=weight.device)
    return (left.mean() + rate * left.std(correction=0)).clamp(min=0)


def splice(mask: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    r"""The next mask of dynamic network surgery: cut below one threshold, splice from the other on, else leave.

    Args:
        mask: bool.
        weight: the same shape, as it is behind the mask.
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
