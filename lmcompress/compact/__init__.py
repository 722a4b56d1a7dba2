"""Smaller models out of a teacher: students of fewer blocks or widths, and compact layers in the place of matrices."""

from lmcompress.compact.costs import model_flops
from lmcompress.compact.factorizing import factorize, factorize_embeddings
from lmcompress.compact.grouping import fold_shuffles, group
from lmcompress.compact.report import CompactReport
from lmcompress.compact.separating import separate
from lmcompress.compact.sharing import share_layers
from lmcompress.compact.students import (
    NAMED_SHAPES,
    NamedShape,
    Student,
    by_layers,
    by_shape,
    by_width,
    choose_layers,
    named,
)

__all__ = [
    "NAMED_SHAPES",
    "CompactReport",
    "NamedShape",
    "Student",
    "by_layers",
    "by_shape",
    "by_width",
    "choose_layers",
    "factorize",
    "factorize_embeddings",
    "fold_shuffles",
    "group",
    "model_flops",
    "named",
    "separate",
    "share_layers",
]
