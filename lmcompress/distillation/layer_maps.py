"""Layer maps from student to teacher: fixed maps, and the nearest in order.

A map is a list of ``(student_layer, teacher_layer)``. Layers are indices of hidden states: 0 is the output of the
embeddings, ``i`` that of block ``i``, counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError

LayerMap = list[tuple[int, int]]
"""``[(student_layer, teacher_layer), ...]``."""


def uniform(student_layers: int, teacher_layers: int, include_embeddings: bool = True) -> LayerMap:
    """Spreads the student's blocks evenly over the teacher's: ``k -> k * N / M``, the last to the last.

    Where ``M`` does not divide ``N``, ``k * N / M`` is rounded to the nearest block, halves up; the map stays strictly
    increasing.

    Args:
        student_layers: ``M``, the student's number of blocks.
        teacher_layers: ``N``, the teacher's, >= ``M``.
        include_embeddings: whether to start with ``(0, 0)``.

    Returns:
        ``M`` pairs, plus one for the embeddings.

    Raises:
        LmcompressError: If a number is < 1, or the student is deeper than its teacher.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, section 4.1 (``g(m) = 3m``); TextBrewer's maps
        of T6, T3 and T4-tiny.

    Example:
        >>> uniform(3, 12)
        [(0, 0), (1, 4), (2, 8), (3, 12)]
    """
    _check_depths(student_layers, teacher_layers)
    blocks = [
        (k, (2 * k * teacher_layers + student_layers) // (2 * student_layers)) for k in range(1, student_layers + 1)
    ]
    return [(0, 0), *blocks] if include_embeddings else blocks


def skip(student_layers: int, teacher_layers: int, include_last: bool = False) -> LayerMap:
    """BERT-PKD's "skip": block ``k`` learns from every ``N / M``-th block of the teacher.

    Args:
        student_layers: ``M``, the student's number of blocks.
        teacher_layers: ``N``, a multiple of ``M``.
        include_last: whether to map the last block too; the paper leaves it to the loss on logits.

    Returns:
        ``M - 1`` pairs, or ``M`` with ``include_last``.

    Raises:
        LmcompressError: If a number is < 1, or ``M`` does not divide ``N``.

    Reference:
        Sun et al., *Patient Knowledge Distillation*, 2019, https://arxiv.org/abs/1908.09355, section 3.2.

    Example:
        >>> skip(6, 12)
        [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    """
    _check_depths(student_layers, teacher_layers)
    if teacher_layers % student_layers:
        raise LmcompressError(
            f"skip takes every k-th block of the teacher, so the student's {student_layers} blocks must divide its "
            f"{teacher_layers}; use uniform, which rounds"
        )
    step = teacher_layers // student_layers
    return [(k, k * step) for k in range(1, student_layers + (1 if include_last else 0))]


def last(student_layers: int, teacher_layers: int, include_last: bool = False) -> LayerMap:
    """BERT-PKD's "last": the student's blocks learn from the last blocks of the teacher.

    Args:
        student_layers: ``M``, the student's number of blocks.
        teacher_layers: ``N``, the teacher's, >= ``M``.
        include_last: whether to map the last block too; the paper leaves it to the loss on logits.

    Returns:
        ``M - 1`` pairs, or ``M`` with ``include_last``.

    Raises:
        LmcompressError: If a number is < 1, or the student is deeper than its teacher.

    Reference:
        Sun et al., *Patient Knowledge Distillation*, 2019, https://arxiv.org/abs/1908.09355, section 3.2.

    Example:
        >>> last(6, 12)
        [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]
    """
    _check_depths(student_layers, teacher_layers)
    offset = teacher_layers - student_layers
    return [(k, k + offset) for k in range(1, student_layers + (1 if include_last else 0))]


def given(pairs: Sequence[Sequence[int]], student_layers: int, teacher_layers: int) -> LayerMap:
    """A map written by the user, checked.

    Args:
        pairs: ``(student_layer, teacher_layer)`` each; negative indices count from the last block.
        student_layers: the student's number of blocks.
        teacher_layers: the teacher's.

    Returns:
        The pairs in the given order, with negative indices resolved.

    Raises:
        LmcompressError: If there are no pairs, an entry is not a pair of integers, an index is out of range, or a pair
            is repeated.

    Example:
        >>> given([[0, 0], [-1, -1]], student_layers=4, teacher_layers=12)
        [(0, 0), (4, 12)]
    """
    if len(pairs) == 0:
        raise LmcompressError("a layer map must have at least one pair (student_layer, teacher_layer), got none")
    resolved: LayerMap = []
    for pair in pairs:
        if len(pair) != 2 or any(isinstance(i, bool) or not isinstance(i, int) for i in pair):
            raise LmcompressError(
                f"a layer map consists of pairs of integers (student_layer, teacher_layer), got {pair}"
            )
        entry = (_resolve(pair[0], student_layers, "student", pair), _resolve(pair[1], teacher_layers, "teacher", pair))
        if entry in resolved:
            raise LmcompressError(f"the layer map names the pair {entry} twice; raise its weight instead")
        resolved.append(entry)
    return resolved


def nearest_in_order(distances: Tensor, student_layers: Sequence[int], teacher_layers: Sequence[int]) -> LayerMap:
    """For each teacher layer the student layer it teaches: minimal total distance, without crossings.

    Found by dynamic programming over all strictly increasing maps; if there are fewer student than teacher
    layers, over all non-decreasing ones. Ties are broken towards earlier student layers.

    Args:
        distances: ``(len(teacher_layers), len(student_layers))`` finite, for example mean squared distances of hidden
            states; no gradient flows through the choice.
        student_layers: the candidates, increasing (in pruning: those that survive).
        teacher_layers: the layers to learn from, increasing.

    Returns:
        One pair for each teacher layer, in order.

    Raises:
        LmcompressError: If shapes do not fit, layers do not increase, there are no candidates, or
            distances are not finite.

    Reference:
        Xia, Zhong & Chen, *CoFi*, 2022, https://arxiv.org/abs/2204.00408, section 3.2 (``m(i)``).

    Note:
        The authors' order-preserving variant chooses greedily from the top; this one is globally optimal.

    Example:
        >>> nearest_in_order(torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 3.0]]), [1, 2, 3], [6, 12])
        [(2, 6), (3, 12)]
    """
    students, teachers = list(student_layers), list(teacher_layers)
    for side, layers in (("student", students), ("teacher", teachers)):
        if not layers or any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise LmcompressError(f"{side} layers must be one or more increasing indices, got {layers}")
    if distances.shape != (len(teachers), len(students)):
        raise LmcompressError(
            f"distances must have shape (teacher layers, student layers) = {(len(teachers), len(students))}, "
            f"got {tuple(distances.shape)}"
        )
    cost: list[list[float]] = distances.detach().double().cpu().tolist()
    if not torch.isfinite(distances).all():
        raise LmcompressError("distances between layers must be finite; did training diverge?")
    gap = 1 if len(students) >= len(teachers) else 0
    # best[t][s]: lowest cost of the first t + 1 teacher layers, the last of them mapped to s; prior[t][s]: the target
    # of the one before
    infinity = float("inf")
    best = [cost[0]]
    prior: list[list[int]] = [[-1] * len(students)]
    for row in cost[1:]:
        totals, origins = [infinity] * len(students), [-1] * len(students)
        cheapest = -1
        for s in range(len(students)):
            candidate = s - gap
            if candidate >= 0 and (cheapest < 0 or best[-1][candidate] < best[-1][cheapest]):
                cheapest = candidate
            if cheapest >= 0:
                totals[s], origins[s] = best[-1][cheapest] + row[s], cheapest
        best.append(totals)
        prior.append(origins)
    chosen = min(range(len(students)), key=best[-1].__getitem__)
    pairs: LayerMap = []
    for t in range(len(teachers) - 1, -1, -1):
        pairs.append((students[chosen], teachers[t]))
        chosen = prior[t][chosen]
    return pairs[::-1]


def nearest_kept(kept: Sequence[int], teacher_layers: Sequence[int]) -> LayerMap:
    """:func:`nearest_in_order` for a student cut out of its teacher, by the original depth of its blocks.

    Args:
        kept: the original teacher block (from 1) of each block of the student, increasing.
        teacher_layers: the teacher's blocks to learn from, increasing.

    Returns:
        One pair for each teacher layer; student layers are counted in the cut student.

    Raises:
        LmcompressError: If either list is empty or does not increase.

    Example:
        >>> nearest_kept([1, 2, 6, 11], [2, 5, 8, 11])
        [(1, 2), (2, 5), (3, 8), (4, 11)]
        >>> nearest_kept([2, 3, 5, 8, 11], [5, 11])
        [(3, 5), (5, 11)]
    """
    if any(b <= a for a, b in zip(kept, kept[1:], strict=False)):
        raise LmcompressError(f"kept blocks must be increasing indices of the teacher's blocks, got {list(kept)}")
    students = torch.tensor(list(kept), dtype=torch.float64)
    teachers = torch.tensor(list(teacher_layers), dtype=torch.float64)
    distances = (teachers[:, None] - students[None, :]).abs()
    return nearest_in_order(distances, range(1, len(kept) + 1), teacher_layers)


def _check_depths(student_layers: int, teacher_layers: int) -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise LmcompressError(
            f"the student must have at least one block and no more than its teacher, got {student_layers} and "
            f"{teacher_layers}; for a deeper student give the pairs yourself"
        )


def _resolve(index: int, layers: int, side: str, pair: Sequence[int]) -> int:
    resolved = index if index >= 0 else layers + 1 + index
    if not 0 <= resolved <= layers:
        raise LmcompressError(
            f"the layer map's pair {tuple(pair)} names layer {index} of the {side}, which has {layers} blocks: "
            f"it must be in [0, {layers}] (0 = embeddings) or negative from the end"
        )
    return resolved
