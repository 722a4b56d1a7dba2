"""Students made from a teacher: fewer of its blocks, a smaller shape, or a shape named in a paper."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.cutting import refuse_undescribed
from lmcompress.checkpoint.structure import stock_structure
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import (
    anatomy_of,
    choose_layers_in_config,
    config_value,
    family_of,
    inner_model,
    refuse_foreign,
)
from lmcompress.families.refusal import refuse_unproven
from lmcompress.students.layers import Choice, Student, chosen_layers
from lmcompress.students.slicing import refuse_growth, slice_into

Initialisation = Literal["slice", "random"]

INITIALISATIONS: tuple[Initialisation, ...] = ("slice", "random")


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
    """A new model of the teacher's class, with a shape expressible in a stock config.

    With ``initialise="slice"`` every tensor is sliced from the teacher's, keeping entries by squared L2 norms:

    - hidden dimensions: one choice for the whole model, so that the residual stream stays one space. A dimension's
      score is the sum, over the matrices that read or write it, of its share of the matrix's squared norm;
    - heads: by the norms of their query, key, value and output weights; dimensions within a head, if heads become
      narrower: query with key by their norms together, value with output likewise;
    - neurons of the feed-forward network: by the norms of their incoming and outgoing weights together.

    Kept entries stay in the teacher's order, so an axis that does not shrink is copied unchanged, and with only
    ``layers`` given the student computes what :func:`by_layers`' does.

    Note:
        A slice of the hidden size does not compute the teacher's function: LayerNorm sees fewer dimensions and no
        weights are rescaled. It is an initialization for training. Tensors of the student that the teacher
        lacks are random, as everything is with ``initialise="random"``.

    Args:
        teacher: a model of a family that :mod:`lmcompress.families` describes; not modified. ``num_labels`` is kept.
        layers: number of blocks, or numbers of the teacher's; default: all.
        hidden_size: width of the residual stream; default: the teacher's. If ELECTRA's embeddings are as wide as
            its hidden states they follow.
        intermediate_size: number of neurons of each feed-forward network; default: proportional to the width.
        num_heads: number of attention heads of each block, of grouped queries that of key/value heads; default: as
            many as keep the teacher's head size, or else the teacher's number.
        choose: rule for blocks, if ``layers`` is a number: see :func:`choose_layers`.
        initialise: ``"slice"`` or ``"random"``; only random students can be larger than the teacher.
        seed: seed of random values; the global generator is unaffected.

    Returns:
        The student, in evaluation mode as after ``from_pretrained``, and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: If the width is not divisible by the heads, a size is not positive, a slice would have to be
            larger than the teacher's, or is to be of a model with adapters, or another library's masks or quantized
            weights, or of a hidden size below that of blocks with cross-attention, or has an encoder and a decoder.
    """
    if initialise not in INITIALISATIONS:
        raise LmcompressError(f"unknown initialisation {initialise!r}{nearest(str(initialise), INITIALISATIONS)}")
    teacher = inner_model(teacher)
    if initialise == "slice":
        refuse_foreign(teacher, "slice a student from")
    if anatomy_of(teacher).reads_encoder:
        raise LmcompressError(
            f"a student of another width is cut from one stack of blocks, and a {type(teacher).__name__} has two: take "
            "some of its layers (by_layers), or prune its heads and neurons"
        )
    blocks = anatomy_of(teacher).blocks
    if initialise == "random" and isinstance(layers, int):
        kept: tuple[int, ...] = ()
        count = _positive("layers", layers)
    else:
        kept = chosen_layers(len(blocks), len(blocks) if layers is None else layers, choose)
        count = len(kept)
    if initialise == "slice" and hidden_size not in (None, anatomy_of(teacher).hidden_size):
        refuse_undescribed(teacher)
    config = _shaped_config(teacher.config, kept or range(count), hidden_size, intermediate_size, num_heads)
    student = _built(teacher, config, seed)
    if initialise == "random":
        return Student(student, ())
    refuse_growth(anatomy_of(student).blocks[0], [blocks[i] for i in kept])
    with torch.no_grad():
        slice_into(student, teacher, kept)
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

    Parameters and matmul FLOPs of the blocks shrink by about its square.

    Args:
        teacher: a model of a family that :mod:`lmcompress.families` describes; not modified.
        multiplier: in (0, 1]; heads are rounded, at least one stays, and the width follows them.
        layers: as for :func:`by_shape`.
        choose: as for :func:`by_shape`.
        initialise: as for :func:`by_shape`.
        seed: as for :func:`by_shape`.

    Returns:
        The student and the teacher's blocks it was cut from.

    Raises:
        LmcompressError: If the multiplier is out of range, or the family cannot lose heads or hidden dimensions.

    Reference:
        Howard et al., *MobileNets*, 2017, https://arxiv.org/abs/1704.04861, section 3.3, "Width Multiplier". There the
        narrow net is trained from scratch; here it may start from a slice.
    """
    # written this way round so that NaN fails
    if not 0 < multiplier <= 1:
        raise LmcompressError(f"the width multiplier must be above 0 and at most 1, got {multiplier}")
    refuse_unproven(teacher, "students", "heads", "hidden")
    shape = stock_structure(teacher.config)
    heads = max(1, round(multiplier * shape.blocks[0].heads))
    return by_shape(
        teacher,
        layers=layers,
        hidden_size=heads * anatomy_of(teacher).hidden_size // shape.blocks[0].heads,
        intermediate_size=max(1, round(multiplier * shape.blocks[0].ffn)),
        num_heads=heads,
        choose=choose,
        initialise=initialise,
        seed=seed,
    )


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise LmcompressError(f"{name} must be at least 1, got {value}")
    return value


def _shaped_config(
    old: PretrainedConfig, layers: Sequence[int], hidden: int | None, ffn: int | None, heads: int | None
) -> PretrainedConfig:
    family = family_of(old)
    stock = stock_structure(old)
    shape, old_hidden = stock.blocks[0], int(config_value(old, family, "hidden_size"))
    hidden = _positive("hidden_size", old_hidden if hidden is None else hidden)
    if heads is None:
        # heads keep their share of the hidden size, which may differ from their width
        share = old_hidden // shape.heads
        heads = hidden // share if hidden % share == 0 else shape.heads
    _positive("num_heads", heads)
    if hidden % (heads * stock.queries):
        every = heads * stock.queries
        widths = [width for width in (hidden - hidden % every, hidden + every - hidden % every) if width]
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
    if family.embedding_size and config_value(config, family, "embedding_size") == old_hidden:
        setattr(config, family.embedding_size, hidden)
    choose_layers_in_config(config, family, layers)
    setattr(config, family.hidden_size, hidden)
    setattr(config, family.num_heads, heads * stock.queries)
    if family.key_value_heads:
        setattr(config, family.key_value_heads, heads)
    if family.head_size:
        setattr(config, family.head_size, stock.head_size)
    if ffn is None:
        ffn = max(1, round(shape.ffn * hidden / old_hidden))
    # GPT-2's None means four times the width, and stays None if that is intended
    if config_value(old, family, "intermediate_size") is not None or ffn != 4 * hidden:
        setattr(config, family.intermediate_size, _positive("intermediate_size", ffn))
    return config


def _built(teacher: PreTrainedModel, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    meta = teacher.device.type == "meta"
    # always drawn on the CPU, so that a seed gives the same student on every machine
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        student: PreTrainedModel = type(teacher)(config)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(device=teacher.device, dtype=teacher.dtype).eval()
