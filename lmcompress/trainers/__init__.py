"""The training loop, and the trainers that turn a configuration into its methods."""

from lmcompress.trainers.arguments import (
    CompressionArguments,
    DistillationArguments,
    PruningArguments,
    QuantizationArguments,
    SharingArguments,
    SparsityArguments,
)
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import DistillationTrainer
from lmcompress.trainers.multitask import MultiTaskDistillation, MultiTaskStudent, MultiTaskTrainer
from lmcompress.trainers.pruning import PruningTrainer
from lmcompress.trainers.quantization import QuantizationTrainer
from lmcompress.trainers.sharing import SharingTrainer
from lmcompress.trainers.sparsity import SparsityTrainer

__all__ = [
    "CompressionArguments",
    "CompressionTrainer",
    "DistillationArguments",
    "DistillationTrainer",
    "MultiTaskDistillation",
    "MultiTaskStudent",
    "MultiTaskTrainer",
    "PruningArguments",
    "PruningTrainer",
    "QuantizationArguments",
    "QuantizationTrainer",
    "SharingArguments",
    "SharingTrainer",
    "SparsityArguments",
    "SparsityTrainer",
]
