"""Documents packed into one row: position ids that start again, without an attention mask.

Transformers lets such documents attend to themselves only, as if each had a row of its own. Whatever compares or counts
positions, pairs or examples must do the same: it takes the documents out of their rows first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES


@dataclass(frozen=True)
class Documents:
    """The places of packed documents, in the order in which they are packed.

    Attributes:
        rows: ``(documents, 1)`` int64, the row of each.
        places: ``(documents, longest)`` int64, the positions of its tokens in the row; 0 after its end.
        mask: ``(documents, longest)`` int64, 1 = token of the document.
        size: ``(batch, length)`` of the packed batch.
    """

    rows: Tensor
    places: Tensor
    mask: Tensor
    size: tuple[int, int]

    @property
    def begins(self) -> Tensor:
        """``(batch, length)`` bool, true at the first token of each."""
        first = torch.zeros(self.size, dtype=torch.bool, device=self.mask.device)
        first[self.rows[:, 0], self.places[:, 0]] = True
        return first

    def of_positions(self, tensor: Tensor) -> Tensor:
        """``(batch, length, ...)`` as ``(documents, longest, ...)``, padded on the right with some other value of it.

        Args:
            tensor: one value or vector for each position.
        """
        return tensor[self.rows, self.places]

    def of_heads(self, tensor: Tensor) -> Tensor:
        """``(batch, heads, length, size)`` as ``(documents, heads, longest, size)``.

        Args:
            tensor: one vector for each head and position.
        """
        return self.of_positions(tensor.transpose(1, 2)).transpose(1, 2)

    def of_pairs(self, tensor: Tensor) -> Tensor:
        """``(batch or 1, heads or 1, length, length)`` as ``(documents, heads or 1, longest, longest)``.

        Args:
            tensor: one value for each pair of positions.
        """
        pairs = tensor.expand(self.size[0], -1, -1, -1).movedim(1, -1)
        return pairs[self.rows[:, :, None], self.places[:, :, None], self.places[:, None, :]].movedim(-1, 1)

    def of_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with one document in each row and an attention mask, for which a model computes the same.

        Args:
            inputs: the packed batch; only entries with one number for each position are kept.

        Returns:
            The batch; labels after a document's end are -100, all else there is 0.
        """
        per_token = {n: value for n, value in inputs.items() if isinstance(value, Tensor) and value.shape == self.size}
        split = {
            name: self.of_positions(value).masked_fill(self.mask == 0, -100 if name == "labels" else 0)
            for name, value in per_token.items()
        }
        return split | {"attention_mask": self.mask}

    def packed(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`of_positions`.

        Args:
            tensor: ``(documents, longest, ...)``.

        Returns:
            ``(batch, length, ...)``.
        """
        valid = self.mask.bool()
        whole = tensor.new_zeros(*self.size, *tensor.shape[2:])
        whole[self.rows.expand_as(self.places)[valid], self.places[valid]] = tensor[valid]
        return whole


def documents_in(batch: Mapping[str, Any]) -> Documents | None:
    """The packed documents of a batch, recognized as Transformers does.

    Args:
        batch: model inputs.

    Returns:
        None if there is an attention mask, or no row of position ids starts again.
    """
    positions, ids = batch.get("position_ids"), batch.get("input_ids")
    if positions is None or ids is None or batch.get("attention_mask") is not None or positions.dim() != 2:
        return None
    rows, length = ids.shape
    # a document begins at the start of a row, and wherever a position does not follow the one before it
    follows = F.pad(positions.expand(rows, -1).diff(dim=-1) == 1, (1, 0), value=False)
    begins = (~follows).flatten().nonzero().squeeze(-1)
    if len(begins) == rows:
        return None
    lengths = F.pad(begins, (0, 1), value=rows * length).diff()
    offsets = torch.arange(int(lengths.max()), device=ids.device)
    valid = offsets < lengths[:, None]
    places = torch.where(valid, begins[:, None] % length + offsets, 0)
    return Documents((begins // length)[:, None], places, valid.long(), (rows, length))


def documents_of(model: nn.Module, batch: Mapping[str, Any]) -> Documents | None:
    """The packed documents of a batch, if this model keeps them apart.

    Args:
        model: any model.
        batch: its inputs.

    Returns:
        None where its tokens attend to the whole row.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return documents_in(batch) if family is not None and family.packs else None


def refuse_packed(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse a batch of packed documents where each must have a row of its own.

    Args:
        model: any model.
        batch: its inputs.

    Raises:
        LmcompressError: If there are packed documents that this model keeps apart.
    """
    if documents_of(model, batch) is not None:
        raise LmcompressError(
            "a teacher's outputs are stored by document, got several packed into one row (position_ids that start "
            "again): build the store with a collator that pads; training may pack"
        )
