"""Students made from a teacher: fewer of its blocks, a smaller shape, or one of the shapes that papers have named."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.structure import keep_layers, stock_structure, structure_of
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import Block, anatomy_of, config_value, family_of, weight_view

Choice = Literal["uniform", "first", "last", "skip"]
Initialisation = Literal["slice", "random"]

CHOICES: tuple[Choice, ...] = ("uniform", "first", "last", "skip")
INITIALISATIONS: tuple[Initialisation, ...] = ("slice", "random")


@dataclass(frozen=True)
class Student:
    """A student, and where its blocks come from.

    Attributes:
        model: every parameter trainable, on the teacher's device and in its dtype; shares no memory with the teacher.
        layers: for each block of the student the teacher's block that it was made from, counted from 0;
            empty where nothing was copied.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]


@dataclass(frozen=True)
class NamedShape:
    """The shape of a student as a paper gives it, in absolute numbers.

    Attributes:
        layers: number of blocks.
        hidden_size: width of the residual stream.
        intermediate_size: neurons of each feed-forward network.
        num_heads: attention heads of each block.
        choose: which of the teacher's blocks it starts from.
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
    # the paper does not say how many heads; 4 keep BERT's head size of 64
    "T12-nano": NamedShape(12, 256, 1024, 4, "first"),
    "DistilBERT": NamedShape(6, 768, 3072, 12, "uniform"),
    "DistilGPT2": NamedShape(6, 768, 3072, 12, "uniform"),
}
"""TextBrewer's students (Yang et al. 2020, https://arxiv.org/abs/2002.12620, table 2; T4-tiny is TinyBERT's shape),
and those of Sanh et al. 2019, https://arxiv.org/abs/1910.01108."""


