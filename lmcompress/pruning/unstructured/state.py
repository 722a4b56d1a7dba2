"""The state of unstructured pruning in training checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.planning import Planned


class SparsityState(nn.Module):
    """Masks, the weights behind them, scores, thresholds, and the progress of the schedule."""

    thresholds: Tensor
    done: Tensor
    seen: Tensor

    def __init__(self, planned: Sequence[Planned], config: SparsityConfig) -> None:
        super().__init__()
        self._count = len(planned)
        device = planned[0].weight.device
        self.register_buffer("thresholds", torch.zeros(self._count, device=device))
        self.register_buffer("done", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long, device=device))
        for number, one in enumerate(planned):
            weight = one.weight.detach()
            mask = weight != 0 if config.keep_zeros else torch.ones_like(weight, dtype=torch.bool)
            self.register_buffer(f"mask_{number}", mask)
            if config.keep_zeros:
                self.register_buffer(f"kept_{number}", mask.clone())
            if config.removed_is_trained:
                self.register_buffer(f"hidden_{number}", weight.clone())
            if config.chosen_criterion.in_training:
                self.register_buffer(f"scores_{number}", torch.zeros_like(weight, dtype=torch.float32))

    def masks(self) -> list[Tensor]:
        """Bool, same shape as the stored weights, False for pruned ones."""
        return self._all("mask")

    def kept(self) -> list[Tensor]:
        """Bool, False for weights that were 0 from the beginning; with ``keep_zeros``."""
        return self._all("kept")

    def hidden(self) -> list[Tensor]:
        """Weights behind the mask, after the last optimizer step; with ``train_removed``."""
        return self._all("hidden")

    def scores(self) -> list[Tensor]:
        """Running scores."""
        return self._all("scores")

    def _all(self, name: str) -> list[Tensor]:
        return [self.get_buffer(f"{name}_{number}") for number in range(self._count)]
