"""The training loop, and the trainers that translate a configuration into its parts."""

from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import DistillationTrainer

__all__ = ["CompressionTrainer", "DistillationTrainer"]
