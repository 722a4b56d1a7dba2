"""What the benchmarks on MNIST share: the data, the networks of the papers, and their training in the one loop.

The networks are ordinary modules whose ``forward(pixel_values, labels=None)`` gives ``loss`` and ``logits``, which is
all that :class:`~lmcompress.trainers.CompressionTrainer` needs; methods such as ``Sparsity`` and ``WeightSharing`` are
given to :func:`train`. Images are standardised by the mean and deviation of the training set. Where nothing else is
said, what is counted are errors among the 10 000 test images after the last step, and no epoch is chosen by them.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import PrinterCallback, TrainingArguments, set_seed

# benchmarks/ itself, for what its scripts share
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import training_parser

from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.trainers import CompressionTrainer

MEAN, DEVIATION = 0.1307, 0.3081
QUICK_ROWS = 1000


class Images(Dataset[dict[str, Tensor]]):
    """Images and labels, handed out a batch at a time.

    Args:
        pixels: ``(rows, 1, 28, 28)`` uint8.
        labels: ``(rows,)`` int64.
        jitter: greatest shift, in pixels, by which each image is moved along both axes whenever it is taken.
        columns: what else belongs to each row, such as ``teacher_logits``, which methods see and networks do not.
        mean: that is taken from the pixels: one number, or ``(1, 28, 28)``.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, jitter: int = 0, columns: Mapping[str, Tensor] | None = None,
        mean: float | Tensor = MEAN,
    ) -> None:  # fmt: skip
        self.pixels, self.labels, self.jitter, self.columns = pixels, labels, jitter, dict(columns or {})
        self.mean = mean

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        pixels = self.pixels[rows]
        if self.jitter:
            pixels = _shifted(pixels, self.jitter)
        found = {"pixel_values": (pixels.float() / 255 - self.mean) / DEVIATION, "labels": self.labels[rows]}
        return found | {name: values[rows] for name, values in self.columns.items()}

    def jittered(self, jitter: int) -> Images:
        """The same images, shifted by up to so many pixels."""
        return Images(self.pixels, self.labels, jitter=jitter, columns=self.columns, mean=self.mean)

    def with_columns(self, **columns: Tensor) -> Images:
        """The same images with more columns."""
        return Images(self.pixels, self.labels, jitter=self.jitter, columns=self.columns | columns, mean=self.mean)


@dataclass(frozen=True)
class Data:
    """MNIST as it is distributed: 60 000 rows to train on, 10 000 to test with."""

    train: Images
    test: Images

    def centred(self) -> Data:
        """The same rows, each pixel with its own mean over the training rows (LeCun et al. 1998, §4.3)."""
        mean = self.train.pixels.float().mean(0) / 255
        splits = (Images(rows.pixels, rows.labels, mean=mean) for rows in (self.train, self.test))
        return Data(*splits)


def load(folder: Path, *, quick: bool = False) -> Data:
    """Read the four files of ``folder/mnist``.

    Args:
        folder: the data folder that ``--data`` names.
        quick: a thousand rows of each instead of all.
    """
    splits = []
    for name in ("train", "t10k"):
        pixels = _idx(folder / "mnist" / f"{name}-images-idx3-ubyte.gz", (28, 28)).unsqueeze(1)
        labels = _idx(folder / "mnist" / f"{name}-labels-idx1-ubyte.gz", ()).long()
        rows = QUICK_ROWS if quick else len(labels)
        splits.append(Images(pixels[:rows], labels[:rows]))
    return Data(*splits)


class Network(nn.Module):
    """A classifier in the form that the trainer takes.

    Args:
        layers: from ``(batch, 1, 28, 28)`` to ``(batch, 10)``.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp(widths: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0) -> Network:
    """ReLU layers of the given widths between 784 inputs and 10 outputs: ``(300, 100)`` is LeNet-300-100.

    Args:
        widths: of the hidden layers.
        dropout: after each hidden layer.
        input_dropout: of the pixels.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    if input_dropout:
        layers.append(nn.Dropout(input_dropout))
    sizes = [784, *widths]
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return Network(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)))


def lenet_300_100() -> Network:
    """LeCun et al. 1998: 784-300-100-10, 266 610 parameters."""
    return mlp((300, 100))


def lenet_5(filters: Sequence[int] = (20, 50), width: int = 500) -> Network:
    """Caffe's LeNet-5, which the papers on pruning use: 5 × 5 filters, 20-50-500-10, 431 080 parameters.

    Args:
        filters: of the two convolutions.
        width: of the hidden layer.
    """
    first, second = filters
    convolutions = [nn.Conv2d(1, first, 5), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(second * 16, width), nn.ReLU(), nn.Linear(width, 10)]
    return Network(nn.Sequential(*convolutions, *head))


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


