r"""Importance criteria as pure functions of tensors, called by :mod:`~lmcompress.pruning.structured.scoring`.

A *unit* is cut as a whole: a head, a neuron of the feed-forward network, a sub-layer, a block, a dimension of the
residual stream. Its *coupled group* is everything that is cut with it: for a head the rows of query, key and value
(with biases) and the columns of the output projection; for a neuron the row of the first matrix, its bias, and the
column of the second. Units with higher scores are kept longer.

==================== ============================= ========================== =====================================
criterion            paper                         needs                      parts
==================== ============================= ========================== =====================================
``l1``, ``l2``       Li et al. 2017, section 3.1   weights                    all
``taylor_weights``   Yang et al. 2022 (TextPruner) gradients, labels or self  heads, neurons, attention, ffn, layers
``taylor_gates``     Michel et al. 2019, section 4 gradients, labels or self  all
``fisher``           LeCun et al. 1989, section 2; gradients, labels or self  all
                     Kwon et al. 2022, section 4
``movement``         Sanh et al. 2020, section 4   gradients, *labels*        all
``apoz``             Hu et al. 2016, eq. 1         activations                neurons
``mean_activation``  Molchanov et al. 2017,        activations                heads, neurons, hidden
                     section 2.2; Muralidharan et
                     al. 2024, section 2.1
``activation_        Luo & Wu 2017, section 3      activations                heads, neurons
entropy``
``attention_         Luo & Wu 2017 adapted to      queries and keys           heads
entropy``            attention
``wanda``            Sun et al. 2023, eq. 1,       weights and activations    heads, neurons
                     summed over the group
``block_influence``  Men et al. 2024, eq. 1        inputs, outputs of blocks  layers
``random``           the control                   nothing                    all
==================== ============================= ========================== =====================================

*Labels or self*: the gradient is that of the loss on the labels, or on labels sampled from the model's own predictions
(see :func:`lmcompress.pruning.structured.scoring.score`).

**Absolute values are taken per example.** Taken of a batch mean they would depend on the batch size:
gradients of two examples that pull a gate in opposite directions would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError


def l1_norm(group: Tensor) -> Tensor:
    """Sum of the magnitudes of a unit's coupled weights.

    Args:
        group: ``(units, weights of a unit)``, any floating dtype.

    Returns:
        ``(units,)`` float32.

    Reference:
        Li, Kadav, Durdanovic, Samet & Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017,
        https://arxiv.org/abs/1608.08710, section 3.1. There the group is only the filter; here it includes the weights
        that read it, since they are cut as well.

    Example:
        >>> l1_norm(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        tensor([3.0000, 0.5000])
    """
    return group.float().abs().sum(dim=-1)


def l2_norm(group: Tensor) -> Tensor:
    """Euclidean norm of a unit's coupled weights.

    Args:
        group: ``(units, weights of a unit)``, any floating dtype.

    Returns:
        ``(units,)`` float32.

    Reference:
        Li et al. 2017, https://arxiv.org/abs/1608.08710, section 4: no visible difference to :func:`l1_norm`.

    Example:
        >>> l2_norm(torch.tensor([[3.0, -4.0], [0.0, 0.5]]))
        tensor([5.0000, 0.5000])
    """
    return group.float().square().sum(dim=-1).sqrt()


def taylor_gates(gradient: Tensor) -> Tensor:
    r"""First-order change of the loss when a gate closes, :math:`|\partial L / \partial \xi|` for each example.

    The gate of a hidden dimension is a factor of the inputs of all matrices that read it, see
    :meth:`~lmcompress.pruning.structured.gates.Gates.read_with`.

    Args:
        gradient: ``(batch, units)``; of each example's own loss, with respect to gates that are 1.

    Returns:
        The same shape, float32, >= 0; the score is the mean over examples.

    Reference:
        Michel, Levy & Neubig, *Are Sixteen Heads Really Better than One?*, NeurIPS 2019,
        https://arxiv.org/abs/1905.10650, section 4, eq. 2; the expectation of the absolute value, as printed there.

    Example:
        >>> taylor_gates(torch.tensor([[1.0, 0.0], [-1.0, 0.5]])).mean(0)
        tensor([1.0000, 0.2500])
    """
    return gradient.float().abs()


def taylor_weights(products: Sequence[Tensor]) -> Tensor:
    r"""First-order change of the loss when a unit's weights become zero, matrix by matrix, for each example.

    .. math:: \sum_M \Big| \sum_{w \in M_u} w \, \partial L / \partial w \Big|

    over the matrices M that contain the unit u: for a head the output projection, for a neuron the first matrix (with
        its
    bias) and the second.

    Args:
        products: for each matrix ``(batch, units)``, the inner products of the unit's weights with their gradients of
            each example's own loss.

    Returns:
        ``(batch, units)`` float32, >= 0; the score is the mean over examples.

    Note:
        TextPruner takes the absolute value of the gradient of a batch's mean, so that its scores depend on the batch
        size, and omits the first matrix unless widths must be even. Neither is the case here.

    Reference:
        Yang, Cui & Chen, *TextPruner*, ACL 2022 demo, https://arxiv.org/abs/2203.15996, and its code.

    Example:
        >>> taylor_weights([torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 1.0]])])
        tensor([[4., 3.]])
    """
    return torch.stack([product.float().abs() for product in products]).sum(dim=0)


def fisher(gradient: Tensor) -> Tensor:
    r"""Second-order change of the loss when a gate closes: half the squared gradient, for each example.

    Optimal Brain Damage's saliency :math:`h_{kk} u_k^2 / 2` of a gate, whose value u is 1, with the curvature h taken
    as the diagonal of the Fisher information, :math:`E[(\partial L/\partial m)^2]`. With labels sampled from the
    model's own predictions (``labels="self"``) this *is* the Fisher information; with given labels it is the empirical
    one.

    Args:
        gradient: ``(batch, units)``; of each example's own loss, with respect to gates that are 1.

    Returns:
        The same shape, float32, >= 0; the score is the mean over examples.

    Reference:
        LeCun, Denker & Solla, *Optimal Brain Damage*, NIPS 1989, section 2; Kwon et al., *A Fast Post-Training Pruning
        Framework for Transformers*, NeurIPS 2022, https://arxiv.org/abs/2204.09656, section 4 (mask search).

    Example:
        >>> fisher(torch.tensor([[2.0, 0.0], [-2.0, 1.0]])).mean(0)
        tensor([2.0000, 0.2500])
    """
    return gradient.float().square() / 2


def movement(product: Tensor) -> Tensor:
    r"""Movement of a unit's weights towards zero in training: :math:`-\sum_w w \, \partial L / \partial w`.

    The only signed criterion, summed over steps: a unit whose weights shrink has a negative score.
    No absolute value is taken, so the gradient of a batch's mean loss is as good as that of each example.

    Args:
        product: any shape; inner product of the unit's weights with their gradients. For a unit with a gate of 1 on
            its output this is the gate's gradient.

    Returns:
        The same shape, float32.

    Reference:
        Sanh, Wolf & Rush, *Movement Pruning*, NeurIPS 2020, https://arxiv.org/abs/2005.07683, section 4, summed
        over the group as by Lagunas et al. 2021 for blocks, https://arxiv.org/abs/2109.04838.

    Example:
        >>> movement(torch.tensor([[2.0, -1.0]]))
        tensor([[-2.,  1.]])
    """
    return -product.float()


def apoz(activations: Tensor, *, epsilon: float = 0.01) -> Tensor:
    """Average percentage of zeros: the share of a neuron's activations that are (nearly) zero.

    Args:
        activations: ``(tokens, neurons)``, after the activation function; valid tokens only.
        epsilon: magnitudes up to it count as zero. After ReLU 0 is the paper's definition; GELU and SiLU are almost
            never exactly zero, so that a small number is needed.

    Returns:
        ``(neurons,)`` float32 in [0, 1]; *high* means inactive, so the score is 1 minus it.

    Reference:
        Hu, Peng, Tai & Tang, *Network Trimming*, 2016, https://arxiv.org/abs/1607.03250, eq. 1.

    Example:
        >>> apoz(torch.tensor([[0.0, 1.0], [0.005, 0.0]]))
        tensor([1.0000, 0.5000])
    """
    return (activations.float().abs() <= epsilon).float().mean(dim=0)


def mean_activation(activations: Tensor) -> Tensor:
    """Mean magnitude of a unit's output: absolute value for a neuron, Euclidean norm for a head.

    Args:
        activations: ``(tokens, units)``, or ``(tokens, units, size)`` if a unit's output is a vector.

    Returns:
        ``(units,)`` float32.

    Reference:
        Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*, ICLR 2017,
        https://arxiv.org/abs/1611.06440, section 2.2; Muralidharan et al. (Minitron), 2024,
        https://arxiv.org/abs/2407.14679, section 2.1, with the mean over batch and sequence.

    Example:
        >>> mean_activation(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        tensor([2., 1.])
        >>> mean_activation(torch.tensor([[[3.0, 4.0]]]))
        tensor([5.])
    """
    values = activations.float()
    return (values.abs() if values.dim() == 2 else values.square().sum(dim=-1).sqrt()).mean(dim=0)


def activation_entropy(pooled: Tensor, *, bins: int = 100) -> Tensor:
    r"""Entropy of a unit's activation over examples, :math:`-\sum_i p_i \log p_i` over the bins of a histogram.

    A unit with the same activation for all examples carries no information about them, and its entropy is low.

    Args:
        pooled: ``(examples, units)``, each example's mean over its valid tokens.
        bins: number of bins of equal width, between the unit's own minimum and maximum.

    Returns:
        ``(units,)`` float32 in nats, in [0, log(bins)].

    Note:
        The paper does not give the number of bins. Since each unit has its own range, entropy ignores the scale of an
        activation, and fewer examples than bins bound it by the logarithm of their number.

    Raises:
        LmcompressError: If there are fewer than two bins or two examples.

    Reference:
        Luo & Wu, *An Entropy-based Pruning Method for CNN Compression*, 2017,
        https://arxiv.org/abs/1706.05791, section 3.

    Example:
        >>> activation_entropy(torch.tensor([[0.0, 5.0], [1.0, 5.0]]), bins=2)
        tensor([0.6931, 0.0000])
    """
    examples, units = pooled.shape
    if bins < 2 or examples < 2:
        raise LmcompressError(
            f"activation entropy needs at least 2 bins and 2 examples, got {bins} and {examples}: one value has no "
            "distribution"
        )
    values = pooled.double()
    least, greatest = values.amin(dim=0), values.amax(dim=0)
    width = (greatest - least).clamp_min(torch.finfo(torch.float64).tiny)
    index = ((values - least) / width * bins).long().clamp_(0, bins - 1)
    counts = torch.zeros(bins, units, dtype=torch.float64, device=pooled.device)
    counts.scatter_add_(0, index, torch.ones_like(values))
    shares = counts / examples
    return torch.special.entr(shares).sum(dim=0).float()


def attention_entropy(probabilities: Tensor, mask: Tensor, *, causal: bool) -> Tensor:
    """Normalized entropy of a head's attention for each example.

    1 is a head that attends to all tokens equally, 0 one that attends to one token. **Ranking:** uniform heads compute
    little more than a bias could, so the score is 1 minus this value, and focused heads are kept. (For activations Luo
    & Wu rank the other way round: there low entropy means little information.) Keys outside of a sliding window count
    as visible, so that heads of layers with a window seem more focused than they are.

    Args:
        probabilities: ``(batch, heads, queries, keys)``.
        mask: ``(batch, length)`` bool, True for valid tokens.
        causal: whether a query sees only the keys up to its own position.

    Returns:
        ``(batch, heads)`` float64, sums over the valid queries that see at least two keys, and their number
        ``(batch,)``, concatenated as ``(batch, heads + 1)``; the caller divides once it has all examples.

    Reference:
        Luo & Wu 2017, https://arxiv.org/abs/1706.05791, adapted to attention; for the reading of low-entropy heads
        as specialised: Voita et al. 2019, https://arxiv.org/abs/1905.09418, section 4.

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> attention_entropy(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), mask, causal=False)
        tensor([[1., 2.]], dtype=torch.float64)
    """
    visible = mask.double().cumsum(dim=-1) if causal else mask.double().sum(dim=-1, keepdim=True).expand(mask.shape)
    # with one visible key there is no choice, and the maximum entropy is 0
    counted = mask & (visible >= 2)
    entropy = torch.special.entr(probabilities.double()).sum(dim=-1)
    share = entropy / visible.clamp_min(2).log()[:, None, :]
    sums = (share * counted[:, None, :]).sum(dim=-1)
    return torch.cat([sums, counted.double().sum(dim=-1, keepdim=True)], dim=-1)


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|w| * ||x||``: an upper bound of each weight's contribution to the output.

    Args:
        weight: ``(out, in)``.
        input_norm: ``(in,)``, Euclidean norm of each input over the calibration tokens.

    Returns:
        ``(out, in)`` float32; a unit's score is the sum over its columns.

    Reference:
        Sun, Liu, Bair & Kolter, *A Simple and Effective Pruning Approach for Large Language Models*, 2023,
        https://arxiv.org/abs/2306.11695, eq. 1; summed over structured groups as by An et al. (FLAP), 2023,
        https://arxiv.org/abs/2312.11983.

    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5]))
        tensor([[3., 1.]])
    """
    return weight.float().abs() * input_norm.float()


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 minus the cosine between a block's input and output, for each token.

    Args:
        before: ``(..., width)``, the block's input.
        after: the same shape, its output.

    Returns:
        ``(...)`` float32 in [0, 2]; the score is the mean over tokens.

    Reference:
        Men et al., *ShortGPT: Layers in Large Language Models are More Redundant Than You Expect*, 2024,
        https://arxiv.org/abs/2403.03853, eq. 1.

    Example:
        >>> block_influence(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]]))
        tensor([1., 0.])
    """
    # float64: 1 - cos of two nearly equal vectors is lost in float32
    similarity = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - similarity).clamp_min(0).float()


def random_scores(units: int, generator: torch.Generator) -> Tensor:
    """Random scores: the control that every other criterion must beat.

    Args:
        units: number of units.
        generator: on the CPU, so that a seed gives the same units on every machine.

    Returns:
        ``(units,)`` float32 in [0, 1).

    Example:
        >>> random_scores(2, torch.Generator().manual_seed(0))
        tensor([0.4963, 0.7682])
    """
    return torch.rand(units, generator=generator)


def normalize_by_layer(scores: Tensor) -> Tensor:
    """Scores of one block divided by their Euclidean norm, so that blocks with large gradients do not dominate.

    Args:
        scores: ``(units,)`` of one block.

    Returns:
        The same shape; zeros stay zeros.

    Reference:
        Michel et al. 2019, https://arxiv.org/abs/1905.10650, section 4, after Molchanov et al. 2017.

    Example:
        >>> normalize_by_layer(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return scores / scores.norm().clamp_min(torch.finfo(scores.dtype).tiny)