def choose_layers(total: int, keep: int, choose: Choice = "uniform") -> tuple[int, ...]:
    """Which blocks of a teacher a student starts from.

    ========= ========================================================== ====================
    choose    rule                                                       6 of 12
    ========= ========================================================== ====================
    uniform   evenly spread, first and last included                     0, 2, 4, 7, 9, 11
    first     the first ones                                             0, 1, 2, 3, 4, 5
    last      the last ones                                              6, 7, 8, 9, 10, 11
    skip      the last one of each of ``keep`` equal groups              1, 3, 5, 7, 9, 11
    ========= ========================================================== ====================

    ``uniform`` is what the code of DistilBERT and DistilGPT2 takes ("every second" in the paper); ``first`` is where
    BERT-PKD and TextBrewer's T6 and T3 start; ``skip`` are the blocks whose outputs the layer maps of TextBrewer and
    TinyBERT match (2, 4, ..., 12 counted from 1), and BERT-PKD's "skip" but for the last block, which that leaves out.

    Args:
        total: blocks of the teacher.
        keep: blocks of the student, from 1 to ``total``.
        choose: the rule.

    Returns:
        Block numbers counted from 0, rising.

    Raises:
        LmcompressError: ``keep`` is out of range, or the rule is unknown.

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
    """A copy of the teacher with some of its blocks; embeddings and head come along.

    Args:
        teacher: of a family that :mod:`lmcompress.families` knows; left as it is. Hooks on it are not copied.
        layers: how many blocks, or which (counted from 0, in the order they are to have).
        choose: which, where ``layers`` is a number: see :func:`choose_layers`.

    Returns:
        The student and the teacher's blocks it has. Its config says how many they are.

    Raises:
        LmcompressError: blocks that the teacher does not have, or none.
    """
    kept = _layers(len(anatomy_of(teacher).blocks), layers, choose)
    student = copy.deepcopy(teacher, _without_hooks(teacher))
    keep_layers(student, kept)
    recorded = getattr(student.config, "quantization_config", None)
    if isinstance(recorded, CompressionConfig):
        # a compressed teacher's config describes blocks that have gone
        student.config.quantization_config = CompressionConfig(
            structure=structure_of(student), provenance=recorded.provenance, layers=layers_of(student)
        )
    return Student(student.requires_grad_(True), kept)


def by_shape(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_heads: int | None = None,
    choose: Choice = "uniform",
    initialise: Initialisation = "slice",
    seed: int = 0,
) -> Student:
    """A new model of the teacher's class, with a shape that a stock config can say.

    With ``initialise="slice"`` every tensor is cut out of the teacher's. What is kept is chosen by squared L2 norms:

    - hidden dimensions: one choice for the whole model, so that the residual stream stays one space. A dimension's
      score is the sum, over the matrices that read or write it, of its share of the matrix's squared norm;
    - heads: by the norms of their query, key, value and output weights; dimensions inside a head, if heads become
      narrower: query with key by their norms together, value with output likewise;
    - neurons of the feed-forward network: by the norms of their incoming and outgoing weights together.

    What is kept stays in the teacher's order, so an axis that does not shrink is copied as it is, and with only
    ``layers`` given the student computes what :func:`by_layers`' does.

    Note:
        A slice of the hidden size does not compute what the teacher computes: LayerNorm sees fewer dimensions and no
        weights are rescaled. It is a place to start training from. Where the student has a tensor that the teacher
        has not, it is random, as everything is with ``initialise="random"``.

    Args:
        teacher: of a family that :mod:`lmcompress.families` knows; left as it is. ``num_labels`` is kept.
        layers: how many blocks, or which of the teacher's; default: all.
        hidden_size: width of the residual stream; default: the teacher's. Where ELECTRA's embeddings are as wide as
            its hidden states they follow.
        intermediate_size: neurons of each feed-forward network; default: in the teacher's proportion to the width.
        num_heads: attention heads of each block; default: as many as keep the teacher's head size, or else the
            teacher's number.
        choose: which blocks, where ``layers`` is a number: see :func:`choose_layers`.
        initialise: ``"slice"`` or ``"random"``; only random students can be larger than the teacher.
        seed: of what is random; the global generator is left alone.

    Returns:
        The student, in evaluation mode as after ``from_pretrained``, and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: the width is not divisible by the heads, a size is not positive, or a slice would have to be
            larger than the teacher's.
    """
    if initialise not in INITIALISATIONS:
        raise LmcompressError(f"unknown initialisation {initialise!r}{nearest(str(initialise), INITIALISATIONS)}")
    blocks = anatomy_of(teacher).blocks
    if initialise == "random" and isinstance(layers, int):
        kept: tuple[int, ...] = ()
        count = _positive("layers", layers)
    else:
        kept = _layers(len(blocks), len(blocks) if layers is None else layers, choose)
        count = len(kept)
    config = _shaped_config(teacher.config, count, hidden_size, intermediate_size, num_heads)
    student = _built(teacher, config, seed)
    if initialise == "random":
        return Student(student, ())
    _refuse_growth(anatomy_of(student).blocks[0], [blocks[i] for i in kept])
    with torch.no_grad():
        _slice_into(student, teacher, kept)
    return Student(student, kept)


def by_width(
    teacher: PreTrainedModel,
    multiplier: float,
    *,
    layers: int | Sequence[int] | None = None,
    choose: Choice = "uniform",
    initialise: Initialisation = "slice",
    seed: int = 0,
) -> Student:
    """A student whose every width is the teacher's times one number; heads keep their size.

    Parameters and products of the blocks shrink by about the square of it.

    Args:
        teacher: of a family that :mod:`lmcompress.families` knows; left as it is.
        multiplier: in (0, 1]; heads are rounded, at least one stays, and the width follows them.
        layers: as for :func:`by_shape`.
        choose: as for :func:`by_shape`.
        initialise: as for :func:`by_shape`.
        seed: as for :func:`by_shape`.

    Returns:
        The student and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: a multiplier out of range.

    Reference:
        Howard et al., *MobileNets*, 2017, https://arxiv.org/abs/1704.04861, section 3.3, "Width Multiplier". There the
        narrow net is trained from scratch; here it may start from a slice.
    """
    # written this way round so that NaN fails
    if not 0 < multiplier <= 1:
        raise LmcompressError(f"the width multiplier must be above 0 and at most 1, got {multiplier}")
    shape = stock_structure(teacher.config)
    heads = max(1, round(multiplier * shape.blocks[0].heads))
    return by_shape(
        teacher,
        layers=layers,
        hidden_size=heads * shape.head_size,
        intermediate_size=max(1, round(multiplier * shape.blocks[0].ffn)),
        num_heads=heads,
        choose=choose,
        initialise=initialise,
        seed=seed,
    )


def named(name: str, teacher: PreTrainedModel, *, initialise: Initialisation = "slice", seed: int = 0) -> Student:
    """A student of one of the :data:`NAMED_SHAPES`.

    The numbers are absolute and the class stays the teacher's: ``"DistilBERT"`` of a BERT is a BERT of six blocks
    (with token types and pooler), not a ``DistilBertModel``.

    Args:
        name: a key of :data:`NAMED_SHAPES`.
        teacher: at least as large as the shape, unless ``initialise`` is ``"random"``.
        initialise: as for :func:`by_shape`. TextBrewer starts T6 and T3 from the teacher's first blocks.
        seed: as for :func:`by_shape`.

    Returns:
        The student and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: no such name, or the teacher is smaller than the shape.
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
            f"the shape {name!r} is absolute and this teacher is smaller: it asks for {', '.join(short)}. Take a "
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


