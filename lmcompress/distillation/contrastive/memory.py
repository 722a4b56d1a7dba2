"""The student's states smoothed over time, one slot for each token of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcompress.errors import LmcompressError


class MemoryBank(nn.Module):
    r"""The student's states smoothed over time, one slot for each token of the vocabulary.

    .. math:: q_i = m \cdot \mathrm{slot}[v_i] + (1 - m) \cdot h_i

    In an optimizer step, every occurrence of a token reads the slot as it was before the step; when the step is over
    (:meth:`commit`), the slot becomes the mean of all :math:`q_i` of the token, over all micro-batches and processes.
    So a step does not depend on how its batch was cut. A slot that nobody has written holds what is read with.

    Args:
        size: number of slots, that of the vocabulary.
        width: of a state.
        momentum: m, in [0, 1).
        device: where it lies; 4 bytes × ``size`` × ``width``.

    Raises:
        LmcompressError: the momentum is out of its range.

    Reference:
        Tao et al. 2022, https://arxiv.org/abs/2203.10705, section 4.1. How the paper's bank is addressed is not
        certain; one slot for each token of the vocabulary is the reading that fits into memory.
    """

    slots: Tensor
    written: Tensor

    def __init__(
        self, size: int, width: int, *, momentum: float = 0.5, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise LmcompressError(f"momentum must be in [0, 1), got {momentum}; at 1 no gradient reaches the student")
        self.momentum = momentum
        self.register_buffer("slots", torch.zeros(size, width, device=device))
        self.register_buffer("written", torch.zeros(size, dtype=torch.bool, device=device))
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        # a checkpoint is written between two steps, when nobody has said yet that the first is over
        self.register_state_dict_pre_hook(_commit)

    def read(self, ids: Tensor, states: Tensor) -> Tensor:
        """The smoothed states; gradient flows through the share ``1 - m`` that is new.

        Args:
            ids: ``(...)`` int64 in [0, size).
            states: ``(..., width)``.

        Returns:
            ``(..., width)`` float32.
        """
        states = states.float()
        old = torch.where(self.written[ids].unsqueeze(-1), self.slots[ids], states.detach())
        return self.momentum * old + (1 - self.momentum) * states

    def add(self, ids: Tensor, smoothed: Tensor) -> None:
        """Remember what this micro-batch has read, of all processes, for :meth:`commit`.

        Args:
            ids: ``(n,)`` int64, real tokens only.
            smoothed: ``(n, width)``, what :meth:`read` gave for them.
        """
        unique, place, counts = ids.unique(return_inverse=True, return_counts=True)
        sums = smoothed.new_zeros(len(unique), self.slots.shape[1]).index_add_(0, place, smoothed.detach().float())
        self._pending.append(_of_all_processes(unique, sums, counts))

    def commit(self) -> None:
        """Write the means of what was added since the last time."""
        if not self._pending:
            return
        ids, sums, counts = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        unique, place = ids.unique(return_inverse=True)
        total = sums.new_zeros(len(unique), sums.shape[1]).index_add_(0, place, sums)
        number = sums.new_zeros(len(unique)).index_add_(0, place, counts.to(sums.dtype))
        self.slots[unique] = (total / number.unsqueeze(-1)).to(self.slots.dtype)
        self.written[unique] = True

    def draw(self, count: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Slots at random, evenly among those that were written, with replacement.

        Args:
            count: how many.
            generator: default: the global one of the device.

        Returns:
            ``(ids (count,), states (count, width))``; none at all while nothing was written.
        """
        written = self.written.nonzero().squeeze(1)
        if not len(written):
            return written, self.slots[written]
        ids = written[torch.randint(len(written), (count,), device=written.device, generator=generator)]
        return ids, self.slots[ids]

    def extra_repr(self) -> str:
        """Sizes and momentum, for ``print``."""
        return f"{self.slots.shape[0]}, {self.slots.shape[1]}, momentum={self.momentum}"


def _commit(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, MemoryBank)
    module.commit()


def _of_all_processes(ids: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every process has, end to end in the order of the processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ids, sums, counts
    lengths = [torch.zeros(1, dtype=torch.long, device=ids.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(ids)], device=ids.device))
    sizes = [int(length) for length in lengths]
    gathered = []
    for part in (ids, sums, counts):
        # collectives take one shape from all
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)]))
    return gathered[0], gathered[1], gathered[2]
