"""Small networks that are not of transformers, in the form that the trainer takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A classifier of vectors or images: ``forward(pixel_values, labels=None)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp(activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(nn.Linear(12, 16), activation(), nn.Linear(16, 8), activation(), nn.Linear(8, 3))


def convolutional(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def rows(count: int = 32, *, image: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Examples whose label can be told from their input."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        label = row % 3
        shape = (1, 12, 12) if image else (12,)
        x = torch.randn(shape, generator=generator) * 0.5
        x.reshape(-1)[label * 4 : label * 4 + 4] += 2.0
        made.append({"pixel_values": x, "labels": torch.tensor(label)})
    return made


def batches(examples: list[dict[str, Tensor]], size: int = 8) -> list[dict[str, Tensor]]:
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [{name: torch.stack([row[name] for row in chunk]) for name in chunk[0]} for chunk in chunks]
