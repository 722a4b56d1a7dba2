"""What a checkpoint of a quantizing training keeps beside the scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ScheduleState(nn.Module):
    """What a checkpoint needs to go on, beside the scales themselves."""

    stage: Tensor
    activations: Tensor
    curved: Tensor

    def __init__(self, scales: Mapping[str, nn.Parameter], curvatures: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("stage", "activations", "curved"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self._names = {f"start/{name.replace('.', '/')}": name for name in scales}
        self._paths = {f"curvature/{path.replace('.', '/')}": path for path in curvatures}
        for key, name in self._names.items():
            self.register_buffer(key, scales[name].detach().clone())
        for key, path in self._paths.items():
            self.register_buffer(key, torch.ones_like(curvatures[path], dtype=torch.float32))

    def starts(self) -> dict[str, Tensor]:
        """Of each scale what it was when it began, by its name."""
        return {name: self.get_buffer(key) for key, name in self._names.items()}

    def curvatures(self) -> dict[str, Tensor]:
        """By path."""
        return {path: self.get_buffer(key) for key, path in self._paths.items()}

    @torch.no_grad()
    def begin(self, scales: Mapping[str, Tensor]) -> None:
        """Take some scales as they are for their start.

        Args:
            scales: by name.
        """
        starts = self.starts()
        for name, scale in scales.items():
            starts[name].copy_(scale)