@contextmanager
def dropout(network: nn.Module, pixels: float, hidden: float) -> Iterator[None]:
    """Within this, a network whose layers have no dropout of their own is trained with it; layers keep their names.

    Args:
        network: trained inside the ``with``.
        pixels: share of the inputs of the first layer that is dropped.
        hidden: of the inputs of all linear layers after it; convolutions after the first see everything.
    """

    def drop(module: nn.Module, inputs: tuple[Tensor], share: float) -> tuple[Tensor]:
        return (F.dropout(inputs[0], share, module.training),)

    first, *others = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    linears = [module for module in others if isinstance(module, nn.Linear)]
    shares = [(first, pixels), *((module, hidden) for module in linears)]
    handles = [module.register_forward_pre_hook(partial(drop, share=share)) for module, share in shares]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(
    network: nn.Module,
    rows: Images,
    folder: Path,
    *,
    epochs: float,
    learning_rate: float,
    seed: int = 0,
    batch_size: int = 100,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    optimizer: str = "adamw_torch",
    methods: Sequence[Method] = (),
    trainer_class: type[CompressionTrainer] = CompressionTrainer,
    finish: bool = True,
    **arguments: Any,
) -> CompressionTrainer:
    """Train a network for a fixed number of epochs, and let the methods make their work permanent.

    Args:
        network: changed in place.
        rows: that it is trained on.
        folder: for what the trainer writes.
        epochs: passes over the rows.
        learning_rate: at its greatest.
        seed: of the order of the rows and of dropout.
        batch_size: rows of an optimizer step.
        weight_decay: decoupled (AdamW); plain L2 with ``optimizer="sgd"``.
        schedule: of the learning rate, as transformers names it.
        optimizer: likewise.
        methods: of compression.
        trainer_class: of the loop.
        finish: whether to call the trainer's ``finish()``.
        **arguments: to ``TrainingArguments``.

    Returns:
        The trainer.
    """
    set_seed(seed)
    given: dict[str, Any] = dict(
        output_dir=str(folder), num_train_epochs=epochs, learning_rate=learning_rate, seed=seed, data_seed=seed,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=1000, weight_decay=weight_decay,
        lr_scheduler_type=schedule, optim=optimizer, max_grad_norm=0.0, report_to="none", save_strategy="no",
        logging_steps=200, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    args = TrainingArguments(**(given | arguments))
    trainer = trainer_class(
        network, args, methods=methods, train_dataset=rows, data_collator=collate, auto_finish=finish
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def collate(rows: Any) -> dict[str, Tensor]:
    """A batch as :class:`Images` hands it out, or one made of single rows."""
    return rows if isinstance(rows, dict) else default_collate(rows)


@torch.no_grad()
def logits_of(network: nn.Module, rows: Images) -> Tensor:
    """What the network says of each row, ``(rows, 10)`` on the CPU."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    starts = range(0, len(rows), 1000)
    batches = (rows.__getitems__(range(start, min(start + 1000, len(rows))))["pixel_values"] for start in starts)
    found = torch.cat([network(pixels.to(device))["logits"].cpu() for pixels in batches])
    network.train(training)
    return found


def errors(network: nn.Module, rows: Images) -> int:
    """How many of the rows are put into a wrong class."""
    return int((logits_of(network, rows).argmax(-1) != rows.labels).sum())


def parser(description: str | None) -> Any:
    """The options that all benchmarks of this folder have."""
    made = training_parser(description, "mnist/*.gz")
    made.add_argument("--seeds", type=int, default=1)
    return made


def _shifted(pixels: Tensor, jitter: int) -> Tensor:
    """Each image moved by up to ``jitter`` pixels along both axes; what comes in is background."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (jitter, jitter, jitter, jitter))[:, 0]
    down, right = (torch.randint(0, 2 * jitter + 1, (count, 1, 1)) for _ in range(2))
    rows, columns = down + torch.arange(height)[:, None], right + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows, columns].unsqueeze(1)


def _idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of a file of LeCun's format: magic number, sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise LmcompressError(
            f"{path} must be a file of MNIST, {error}; --data names the folder that holds mnist/"
        ) from error
    axes = raw[3]
    sizes = tuple(np.frombuffer(raw, ">u4", axes, 4).tolist())
    if raw[:3] != b"\x00\x00\x08" or sizes[1:] != shape:
        raise LmcompressError(f"{path} must hold bytes of shape (rows, {shape}), got {sizes}: it is not MNIST")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes).copy())
