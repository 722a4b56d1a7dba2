"""The training loop, and the trainers that translate a configuration into its parts."""

from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import DistillationTrainer
from lmcompress.trainers.multitask import MultiTaskDistillation, MultiTaskStudent, MultiTaskTrainer

__all__ = [
    "CompressionTrainer",
    "DistillationTrainer",
    "MultiTaskDistillation",
    "MultiTaskStudent",
    "MultiTaskTrainer",
]