def _layers(total: int, layers: int | Sequence[int], choose: Choice) -> tuple[int, ...]:
    if isinstance(layers, int):
        return choose_layers(total, layers, choose)
    kept = tuple(layers)
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= total:
        raise LmcompressError(
            f"layers must be numbers from 0 to {total - 1}, at least one and none twice; got {list(kept)}"
        )
    return kept


def _without_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` with which the copy has no hooks: a teacher's may hold tensors of its last forward."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    return memo


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise LmcompressError(f"{name} must be at least 1, got {value}")
    return value


def _shaped_config(
    old: PretrainedConfig, layers: int, hidden: int | None, ffn: int | None, heads: int | None
) -> PretrainedConfig:
    family = family_of(old)
    stock = stock_structure(old)
    shape, old_hidden = stock.blocks[0], int(config_value(old, family, "hidden_size"))
    hidden = _positive("hidden_size", old_hidden if hidden is None else hidden)
    if heads is None:
        heads = hidden // stock.head_size if hidden % stock.head_size == 0 else shape.heads
    _positive("num_heads", heads)
    if hidden % heads:
        widths = [width for width in (hidden - hidden % heads, hidden + heads - hidden % heads) if width]
        counts = [number for number in range(1, hidden + 1) if hidden % number == 0]
        raise LmcompressError(
            f"hidden_size {hidden} is not divisible by {heads} heads. Nearest widths for {heads} heads: "
            f"{' or '.join(map(str, widths))}; nearest number of heads for width {hidden}: "
            f"{min(counts, key=lambda number: abs(number - heads))}"
        )
    config = copy.deepcopy(old)
    if getattr(config, "quantization_config", None) is not None:
        # it describes the teacher's shapes; a student of by_shape is stock
        del config.quantization_config
    if getattr(config, "embedding_size", None) == old_hidden:
        config.embedding_size = hidden
    setattr(config, family.num_layers, layers)
    setattr(config, family.hidden_size, hidden)
    setattr(config, family.num_heads, heads)
    if ffn is None:
        ffn = max(1, round(shape.ffn * hidden / old_hidden))
    # GPT-2's None means four times the width, and stays None where that is what is meant
    if config_value(old, family, "intermediate_size") is not None or ffn != 4 * hidden:
        setattr(config, family.intermediate_size, _positive("intermediate_size", ffn))
    return config


def _built(teacher: PreTrainedModel, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    meta = teacher.device.type == "meta"
    # always drawn on the CPU, so that a seed means the same student on every machine
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        student: PreTrainedModel = type(teacher)(config)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(device=teacher.device, dtype=teacher.dtype).eval()


def _refuse_growth(new: Block, old: Sequence[Block]) -> None:
    sizes = {
        "num_heads": (new.num_heads, min(block.num_heads for block in old)),
        "the width of a head": (new.head_size, min(block.head_size for block in old)),
        "intermediate_size": (new.ffn_width, min(block.ffn_width for block in old)),
    }
    for what, (wanted, there) in sizes.items():
        if wanted > there:
            raise LmcompressError(
                f"a slice cannot be larger than the teacher: {what} would be {wanted}, the teacher's blocks have "
                f"{there}. Ask for at most {there}, or use initialise='random'"
            )


def _slice_into(student: PreTrainedModel, teacher: PreTrainedModel, kept: Sequence[int]) -> None:
    new, old = anatomy_of(student), anatomy_of(teacher)
    if new.hidden_size > old.hidden_size:
        raise LmcompressError(
            f"a slice cannot be wider than the teacher: hidden_size {new.hidden_size}, the teacher has "
            f"{old.hidden_size}. Use initialise='random'"
        )
    chosen = [old.blocks[i] for i in kept]
    hidden = _best(_hidden_scores(teacher, chosen), new.hidden_size)
    inside = {id(parameter) for parameter in new.block_list.parameters()}
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in student.named_parameters():
        if id(parameter) not in inside and name in theirs:
            parameter.copy_(_cut_hidden(theirs[name], parameter.shape, hidden, name))
    for block, source in zip(new.blocks, chosen, strict=True):
        _slice_block(block, source, hidden)


def _slice_block(new: Block, old: Block, hidden: Tensor) -> None:
    family = old.family
    axes = _attention_axes(new, old)
    neurons = _best(_squares(old.get("ffn_in"), 0) + _squares(old.get("ffn_out"), 1), new.ffn_width)
    axes |= {"ffn_in": (neurons, None), "ffn_out": (None, neurons)}
    done = set()
    for part, (rows, columns) in axes.items():
        target, source = new.get(part), old.get(part)
        rows, columns = hidden if rows is None else rows, hidden if columns is None else columns
        weight_view(target).copy_(weight_view(source)[rows][:, columns])
        if isinstance(source.bias, Tensor):
            assert isinstance(target.bias, Tensor)
            target.bias.copy_(source.bias[rows])
        done.add(getattr(family, part))
    theirs = dict(old.module.named_parameters())
    for name, parameter in new.module.named_parameters():
        if name.rpartition(".")[0] not in done:
            parameter.copy_(_cut_hidden(theirs[name], parameter.shape, hidden, name))


def _attention_axes(new: Block, old: Block) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """For each matrix of attention the rows and columns to keep; None for the hidden size's own."""
    heads, size = old.num_heads, old.head_size
    width = heads * size
    if old.family.qkv:
        norms = list(_squares(old.get("qkv"), 0).split(width))
    else:
        norms = [_squares(old.get(part), 0) for part in ("query", "key", "value")]
    scores = (norms[0] + norms[1]).view(heads, size)
    contents = (norms[2] + _squares(old.get("attention_out"), 1)).view(heads, size)
    best = _best((scores + contents).sum(1), new.num_heads)
    queries, values = (
        (best[:, None] * size + _best(norm[best], new.head_size)).flatten() for norm in (scores, contents)
    )
    axes: dict[str, tuple[Tensor | None, Tensor | None]] = {"attention_out": (None, values)}
    if old.family.qkv:
        return axes | {"qkv": (torch.cat([queries, queries + width, values + 2 * width]), None)}
    return axes | {"query": (queries, None), "key": (queries, None), "value": (values, None)}


def _hidden_scores(teacher: PreTrainedModel, blocks: Sequence[Block]) -> Tensor:
    embeddings = anatomy_of(teacher).embedding("word_embeddings")
    hidden = anatomy_of(teacher).hidden_size
    total = torch.zeros(hidden, device=teacher.device)
    # ELECTRA's embeddings may have a width of their own
    table = None if embeddings is None else embeddings.weight
    if isinstance(table, Tensor) and table.shape[1] == hidden:
        total += _share(table.detach().float().square().sum(0))
    for block in blocks:
        for part, axis in (("qkv", 1), ("query", 1), ("key", 1), ("value", 1), ("ffn_in", 1)):
            if getattr(block.family, part):
                total += _share(_squares(block.get(part), axis))
        for part in ("attention_out", "ffn_out"):
            total += _share(_squares(block.get(part), 0))
    return total


def _squares(module: nn.Module, axis: int) -> Tensor:
    """The squared norm of each row (``axis`` 0) or column (1) of a matrix seen as ``(out, in)``."""
    return weight_view(module).detach().float().square().sum(1 - axis)


def _share(squares: Tensor) -> Tensor:
    return squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def _best(scores: Tensor, keep: int) -> Tensor:
    """Places of the ``keep`` highest scores on the last axis, rising; of equal scores the first ones."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values


def _cut_hidden(source: Tensor, shape: torch.Size, hidden: Tensor, name: str) -> Tensor:
    """``source`` cut to ``shape``: outside a block's matrices, the axes that differ are of the hidden size."""
    for axis, (old, new) in enumerate(zip(source.shape, shape, strict=True)):
        if old != new:
            if new != len(hidden) or old <= new:
                raise LmcompressError(f"{name} has shape {tuple(source.shape)} in the teacher, {tuple(shape)} here")
            source = source.index_select(axis, hidden)
    return source


__all__ = [
    "CHOICES",
    "INITIALISATIONS",
    "NAMED_SHAPES",
    "Choice",
    "Initialisation",
    "NamedShape",
    "Student",
    "by_layers",
    "by_shape",
    "by_width",
    "choose_layers",
    "named",
]
