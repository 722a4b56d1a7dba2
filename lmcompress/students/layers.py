"""Students with some of a teacher's blocks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.cutting import keep_layers
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of, inner_model, refuse_foreign
from lmcompress.families.refusal import refuse_unproven

Choice = Literal["uniform", "first", "last", "skip"]

CHOICES: tuple[Choice, ...] = ("uniform", "first", "last", "skip")


@dataclass(frozen=True)
class Student:
    """A student and the origin of its blocks.

    Attributes:
        model: every parameter trainable, on the teacher's device and in its dtype; shares no memory with the teacher.
        layers: for each block of the student the teacher's block it was made from, from 0;
            empty if nothing was copied.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]


def choose_layers(total: int, keep: int, choose: Choice = "uniform") -> tuple[int, ...]:
    """The blocks of a teacher that a student starts from.

    ========= ========================================================== ====================
    choose    rule                                                       6 of 12
    ========= ========================================================== ====================
    uniform   evenly spread, first and last included                     0, 2, 4, 7, 9, 11
    first     the first ones                                             0, 1, 2, 3, 4, 5
    last      the last ones                                              6, 7, 8, 9, 10, 11
    skip      the last one of each of ``keep`` equal groups              1, 3, 5, 7, 9, 11
    ========= ========================================================== ====================

    ``uniform`` is the choice in the code of DistilBERT and DistilGPT2 ("every second" in the paper); ``first`` is that
    of BERT-PKD and TextBrewer's T6 and T3 start; ``skip`` are the blocks whose outputs the layer maps of TextBrewer and
    TinyBERT match (2, 4, ..., 12 counted from 1), and BERT-PKD's "skip" except for the last block, which it leaves out.

    Args:
        total: number of the teacher's blocks.
        keep: number of the student's blocks, from 1 to ``total``.
        choose: the rule.

    Returns:
        Block numbers counted from 0, increasing.

    Raises:
        LmcompressError: If ``keep`` is out of range, or the rule is unknown.

    Reference:
        Sanh et al., *DistilBERT*, 2019, https://arxiv.org/abs/1910.01108, section 2; Sun et al., *Patient Knowledge
        Distillation*, 2019, https://arxiv.org/abs/1908.09355, section 3.2.

    Example:
        >>> choose_layers(12, 6)
        (0, 2, 4, 7, 9, 11)
    """
    if choose not in CHOICES:
        raise LmcompressError(f"unknown rule for choosing layers {choose!r}{nearest(str(choose), CHOICES)}")
    if not 1 <= keep <= total:
        raise LmcompressError(f"a student of this teacher can keep 1 to {total} layers, got {keep}")
    if choose == "first":
        return tuple(range(keep))
    if choose == "last":
        return tuple(range(total - keep, total))
    if choose == "skip":
        return tuple((i + 1) * total // keep - 1 for i in range(keep))
    gaps = max(keep - 1, 1)
    return tuple((2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(keep))


def by_layers(teacher: PreTrainedModel, layers: int | Sequence[int], *, choose: Choice = "uniform") -> Student:
    """A copy of the teacher with some of its blocks; embeddings and head are copied as well.

    Each block computes what it did, also where attention is scaled by the number of its block
    (``scale_attn_by_inverse_layer_idx``): what it owes to its old number is multiplied into its queries.

    Args:
        teacher: a model of a family that :mod:`lmcompress.families` describes; not modified. Its hooks are not copied.
        layers: number of blocks, or their numbers (from 0, in the desired order).
        choose: rule, if ``layers`` is a number: see :func:`choose_layers`.

    Returns:
        The student and the numbers of its blocks in the teacher. Its config has the new number of blocks.

    Raises:
        LmcompressError: If the teacher lacks a block, none is requested, it has adapters, another library's masks or
            quantized weights, or attention that is scaled by the number of its block in weights that are packed.
    """
    teacher = inner_model(teacher)
    refuse_foreign(teacher, "make a student of")
    refuse_unproven(teacher, "students", "layers")
    kept = chosen_layers(len(anatomy_of(teacher).blocks), layers, choose)
    student = copy.deepcopy(teacher, _without_hooks(teacher))
    keep_layers(student, kept)
    recorded = getattr(student.config, "quantization_config", None)
    if isinstance(recorded, CompressionConfig):
        # a compressed teacher's config describes blocks that it lacks
        student.config.quantization_config = CompressionConfig(
            structure=structure_of(student), provenance=recorded.provenance, layers=layers_of(student)
        )
    return Student(student.requires_grad_(True), kept)


def chosen_layers(total: int, layers: int | Sequence[int], choose: Choice) -> tuple[int, ...]:
    """Numbers of the blocks that a student starts from.

    Args:
        total: number of the teacher's blocks.
        layers: number of blocks, or their numbers.
        choose: rule, if ``layers`` is a number.

    Raises:
        LmcompressError: If the teacher lacks one of them, one is repeated, or there are none.
    """
    if isinstance(layers, int):
        return choose_layers(total, layers, choose)
    kept = tuple(layers)
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= total:
        raise LmcompressError(
            f"layers must be numbers from 0 to {total - 1}, at least one and without repetition; got {list(kept)}"
        )
    return kept


def _without_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` by which the copy has no hooks: a teacher's may hold tensors of its last forward."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    return memo
