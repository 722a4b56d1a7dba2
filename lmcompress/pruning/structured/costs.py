"""The cost of a shape: parameters, floating-point operations, energy, or time measured on this machine.

Every cost model answers for a :class:`~lmcompress.checkpoint.schema.Structure` alone, so that thousands of shapes can
be asked about without a model: what they need of the model is read once, as :class:`ModelSizes`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.cutting import hidden_axes
from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import Anatomy, anatomy_of
from lmcompress.pruning.structured.units import Part, Units, unit_shapes

_Number = TypeVar("_Number", float, Tensor)


class CostModel(Protocol):
    """A cost model."""

    @property
    def unit(self) -> str:
        """Unit of the cost, for display."""

    def cost(self, structure: Structure) -> float:
        """The cost of a model of these shapes; monotone in every count.

        Args:
            structure: the shapes.
        """


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that analytic costs depend on, independent of families and modules.

    Attributes:
        structure: the model's shapes.
        hidden: width of the residual stream.
        head: parameters of a head for each hidden dimension, and those of its biases.
        neuron: the same of a neuron.
        block_vectors: parameters of a block per hidden dimension that belong to no head and no neuron: norms and
            biases of the two output projections.
        outside: parameters outside the blocks, as coefficients of 1, width and width².
        config: the model's, to ask what a stock model can be like.
    """

    structure: Structure
    hidden: int
    head: tuple[int, int]
    neuron: tuple[int, int]
    block_vectors: float
    outside: tuple[int, int, int]
    config: PretrainedConfig = field(compare=False, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        """Read from a model.

        Args:
            model: a model of a known family, on any device, ``meta`` too.
        """
        anatomy, structure, hidden = anatomy_of(model), structure_of(model), anatomy_of(model).hidden_size
        head, neuron = _of_a_unit(anatomy, "heads"), _of_a_unit(anatomy, "neurons")
        bare = cls(structure, hidden, head, neuron, 0.0, (0, 0, 0), model.config)
        first = sum(p.numel() for p in anatomy.blocks[0].module.parameters())
        vectors = (first - bare.block_parameters(structure.blocks[0], hidden)) / hidden
        return cls(structure, hidden, head, neuron, vectors, _outside(anatomy), copy.deepcopy(model.config))

    def width(self, structure: Structure) -> int:
        """Width of the residual stream of a structure, also if it does not name it.

        Args:
            structure: a structure cut from this model's.
        """
        return structure.hidden or self.hidden

    def block_parameters(self, shape: BlockShape, hidden: int) -> float:
        """Parameters of one block.

        Args:
            shape: heads and neurons of the block.
            hidden: width of the residual stream.
        """
        head, neuron = (hidden * rows + biases for rows, biases in (self.head, self.neuron))
        return shape.heads * head + shape.ffn * neuron + hidden * self.block_vectors

    def matrix_weights(self, shape: BlockShape, hidden: int) -> int:
        """Weights of the matrices of one block, which is also their multiply-accumulates for one token.

        Args:
            shape: heads and neurons of the block.
            hidden: width of the residual stream.
        """
        return hidden * (shape.heads * self.head[0] + shape.ffn * self.neuron[0])


@dataclass(frozen=True)
class ParameterCost:
    """Number of parameters.

    Attributes:
        sizes: sizes of the model.
        scope: ``encoder`` counts the blocks, as in CoFi and later work; ``whole`` adds embeddings and head,
            tied ones once.
    """

    sizes: ModelSizes
    scope: Literal["encoder", "whole"] = "encoder"
    unit: str = "parameters"

    def cost(self, structure: Structure) -> float:
        """Parameters of a model of these shapes, exactly.

        Args:
            structure: the shapes.
        """
        hidden = self.sizes.width(structure)
        return sum(self.sizes.block_parameters(shape, hidden) for shape in structure.blocks) + self.outside(hidden)

    def outside(self, hidden: _Number) -> _Number:
        """Parameters outside the blocks that are counted: none, or embeddings and head.

        Args:
            hidden: width of the residual stream, or its expectation, a 0-d tensor.

        Returns:
            A number or tensor, as ``hidden``.
        """
        constant, linear, square = self.sizes.outside if self.scope == "whole" else (0, 0, 0)
        return constant + hidden * (linear + square * hidden)


@dataclass(frozen=True)
class FlopCost:
    """Floating-point operations of the blocks in one forward pass, a multiplication and an addition being two.

    Matmuls only: norms, softmax and activations are below a percent of them, and embeddings are look-ups.

    Attributes:
        sizes: sizes of the model.
        batch_size: rows.
        length: tokens of a row; attention grows with its square.
    """

    sizes: ModelSizes
    batch_size: int = 1
    length: int = 128
    unit: str = "FLOPs"

    def cost(self, structure: Structure) -> float:
        """FLOPs of a model of these shapes.

        Args:
            structure: the shapes.
        """
        return float(2 * sum(_macs(self, structure, shape) for shape in structure.blocks))


@dataclass(frozen=True)
class EnergyCost:
    r"""Energy of the blocks in one forward pass, after Yang et al.: arithmetic plus data movement.

    .. math:: E = E_{comp} + E_{data}, \quad E_{data} = \sum_{level} accesses \times energy \; per \; access

    The unit is the energy of one multiply-accumulate. An access costs 1 in a register, 6 in the global buffer and 200
    in DRAM. Each multiply-accumulate reads three registers; each weight and each activation passes the buffer once per
    matrix; weights and a block's input and output come from DRAM once.

    Note:
        The paper optimises the dataflow of its accelerator layer by layer. Perfect reuse above the buffer, as here, is
        the lower bound of that; it keeps what matters for the ranking: weights that are read once for
        few tokens cost far more than their arithmetic.

    Attributes:
        sizes: sizes of the model.
        batch_size: rows.
        length: tokens of a row.

    Reference:
        Yang, Chen & Sze, *Designing Energy-Efficient Convolutional Neural Networks Using Energy-Aware Pruning*,
        CVPR 2017, https://arxiv.org/abs/1611.05128, section 4.
    """

    sizes: ModelSizes
    batch_size: int = 1
    length: int = 128
    unit: str = "energies of a multiply-accumulate"

    def cost(self, structure: Structure) -> float:
        """Energy of a model of these shapes.

        Args:
            structure: the shapes.
        """
        register, buffer, dram = 1, 6, 200
        hidden, tokens = self.sizes.width(structure), self.batch_size * self.length
        total = 0.0
        for shape in structure.blocks:
            weights = self.sizes.matrix_weights(shape, hidden)
            # queries, keys, values and the heads' output pass the buffer twice, neurons' values once per matrix
            inner = 2 * shape.heads * self.sizes.head[0] + shape.ffn * self.sizes.neuron[0]
            # input and output of the matrices, then the attention probabilities, written and read
            probabilities = 2 * shape.heads * structure.queries * self.length
            activations = tokens * (inner + 6 * hidden + probabilities)
            total += (1 + 3 * register) * _macs(self, structure, shape)
            total += buffer * (weights + activations) + dram * (weights + 2 * tokens * hidden)
        return total


def _macs(cost: FlopCost | EnergyCost, structure: Structure, shape: BlockShape) -> int:
    inner = shape.heads * structure.head_width
    tokens = cost.batch_size * cost.length
    return tokens * (cost.sizes.matrix_weights(shape, cost.sizes.width(structure)) + 2 * cost.length * inner)


def _of_a_unit(anatomy: Anatomy, part: Literal["heads", "neurons"]) -> tuple[int, int]:
    """Parameters of a unit for each hidden dimension, and those of its biases.

    Biases are those of the first block that has any such unit; if none has, they do not matter.
    """
    block = next((block for block in anatomy.blocks if block.units(part)), anatomy.blocks[0])
    table = block.coupled(part)
    biased = [coupled for coupled in table if coupled.side == "in" and block.get(coupled.part).bias is not None]
    return sum(coupled.width(1) for coupled in table), sum(coupled.width(1) for coupled in biased)


def _outside(anatomy: Anatomy) -> tuple[int, int, int]:
    inside = {id(p) for p in anatomy.block_list.parameters()}
    try:
        axes = {id(parameter): axes for parameter, axes in hidden_axes(anatomy.model).values()}
    except LmcompressError:
        # with foreign modules, hidden dimensions cannot be cut, and so nothing outside ever changes
        axes = {}
    coefficients = [0, 0, 0]
    for parameter in anatomy.model.parameters():
        if id(parameter) not in inside:
            followed = axes.get(id(parameter), ())
            coefficients[len(followed)] += parameter.numel() // anatomy.hidden_size ** len(followed)
    return coefficients[0], coefficients[1], coefficients[2]


def secant_costs(sizes: ModelSizes, cost: CostModel, parts: Collection[Part]) -> Units:
    """The mean saving per unit when all of its kind in its place are cut: the slope between all and none.

    The saving of a single unit is often zero on a measured table, where the hardware's steps are
    coarser, and a unit that saves nothing would never be pruned. For hidden dimensions, the slope between all and half.

    Args:
        sizes: sizes of the model.
        cost: a cost model.
        parts: parts to price.

    Returns:
        float64 on the CPU, never 0.
    """
    structure = sizes.structure
    dense = cost.cost(structure)
    shapes = unit_shapes(structure, sizes.hidden)

    def saved(**changes: Any) -> float:
        return dense - cost.cost(structure.model_copy(update=changes))

    def without(index: int, name: str) -> float:
        changed = structure.blocks[index].model_copy(update={name: 0})
        return saved(blocks=(*structure.blocks[:index], changed, *structure.blocks[index + 1 :]))

    def filled(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).clamp_min(1e-12 * max(dense, 1e-12))

    found: dict[Part, Tensor | tuple[Tensor, ...]] = {}
    for part in parts:
        counts = shapes[part]
        name = "heads" if part in ("heads", "attention") else "ffn"
        if part in ("heads", "neurons"):
            found[part] = tuple(filled([without(i, name) / max(1, n)] * n) for i, n in enumerate(counts))
        elif part == "hidden":
            half = max(1, counts[0] // 2)
            # a table of latencies cannot price these, and raises
            found[part] = filled([saved(hidden=half) / max(1, counts[0] - half)] * counts[0])
        elif part == "layers":
            single = counts[0] == 1
            blocks = structure.blocks
            found[part] = filled(
                [dense if single else saved(blocks=blocks[:i] + blocks[i + 1 :]) for i in range(counts[0])]
            )
        else:
            found[part] = filled([without(i, name) for i in range(counts[0])])
    return Units().updated(**found)
