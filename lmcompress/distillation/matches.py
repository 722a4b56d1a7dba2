"""Matches of intermediate features: how far the student's inside is from the teacher's, for each example.

Every match is a pure function ``f(student, teacher, mask, **options) -> (batch,)``: for each example the float32 *sum*
over what its unit counts, so that the caller divides once by the count over the whole optimizer step. Gradients flow
to the student only; what stands at padding never matters. Losses are 0 where student and teacher agree, but for the
cross-entropies, which keep the teacher's entropy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest

Unit = Literal["examples", "tokens", "pairs"]
Feature = Literal["hidden", "scores", "probabilities", "queries", "keys", "values"]
AttentionFeature = Literal["scores", "probabilities"]
Features = Tensor | tuple[Tensor, Tensor]
"""One captured feature, or those of two layers for the matches that relate layers."""


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""Squared distance of hidden states: :math:`\sum_i m_i \frac{1}{d} \sum_k (s_{ik} - t_{ik})^2`.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.

    Returns:
        ``(batch,)`` float32 sums over tokens.

    Raises:
        LmcompressError: the shapes differ.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, equation 8.

    Example:
        >>> hidden_mse(torch.ones(1, 3, 2), torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]]))
        tensor([2.])
    """
    student, teacher, _ = _states("hidden_mse", student, teacher, mask)
    return (student - teacher).square().mean(dim=-1).sum(dim=-1)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""Angle of hidden states: :math:`\sum_i m_i (1 - \cos(s_i, t_i))`.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        eps: the least length that a vector is divided by.

    Returns:
        ``(batch,)`` float32 sums over tokens, each token's share in [0, 2].

    Raises:
        LmcompressError: the shapes differ.

    Reference:
        Sanh et al., *DistilBERT*, 2019, https://arxiv.org/abs/1910.01108, section 2 (``L_cos``).
    """
    student, teacher, valid = _states("hidden_cosine", student, teacher, mask)
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1, eps=eps)
    return distance.masked_fill(~valid, 0).sum(dim=-1)


def pkd(student: Tensor, teacher: Tensor, mask: Tensor, *, position: int = 0, eps: float = 1e-6) -> Tensor:
    r"""Patient distillation: squared distance of the normalised states of one token, ``[CLS]`` by default.

    .. math:: \left\| \frac{s}{\|s\|_2} - \frac{t}{\|t\|_2} \right\|_2^2

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        position: which of the example's *real* tokens, counted from 0; negative from the end (-1, the last, for
            causal models). An example with too few tokens contributes 0.
        eps: the least length that a vector is divided by.

    Returns:
        ``(batch,)`` float32, one value in [0, 4] for each example.

    Raises:
        LmcompressError: the shapes differ.

    Reference:
        Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019,
        https://arxiv.org/abs/1908.09355, equation 7.

    Example:
        >>> pkd(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]), torch.ones(1, 1))
        tensor([2.])
    """
    student, teacher, valid = _states("pkd", student, teacher, mask)
    # places among real tokens, so that padding on the left does not move the position
    place = valid.long().cumsum(dim=-1) - 1
    wanted = position if position >= 0 else valid.sum(dim=-1, keepdim=True) + position
    chosen = (valid & (place == wanted)).unsqueeze(-1)
    student_state = student.masked_fill(~chosen, 0).sum(dim=1)
    teacher_state = teacher.masked_fill(~chosen, 0).sum(dim=1)
    difference = F.normalize(student_state, dim=-1, eps=eps) - F.normalize(teacher_state, dim=-1, eps=eps)
    return difference.square().sum(dim=-1)


def gram(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    r"""Flow between two layers: distance of their Gram matrices over features (FSP matrices).

    .. math:: \frac{1}{d^2} \sum_{kl} (G^S_{kl} - G^T_{kl})^2, \quad G = \frac{1}{n} \sum_i m_i\, a_i b_i^\top

    with :math:`a, b` the states of the two layers and :math:`n` the example's number of real tokens.

    Args:
        student: two of ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: two of the same shape.
        mask: ``(batch, length)``, 1 = real token.

    Returns:
        ``(batch,)`` float32, one value for each example.

    Raises:
        LmcompressError: the shapes differ.

    Reference:
        Yim, Joo, Bae & Kim, *A Gift from Knowledge Distillation*, CVPR 2017,
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html, equations 1 and 2;
        TextBrewer's ``gram``/``fsp``.
    """
    first_student, first_teacher, valid = _states("gram", student[0], teacher[0], mask)
    second_student, second_teacher, _ = _states("gram", student[1], teacher[1], mask)
    count = valid.sum(dim=-1).clamp(min=1)[:, None, None]
    student_gram = _matmul(first_student.transpose(1, 2), second_student) / count
    teacher_gram = _matmul(first_teacher.transpose(1, 2), second_teacher) / count
    return (student_gram - teacher_gram).square().mean(dim=(1, 2))


def nst(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor, *, causal: bool = False
) -> Tensor:
    r"""Similarity between positions of two layers: distance of their Gram matrices over positions.

    .. math:: \sum_{ij} m_i m_j (G^S_{ij} - G^T_{ij})^2, \quad G_{ij} = \frac{1}{d} a_i^\top b_j

    with :math:`a, b` the states of the two layers and :math:`d` each model's own width: no projection is needed.

    Args:
        student: two of ``(batch, length, d_s)``; one layer given twice relates it to itself.
        teacher: two of ``(batch, length, d_t)``.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs.

    Raises:
        LmcompressError: batches or lengths differ.

    Reference:
        Huang & Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017,
        https://arxiv.org/abs/1707.01219.

    Note:
        This is TextBrewer's ``mmd``/``nst``: a match of linear Gram matrices, element by element, not the paper's
        maximum mean discrepancy, which compares sets of neurons without their order.
    """
    first_student, first_teacher, valid = _states("nst", student[0], teacher[0], mask, same_width=False)
    second_student, second_teacher, _ = _states("nst", student[1], teacher[1], mask, same_width=False)
    student_gram = _matmul(first_student, second_student.transpose(1, 2)) / first_student.shape[-1]
    teacher_gram = _matmul(first_teacher, second_teacher.transpose(1, 2)) / first_teacher.shape[-1]
    return (student_gram - teacher_gram).square().masked_fill(~_pairs(valid, causal), 0).sum(dim=(1, 2))


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""Squared distance of attention, head by head: :math:`\frac{1}{H} \sum_h \sum_{ij} m_i m_j (S_{hij} - T_{hij})^2`.

    Args:
        student: ``(batch, heads, length, length)`` scores or probabilities.
        teacher: same shape, same feature.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs of the mean over heads.

    Raises:
        LmcompressError: the shapes differ; unequal heads need :func:`attention_mse_mean`.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, equation 7 (on scores, which they found
        better than probabilities).

    Note:
        TextBrewer's, without a mask, ignores every negative score; here only padding is left out.
    """
    student, teacher, pairs = _attention("attention_mse", student, teacher, mask, causal)
    return _pair_distance(student, teacher, pairs)


