"""The state of quantization-aware training in a checkpoint, besides the scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.quantization.fake import FakeQuantized


class ScheduleState(nn.Module):
    """The state a checkpoint needs to resume, besides the scales themselves."""

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
        """The initial value of each scale, by its name."""
        return {name: self.get_buffer(key) for key, name in self._names.items()}

    def curvatures(self) -> dict[str, Tensor]:
        """By path."""
        return {path: self.get_buffer(key) for key, path in self._paths.items()}

    @torch.no_grad()
    def begin(self, scales: Mapping[str, Tensor]) -> None:
        """Record the current values of some scales as their start.

        Args:
            scales: by name.
        """
        starts = self.starts()
        for name, scale in scales.items():
            starts[name].copy_(scale)

    @torch.no_grad()
    def measure_curvature(self, faked: FakeQuantized, optimizer: Any) -> None:
        """Weight squared errors by the square root of Adam's second moments, with bias correction.

        Args:
            faked: the fake-quantized model, whose quantizers may take a curvature.
            optimizer: the optimizer of its weights, not wrapped.
        """
        second, eps = optimizer.defaults["betas"][1], optimizer.defaults.get("eps", 1e-8)
        for path, curvature in self.curvatures().items():
            state = optimizer.state.get(faked.parameter(path), {})
            moments = state.get("exp_avg_sq")
            if moments is None:
                # frozen, or no gradient yet
                curvature.fill_(1.0)
            else:
                # above 0, for tokens that no batch had
                curvature.copy_((moments / (1 - second ** float(state["step"]))).sqrt() + eps)
        self.curved.fill_(1)
        faked.set_curvature(self.curvatures())

    @torch.no_grad()
    def drift(self, faked: FakeQuantized) -> dict[str, float]:
        """Relative change of scales and ranges since their start: means by kind of module, for the log.

        Args:
            faked: the fake-quantized model.
        """
        parts = {matrix.path: matrix.part or matrix.path for matrix in faked.plan.matrices}
        readers = {fake.name: parts[path] for path, fake in reversed(faked.inputs.items())}
        starts = self.starts()
        groups: dict[str, list[Tensor]] = {}
        for name, scale in faked.scales().items():
            if name in parts:
                group = f"scale_drift_{parts[name]}"
            else:
                activation = name.rpartition(".")[0]
                group = f"range_drift_{readers.get(activation) or activation.rpartition('.')[2]}"
            start = starts[name]
            ratio = (scale - start).abs() / start.abs()
            groups.setdefault(group, []).append(ratio[start != 0].float().mean())
        means = torch.stack([torch.stack(values).nanmean() for values in groups.values()]).tolist() if groups else []
        return {name: value for name, value in zip(groups, means, strict=True) if value == value}
