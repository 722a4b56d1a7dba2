"""Students with shapes named in papers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of
from lmcompress.students.layers import Choice, Student
from lmcompress.students.shape import Initialisation, by_shape


@dataclass(frozen=True)
class NamedShape:
    """The shape of a student in a paper, in absolute numbers.

    Attributes:
        layers: number of blocks.
        hidden_size: width of the residual stream.
        intermediate_size: number of neurons of each feed-forward network.
        num_heads: number of attention heads of each block.
        choose: rule for the teacher's blocks it starts from.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    choose: Choice


NAMED_SHAPES: dict[str, NamedShape] = {
    "T6": NamedShape(6, 768, 3072, 12, "first"),
    "T3": NamedShape(3, 768, 3072, 12, "first"),
    "T3-small": NamedShape(3, 384, 1536, 12, "first"),
    "T4-tiny": NamedShape(4, 312, 1200, 12, "first"),
    # the paper does not give the number of heads; 4 keep BERT's head size of 64
    "T12-nano": NamedShape(12, 256, 1024, 4, "first"),
    "DistilBERT": NamedShape(6, 768, 3072, 12, "uniform"),
    "DistilGPT2": NamedShape(6, 768, 3072, 12, "uniform"),
}
"""TextBrewer's students (Yang et al. 2020, https://arxiv.org/abs/2002.12620, table 2; T4-tiny is TinyBERT's shape),
and those of Sanh et al. 2019, https://arxiv.org/abs/1910.01108."""


def named(name: str, teacher: PreTrainedModel, *, initialise: Initialisation = "slice", seed: int = 0) -> Student:
    """A student with one of the :data:`NAMED_SHAPES`.

    The numbers are absolute and the class is the teacher's: ``"DistilBERT"`` from a BERT is a BERT with six blocks
    (with token types and pooler), not a ``DistilBertModel``.

    Args:
        name: a key of :data:`NAMED_SHAPES`.
        teacher: at least as large as the shape, unless ``initialise`` is ``"random"``.
        initialise: as for :func:`by_shape`. TextBrewer starts T6 and T3 from the teacher's first blocks.
        seed: as for :func:`by_shape`.

    Returns:
        The student and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: If the name does not exist, or the teacher is smaller than the shape.
    """
    shape = NAMED_SHAPES.get(name)
    if shape is None:
        raise LmcompressError(f"unknown student {name!r}{nearest(name, NAMED_SHAPES)}")
    blocks = anatomy_of(teacher).blocks
    sizes = {
        "layers": (shape.layers, len(blocks)),
        "hidden_size": (shape.hidden_size, anatomy_of(teacher).hidden_size),
        "intermediate_size": (shape.intermediate_size, min(block.ffn_width for block in blocks)),
    }
    short = [f"{what} {wanted} (the teacher has {there})" for what, (wanted, there) in sizes.items() if there < wanted]
    if short and initialise == "slice":
        raise LmcompressError(
            f"the shape {name!r} is absolute and this teacher is smaller: it needs {', '.join(short)}. Use a "
            "larger teacher, give numbers to by_shape, or start from initialise='random'"
        )
    return by_shape(
        teacher,
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        choose=shape.choose,
        initialise=initialise,
        seed=seed,
    )
