"""Units: one number for each part of a model that can be cut, such as a mask, a score, a gate value or a cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of
from lmcompress.families.refusal import refuse_unproven

Part = Literal["heads", "neurons", "attention", "ffn", "layers", "hidden"]
PARTS: tuple[Part, ...] = ("heads", "neurons", "attention", "ffn", "layers", "hidden")

PER_BLOCK: tuple[Part, ...] = ("heads", "neurons")


@dataclass(frozen=True, eq=False)
class Units:
    """One number for each unit of a model that can be cut: a mask (bool, True is kept), a score, a gate value, a cost.

    A part that is not used is None; a mask keeps all of it. The meaning of False in a mask:

    - ``heads[b][h]``: the head's output, the columns of the attention's output projection that read it, is zero;
    - ``neurons[b][j]``: the input of the second matrix of the feed-forward network from this neuron is zero;
    - ``attention[b]``, ``ffn[b]``: the output of the sub-layer's last projection, bias included, is zero; the modules
      after it (dropout, residual connection, LayerNorm) stay;
    - ``layers[b]``: the output of the block is its input;
    - ``hidden[d]``: dimension d of the residual stream is cut from embeddings, matrices, norms and the inside of the
      task's head; norms average over the remaining dimensions.

    Attributes:
        heads: one tensor for each block, ``(heads of the block,)``.
        neurons: one tensor for each block, ``(neurons of the block,)``.
        attention: ``(blocks,)``.
        ffn: ``(blocks,)``.
        layers: ``(blocks,)``.
        hidden: ``(hidden size,)``.

    Per-example gate values have a batch axis in front.
    """

    heads: tuple[Tensor, ...] | None = None
    neurons: tuple[Tensor, ...] | None = None
    attention: Tensor | None = None
    ffn: Tensor | None = None
    layers: Tensor | None = None
    hidden: Tensor | None = None

    def parts(self) -> tuple[Part, ...]:
        """The parts that are not None, in the order of :data:`PARTS`."""
        return tuple(part for part in PARTS if getattr(self, part) is not None)

    def tensors(self, part: Part) -> tuple[Tensor, ...]:
        """The tensors of one part: one for each block of heads and neurons, one tensor otherwise; none if it is None.

        Args:
            part: one of :data:`PARTS`.
        """
        value = getattr(self, part)
        if value is None:
            return ()
        return tuple(value) if part in PER_BLOCK else (value,)

    def items(self) -> Iterator[tuple[Part, int, Tensor]]:
        """Every tensor with its part and its block.

        Yields:
            ``(part, block, tensor)``; the block is 0 for the parts that have one tensor for the whole model.
        """
        for part in self.parts():
            for index, tensor in enumerate(self.tensors(part)):
                yield part, index, tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Units:
        """A function applied to every tensor.

        Args:
            f: from tensor to tensor.

        Returns:
            The results, in the same parts.
        """
        return _build({part: [f(tensor) for tensor in self.tensors(part)] for part in self.parts()})

    def zip(self, other: Units, f: Callable[[Tensor, Tensor], Tensor]) -> Units:
        """A function applied to every pair of tensors of these and other units.

        Args:
            other: units of the same model; parts that only one of the two has are dropped.
            f: from two tensors to one.

        Returns:
            The results, in the parts that both have.

        Raises:
            LmcompressError: If the numbers of blocks differ.
        """
        both = [part for part in self.parts() if getattr(other, part) is not None]
        for part in both:
            if len(self.tensors(part)) != len(other.tensors(part)):
                raise LmcompressError(
                    f"{part} must have the same number of blocks on both sides, got {len(self.tensors(part))} and "
                    f"{len(other.tensors(part))}: these units are of two different models, or of one before and after "
                    "a cut"
                )
        return _build(
            {part: [f(a, b) for a, b in zip(self.tensors(part), other.tensors(part), strict=True)] for part in both}
        )

    def updated(self, **parts: Tensor | tuple[Tensor, ...] | None) -> Units:
        """The same units with some parts replaced.

        Args:
            **parts: new values by part.

        Raises:
            LmcompressError: If a part does not exist.
        """
        for name in parts:
            _known(name)
        return replace(self, **parts)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name: ``"heads.0"``, ``"heads.1"``, ``"attention"``…"""
        return {f"{part}.{i}" if part in PER_BLOCK else part: tensor for part, i, tensor in self.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Units:
        """The inverse of :meth:`state_dict`.

        Args:
            state: tensors by name.

        Raises:
            LmcompressError: If a name is not one of them, or a block is missing.
        """
        found: dict[str, dict[int, Tensor]] = {}
        for name, tensor in state.items():
            part, _, number = name.partition(".")
            _known(part)
            if (part in PER_BLOCK) != number.isdecimal():
                raise LmcompressError(f"units are named like heads.0 or attention, got {name!r}: not a state of units")
            found.setdefault(part, {})[int(number or 0)] = tensor
        for part, tensors in found.items():
            if sorted(tensors) != list(range(len(tensors))):
                raise LmcompressError(
                    f"{part} must exist for every block from 0, got blocks {sorted(tensors)}: the state is incomplete"
                )
        return _build({part: [tensors[i] for i in range(len(tensors))] for part, tensors in found.items()})


def full(
    model: PreTrainedModel,
    parts: Collection[Part],
    value: float | bool = True,
    dtype: torch.dtype = torch.bool,
) -> Units:
    """Units of a model's current shapes, all with one value.

    Args:
        model: a model of a known family.
        parts: parts to include; the others are None.
        value: value of every unit.
        dtype: dtype of the tensors.

    Returns:
        Tensors on the CPU.

    Raises:
        LmcompressError: If a part does not exist, or the model's family cannot lose it.
    """
    for part in parts:
        _known(part)
    refuse_unproven(model, *parts)
    shapes = unit_shapes(structure_of(model), anatomy_of(model).hidden_size)
    wanted = [part for part in PARTS if part in parts]
    return _build({part: [torch.full((n,), value, dtype=dtype) for n in shapes[part]] for part in wanted})


def unit_shapes(structure: Structure, hidden: int) -> dict[Part, tuple[int, ...]]:
    """Number of units of each tensor of each part.

    Args:
        structure: shapes of the model.
        hidden: width of its residual stream.
    """
    count = len(structure.blocks)
    return {
        "heads": tuple(block.heads for block in structure.blocks),
        "neurons": tuple(block.ffn for block in structure.blocks),
        "attention": (count,),
        "ffn": (count,),
        "layers": (count,),
        "hidden": (hidden,),
    }


def check_units(units: Units, shapes: Mapping[Part, tuple[int, ...]], what: str, *, batched: bool = False) -> None:
    """Refuse units that do not have a model's shapes.

    Args:
        units: units to check.
        shapes: from :func:`unit_shapes`.
        what: name of the units in the message.
        batched: whether tensors may have a batch axis in front.

    Raises:
        LmcompressError: If the tensors of a part differ in number or shape from the model's.
    """
    for part in units.parts():
        tensors, wanted = units.tensors(part), shapes[part]
        found = tuple(tuple(tensor.shape) for tensor in tensors)
        fits = [
            (tensor.dim() == 1 or (batched and tensor.dim() == 2)) and tensor.shape[-1] == n
            for tensor, n in zip(tensors, wanted, strict=False)
        ]
        if len(tensors) != len(wanted) or not all(fits):
            expected = tuple((n,) for n in wanted)
            raise LmcompressError(
                f"{what} of {part} must have the model's shapes {_shapes(expected, part)}, got {_shapes(found, part)}; "
                "take them from the current model, for example with full(model, parts)"
            )


def masked_structure(structure: Structure, mask: Units) -> Structure:
    """The shapes of a model once it is cut by a mask, computed without a model.

    Args:
        structure: the original shapes.
        mask: bool, True is kept.

    Returns:
        The new shapes. A block whose attention or feed-forward network is masked as a whole has 0 heads or neurons.
        If blocks are dropped, the remaining ones carry their original numbers.

    Raises:
        LmcompressError: If the mask is not bool, has other shapes, or keeps no block or no hidden dimension.
    """
    for part, _, tensor in mask.items():
        if tensor.dtype != torch.bool:
            raise LmcompressError(f"a mask must be bool, got {tensor.dtype} for {part}; compare with a threshold")
    width = len(mask.hidden) if mask.hidden is not None and structure.hidden is None else structure.hidden or 0
    check_units(mask, unit_shapes(structure, width), "a mask")
    if mask.layers is not None and not mask.layers.any():
        raise LmcompressError("a mask must keep at least one of the layers, got none; a model needs a block")
    if mask.hidden is not None and not mask.hidden.any():
        raise LmcompressError("a mask must keep at least one hidden dimension, got none")
    dropped = mask.layers is not None and not bool(mask.layers.all())
    blocks = []
    for index, block in enumerate(structure.blocks):
        if mask.layers is not None and not mask.layers[index]:
            continue
        heads = block.heads if mask.heads is None else int(mask.heads[index].sum())
        ffn = block.ffn if mask.neurons is None else int(mask.neurons[index].sum())
        blocks.append(
            BlockShape(
                heads=0 if mask.attention is not None and not mask.attention[index] else heads,
                ffn=0 if mask.ffn is not None and not mask.ffn[index] else ffn,
                source=index if dropped and block.source is None else block.source,
            )
        )
    hidden, encoder = structure.hidden, structure.encoder
    if encoder is not None and mask.layers is not None:
        encoder = int(mask.layers[: structure.encoder].sum())
        if not 0 < encoder < len(blocks):
            raise LmcompressError(
                f"a mask must keep at least one of the layers of each stack, got {encoder} of the encoder and "
                f"{len(blocks) - encoder} of the decoder"
            )
    if mask.hidden is not None and not bool(mask.hidden.all()):
        hidden = int(mask.hidden.sum())
    return structure.model_copy(update={"blocks": tuple(blocks), "hidden": hidden, "encoder": encoder})


def _known(part: str) -> None:
    if part not in PARTS:
        raise LmcompressError(f"unknown part {part!r}{nearest(part, PARTS)}")


def _build(values: Mapping[str, list[Tensor]]) -> Units:
    given: dict[str, Any] = {
        part: tuple(tensors) if part in PER_BLOCK else tensors[0] for part, tensors in values.items()
    }
    return Units(**given)


def _shapes(shapes: tuple[tuple[int, ...], ...], part: str) -> str:
    return str(list(shapes)) if part in PER_BLOCK else str(shapes[0])


def assembled(model: PreTrainedModel, parts: Sequence[Part], values: Mapping[tuple[Part, int], Tensor]) -> Units:
    """Units of the model's shapes from values by part and block; a block without any has no units."""
    blocks = len(anatomy_of(model).blocks)
    made: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for part in parts:
        if part == "hidden":
            made[part] = values[part, 0].float().cpu()
            continue
        tensors = [values.get((part, i), torch.zeros(0)).float().cpu() for i in range(blocks)]
        made[part] = tuple(tensors) if part in PER_BLOCK else torch.cat(tensors)
    return Units().updated(**made)