def attention_mse_mean(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    """Squared distance of attention averaged over heads, so that numbers of heads may differ.

    :func:`attention_mse` of the means over heads (TextBrewer's ``attention_mse_sum``, with means for sums).

    Args:
        student: ``(batch, heads_s, length, length)`` scores or probabilities.
        teacher: ``(batch, heads_t, length, length)``, same feature.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs.

    Raises:
        LmcompressError: batches or lengths differ.
    """
    student, teacher, pairs = _attention("attention_mse_mean", student, teacher, mask, causal, same_heads=False)
    return _pair_distance(student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True), pairs)


def attention_ce(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    on: AttentionFeature,
    causal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    r"""Cross-entropy of the student's attention under the teacher's, head by head.

    .. math:: -\frac{1}{H} \sum_h \sum_i m_i \sum_j T_{hij} \log S_{hij}

    The teacher's entropy is not subtracted: the value at the teacher is that entropy, not 0 (``minilm_attention`` has
    the same gradient and is 0 there).

    Args:
        student: ``(batch, heads, length, length)``.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        on: what came: ``"scores"``, whose softmax over real keys is taken here, or ``"probabilities"``, which are
            taken as they are (TextBrewer takes the softmax of probabilities, and the signal almost vanishes).
        causal: scores only of keys ``j <= i``.
        eps: the least probability of the student inside the logarithm, for ``"probabilities"``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: the shapes differ (unequal heads need :func:`attention_ce_mean`), or ``on`` is neither.
    """
    student, teacher, pairs = _attention("attention_ce", student, teacher, mask, causal)
    return _attention_cross_entropy(student, teacher, pairs, on, eps)


def attention_ce_mean(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    on: AttentionFeature,
    causal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """Cross-entropy of attention averaged over heads (scores before the softmax), so that numbers of heads may differ.

    :func:`attention_ce` of the means over heads.

    Args:
        student: ``(batch, heads_s, length, length)``.
        teacher: ``(batch, heads_t, length, length)``.
        mask: ``(batch, length)``, 1 = real token.
        on: ``"scores"`` or ``"probabilities"``, as in :func:`attention_ce`.
        causal: scores only of keys ``j <= i``.
        eps: the least probability of the student inside the logarithm, for ``"probabilities"``.

    Returns:
        ``(batch,)`` float32 sums over query tokens, in nats; at the teacher its entropy, not 0.

    Raises:
        LmcompressError: batches or lengths differ, or ``on`` is neither.
    """
    student, teacher, pairs = _attention("attention_ce_mean", student, teacher, mask, causal, same_heads=False)
    student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    return _attention_cross_entropy(student, teacher, pairs, on, eps)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""KL(teacher ‖ student) of attention distributions, head by head (MiniLM's attention transfer).

    .. math:: \frac{1}{H} \sum_h \sum_i m_i \mathrm{KL}(T_{hi} \| S_{hi}), \quad T_{hi}, S_{hi} = \mathrm{softmax}_j

    Args:
        student: ``(batch, heads, length, length)`` scores; their softmax over real keys is taken here.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: the shapes differ; unequal heads need ``minilmv2_query``, ``_key`` and ``_value``.

    Reference:
        Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957, section 3.1 (``L_AT``, of the last layers).
    """
    student, teacher, pairs = _attention("minilm_attention", student, teacher, mask, causal)
    return _relation_divergence(student, teacher, pairs)


def value_relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""KL(teacher ‖ student) of how values relate to one another, head by head (MiniLM's value relation).

    .. math:: \frac{1}{H} \sum_h \sum_i m_i \mathrm{KL}(R^T_{hi} \| R^S_{hi}), \quad
        R_h = \mathrm{softmax}(V_h V_h^\top / \sqrt{k})

    Args:
        student: ``(batch, heads, length, k_s)`` values.
        teacher: ``(batch, heads, length, k_t)``; head sizes may differ.
        mask: ``(batch, length)``, 1 = real token.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: batches, lengths or numbers of heads differ.

    Reference:
        Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957, section 3.2 (``L_VR``, of the last layers).
    """
    _check_vectors("minilm_value", student, teacher, mask)
    if student.shape[1] != teacher.shape[1]:
        raise LmcompressError(_unequal_heads("minilm_value", student.shape[1], teacher.shape[1]))
    valid = mask.bool()
    return _relation_divergence(
        _relations(student, valid, student.shape[1]),
        _relations(teacher.detach(), valid, teacher.shape[1]),
        _pairs(valid, causal).unsqueeze(1),
    )


def relation_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, relation_heads: int | None = None, causal: bool = False
) -> Tensor:
    r"""KL(teacher ‖ student) of self-attention relations over heads split anew (MiniLMv2).

    .. math:: \frac{1}{R} \sum_r \sum_i m_i \mathrm{KL}(R^T_{ri} \| R^S_{ri}), \quad
        R_r = \mathrm{softmax}(A_r A_r^\top / \sqrt{d_r})

    with :math:`A` the queries, keys or values of all heads side by side, cut into :math:`R` relation heads of width
    :math:`d_r`. Numbers of heads and widths of student and teacher may differ.

    Args:
        student: ``(batch, heads_s, length, k_s)`` queries, keys or values.
        teacher: ``(batch, heads_t, length, k_t)``, of the same kind.
        mask: ``(batch, length)``, 1 = real token.
        relation_heads: :math:`R`, a divisor of both ``heads * k``; default the teacher's number of heads. The paper
            takes more (48 for 12 heads), which helps.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over relation heads, in nats.

    Raises:
        LmcompressError: batches or lengths differ, or a width cannot be cut into ``relation_heads``.

    Reference:
        Wang et al., *MiniLMv2*, 2021, https://arxiv.org/abs/2012.15828, section 3.
    """
    _check_vectors("minilmv2", student, teacher, mask)
    heads = teacher.shape[1] if relation_heads is None else relation_heads
    for side, vectors in (("student", student), ("teacher", teacher)):
        width = vectors.shape[1] * vectors.shape[3]
        if heads < 1 or width % heads:
            raise LmcompressError(
                f"relation_heads must be >= 1 and divide the {side}'s width {width} ({vectors.shape[1]} heads of "
                f"{vectors.shape[3]}), got {heads}; choose a common divisor of both widths"
            )
    valid = mask.bool()
    return _relation_divergence(
        _relations(student, valid, heads),
        _relations(teacher.detach(), valid, heads),
        _pairs(valid, causal).unsqueeze(1),
    )


def attention_transfer(
    student: Tensor, teacher: Tensor, mask: Tensor, *, power: float = 2.0, eps: float = 1e-6
) -> Tensor:
    r"""Which positions are active: distance of normalised saliency maps of hidden states.

    .. math:: \frac{1}{n} \sum_i m_i \left( \frac{Q^S_i}{\|Q^S\|_2} - \frac{Q^T_i}{\|Q^T\|_2} \right)^2, \quad
        Q_i = \frac{1}{d} \sum_k |h_{ik}|^p

    with norms over the :math:`n` real tokens of the example. No projection is needed when widths differ.

    Args:
        student: ``(batch, length, d_s)``.
        teacher: ``(batch, length, d_t)``.
        mask: ``(batch, length)``, 1 = real token.
        power: :math:`p`, >= 1; greater looks more at the most active neurons.
        eps: the least norm that a map is divided by.

    Returns:
        ``(batch,)`` float32, one value for each example.

    Raises:
        LmcompressError: batches or lengths differ, or ``power`` < 1.

    Reference:
        Zagoruyko & Komodakis, *Paying More Attention to Attention*, 2017, https://arxiv.org/abs/1612.03928,
        equation 2, with the mean of squares of the authors' code in place of the norm. Values are small: the
        authors weigh this by 1000.
    """
    if not power >= 1:
        raise LmcompressError(f"power must be >= 1, got {power}")
    student, teacher, valid = _states("attention_transfer", student, teacher, mask, same_width=False)
    maps = [F.normalize(h.abs().pow(power).mean(dim=-1), dim=-1, eps=eps) for h in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


@dataclass(frozen=True)
class MatchLoss:
    """A match function and what must be known to feed it and to count it.

    Calling it calls the function, with the options checked and ``causal`` passed on only where it matters.

    Attributes:
        name: its key in :data:`MATCHES`.
        function: ``f(student, teacher, mask, **options) -> (batch,)`` float32 sums.
        unit: what the sums are counted in: ``"examples"``, ``"tokens"`` or ``"pairs"``.
        feature: what it compares; ``None`` until stated with :meth:`on` where there is a choice.
        layers: how many layers of each model it takes; with 2, ``student`` and ``teacher`` are pairs of features.
        features: what it can compare.
        projectable: whether unequal widths need (and allow) a projection of the student.
    """

    name: str
    function: Callable[..., Tensor]
    unit: Unit
    feature: Feature | None
    layers: int = 1
    features: tuple[Feature, ...] = ()
    projectable: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that a user may set (not ``causal`` and ``on``, which follow from the model)."""
        return self._keywords - {"causal", "on"}

    def on(self, feature: str | None) -> MatchLoss:
        """The same match with its feature stated.

        Args:
            feature: one of :attr:`features`; ``None`` only where there is no choice.

        Returns:
            A match whose ``feature`` is set and whose function knows it.

        Raises:
            LmcompressError: the match cannot compare that feature, or there is a choice and none was made.

        Example:
            >>> MATCHES["attention_ce"].on("scores").feature
            'scores'
        """
        if feature is None and self.feature is not None:
            return self
        if feature is None:
            raise LmcompressError(
                f"the match {self.name!r} must be told what to compare: on={' or on='.join(map(repr, self.features))}"
                " (scores are before the softmax, probabilities after it)"
            )
        for known in self.features:
            if known == feature:
                function = partial(self.function, on=known) if "on" in self._keywords else self.function
                return replace(self, feature=known, function=function)
        raise LmcompressError(f"the match {self.name!r} cannot compare {feature!r}{nearest(feature, self.features)}")

    def __call__(
        self, student: Features, teacher: Features, mask: Tensor, *, causal: bool = False, **options: float
    ) -> Tensor:
        """Compares.

        Args:
            student: the captured feature, or a pair of them if :attr:`layers` is 2.
            teacher: likewise.
            mask: ``(batch, length)``, 1 = real token.
            causal: whether the models are causal; only matches of pairs look at it.
            **options: of the function, see :attr:`options`.

        Returns:
            ``(batch,)`` float32, the sum for each example in :attr:`unit`.

        Raises:
            LmcompressError: no feature was stated, an option is unknown, or the number of layers is wrong.
        """
        if self.feature is None:
            self.on(None)
        for option in options:
            if option not in self.options:
                raise LmcompressError(
                    f"the match {self.name!r} has no option {option!r}{nearest(option, self.options)}"
                    if self.options
                    else f"the match {self.name!r} has no options, got {option!r}"
                )
        for side, given in (("student", student), ("teacher", teacher)):
            count = len(given) if isinstance(given, (tuple, list)) else 1
            if count != self.layers:
                raise LmcompressError(
                    f"the match {self.name!r} takes {self.layers} layer(s) of the {side}, got {count}"
                )
        if "causal" in self._keywords:
            return self.function(student, teacher, mask, causal=causal, **options)
        return self.function(student, teacher, mask, **options)

    @property
    def _keywords(self) -> frozenset[str]:
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


_ATTENTION: tuple[Feature, ...] = ("scores", "probabilities")

_ALL = (
    MatchLoss("hidden_mse", hidden_mse, "tokens", "hidden", features=("hidden",), projectable=True),
    MatchLoss("hidden_cosine", hidden_cosine, "tokens", "hidden", features=("hidden",), projectable=True),
    MatchLoss("pkd", pkd, "examples", "hidden", features=("hidden",), projectable=True),
    MatchLoss("gram", gram, "examples", "hidden", 2, ("hidden",), projectable=True),
    MatchLoss("nst", nst, "pairs", "hidden", 2, ("hidden",)),
    MatchLoss("attention_transfer", attention_transfer, "examples", "hidden", features=("hidden",)),
    MatchLoss("attention_mse", attention_mse, "pairs", None, features=_ATTENTION),
    MatchLoss("attention_mse_mean", attention_mse_mean, "pairs", None, features=_ATTENTION),
    MatchLoss("attention_ce", attention_ce, "tokens", None, features=_ATTENTION),
    MatchLoss("attention_ce_mean", attention_ce_mean, "tokens", None, features=_ATTENTION),
    MatchLoss("minilm_attention", attention_kl, "tokens", "scores", features=("scores",)),
    MatchLoss("minilm_value", value_relation_kl, "tokens", "values", features=("values",)),
    MatchLoss("minilmv2_query", relation_kl, "tokens", "queries", features=("queries",)),
    MatchLoss("minilmv2_key", relation_kl, "tokens", "keys", features=("keys",)),
    MatchLoss("minilmv2_value", relation_kl, "tokens", "values", features=("values",)),
)

MATCHES: dict[str, MatchLoss] = {match.name: match for match in _ALL}
"""The matches by name, for recipes; ``fsp`` and ``mmd`` are TextBrewer's other names of ``gram`` and ``nst``."""
MATCHES["fsp"] = MATCHES["gram"]
MATCHES["mmd"] = MATCHES["nst"]


def match_for(name: str, on: str | None = None) -> MatchLoss:
    """The match of that name, with its feature stated.

    Args:
        name: a key of :data:`MATCHES`.
        on: the feature to compare; needed by the attention matches (``"scores"`` or ``"probabilities"``).

    Returns:
        The match, ready to be called.

    Raises:
        LmcompressError: an unknown name, or a feature that is missing or not the match's.

    Example:
        >>> match_for("attention_mse", on="scores").unit
        'pairs'
    """
    if name not in MATCHES:
        raise LmcompressError(f"unknown match {name!r}{nearest(name, MATCHES)}")
    return MATCHES[name].on(on)


def _states(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor, same_width: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in float32 with zeros at padding, the teacher's without gradient, and the boolean mask."""
    if student.dim() != 3 or teacher.dim() != 3:
        raise LmcompressError(
            f"{name} needs hidden states (batch, length, width), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_positions(name, student.shape[0], teacher.shape[0], student.shape[1], teacher.shape[1], mask)
    if same_width and student.shape[-1] != teacher.shape[-1]:
        raise LmcompressError(
            f"{name} needs states of one width, got student {student.shape[-1]} and teacher {teacher.shape[-1]}; "
            "add a projection (linear, relu or tanh) from the student's width to the teacher's"
        )
    valid = mask.bool()
    # filled, not multiplied: NaN at padding times 0 is NaN
    padding = ~valid.unsqueeze(-1)
    return student.float().masked_fill(padding, 0), teacher.detach().float().masked_fill(padding, 0), valid


def _attention(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor, causal: bool, same_heads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float32, the teacher's without gradient, and the pairs (batch, 1, length, length)."""
    for side, given in (("student", student), ("teacher", teacher)):
        if given.dim() != 4 or given.shape[2] != given.shape[3]:
            raise LmcompressError(
                f"{name} needs attention (batch, heads, length, length), got {tuple(given.shape)} from the {side}"
            )
    _check_positions(name, student.shape[0], teacher.shape[0], student.shape[2], teacher.shape[2], mask)
    if same_heads and student.shape[1] != teacher.shape[1]:
        raise LmcompressError(_unequal_heads(name, student.shape[1], teacher.shape[1]))
    return student.float(), teacher.detach().float(), _pairs(mask.bool(), causal).unsqueeze(1)


def _check_vectors(name: str, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    if student.dim() != 4 or teacher.dim() != 4:
        raise LmcompressError(
            f"{name} needs vectors of heads (batch, heads, length, size), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    _check_positions(name, student.shape[0], teacher.shape[0], student.shape[2], teacher.shape[2], mask)


def _check_positions(
    name: str, student_batch: int, teacher_batch: int, student_length: int, teacher_length: int, mask: Tensor
) -> None:
    if student_batch != teacher_batch:
        raise LmcompressError(f"{name} needs one batch, got {student_batch} examples and the teacher's {teacher_batch}")
    if student_length != teacher_length:
        raise LmcompressError(
            f"{name} compares position by position, got student length {student_length} and teacher length "
            f"{teacher_length}; different lengths mean different tokenisations, of which only logits can be matched"
        )
    if mask.shape != (student_batch, student_length):
        raise LmcompressError(
            f"the mask must have shape (batch, length) = {(student_batch, student_length)}, got {tuple(mask.shape)}"
        )


def _unequal_heads(name: str, student_heads: int, teacher_heads: int) -> str:
    mean = f"{name}_mean or " if f"{name}_mean" in MATCHES else ""
    return (
        f"{name} compares head by head, got {student_heads} heads of the student and {teacher_heads} of the teacher; "
        f"use {mean}minilmv2_query, minilmv2_key and minilmv2_value, which allow different numbers of heads"
    )


def _pairs(valid: Tensor, causal: bool) -> Tensor:
    """``(batch, length, length)`` booleans: which query/key pairs count."""
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    return pairs.tril() if causal else pairs


def _pair_distance(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    # each side is filled before the difference: a padded score may be infinite on both
    difference = student.masked_fill(~pairs, 0) - teacher.masked_fill(~pairs, 0)
    return difference.square().mean(dim=1).sum(dim=(1, 2))


def _attention_cross_entropy(student: Tensor, teacher: Tensor, pairs: Tensor, on: str, eps: float) -> Tensor:
    if on == "scores":
        log_q, p = _log_softmax(student, pairs), _log_softmax(teacher, pairs).exp()
    elif on == "probabilities":
        log_q, p = student.masked_fill(~pairs, 1).clamp(min=eps).log(), teacher.masked_fill(~pairs, 0)
    else:
        raise LmcompressError(f"on must be 'scores' or 'probabilities', got {on!r}")
    # log_q is 0 outside the pairs
    return _sum_over_queries(-p * log_q)


def _relation_divergence(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    log_q, log_p = _log_softmax(student, pairs), _log_softmax(teacher, pairs)
    # both are 0 outside the pairs, hence their difference
    return _sum_over_queries(log_p.exp() * (log_p - log_q))


def _sum_over_queries(per_pair: Tensor) -> Tensor:
    """``(batch, heads, length, length)``, 0 outside the pairs, to ``(batch,)``: mean over heads, sum over tokens."""
    return per_pair.mean(dim=1).sum(dim=(1, 2))


def _log_softmax(scores: Tensor, pairs: Tensor) -> Tensor:
    """Log softmax over the keys that count; 0 at the others."""
    # the least finite number, not -inf: a row of padding has no key at all, and would become NaN
    filled = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)
    return torch.log_softmax(filled, dim=-1).masked_fill(~pairs, 0)


def _relations(vectors: Tensor, valid: Tensor, heads: int) -> Tensor:
    """``(batch, H, length, k)`` to scaled products ``(batch, heads, length, length)``."""
    batch, _, length, _ = vectors.shape
    states = vectors.float().transpose(1, 2).reshape(batch, length, -1).masked_fill(~valid.unsqueeze(-1), 0)
    split = states.view(batch, length, heads, -1).transpose(1, 2)
    return _matmul(split, split.transpose(2, 3)) / math.sqrt(split.shape[-1])


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    # autocast would multiply in bfloat16
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
