"""DistillationTrainer: a student that learns from its teacher or teachers."""

from __future__ import annotations

from typing import Any

from lmcompress.distillation.method import Distillation
from lmcompress.errors import LmcompressError
from lmcompress.trainers.building import Asked
from lmcompress.trainers.compression import CompressionTrainer


class DistillationTrainer(CompressionTrainer):
    """Fits ``model`` to its ``teacher`` or teachers; see :class:`CompressionTrainer` for the arguments.

    Without ``distillation``, logits and labels are compared.

    Raises:
        LmcompressError: If there is no teacher, or :class:`CompressionTrainer` refuses.
    """

    def _completed(self, asked: Asked, args: Any) -> Asked:
        asked = super()._completed(asked, args)
        distilled = not callable(asked.methods) and any(isinstance(m, Distillation) for m in asked.methods)
        if asked.teacher is None and not callable(asked.methods) and not distilled:
            raise LmcompressError("distillation needs a teacher, got none; pass teacher=, a model or several")
        return asked
