"""The methods that a stage can have, one :class:`~lmcompress.recipes.parts.base.StagePart` each."""

from __future__ import annotations

from typing import Any

from lmcompress.recipes.parts.base import StagePart
from lmcompress.recipes.parts.compact import CompactPart
from lmcompress.recipes.parts.distillation import DistillationPart
from lmcompress.recipes.parts.pruning import PruningPart
from lmcompress.recipes.parts.quantization import QuantizationPart
from lmcompress.recipes.parts.sharing import SharingPart
from lmcompress.recipes.parts.sparsity import SparsityPart
from lmcompress.recipes.parts.student import StudentPart
from lmcompress.recipes.parts.vocabulary import VocabularyPart

PARTS: list[StagePart[Any]] = [
    VocabularyPart(),
    StudentPart(),
    CompactPart(),
    PruningPart(),
    SparsityPart(),
    SharingPart(),
    QuantizationPart(),
    DistillationPart(),
]
"""All methods, in the order in which they change a model."""
