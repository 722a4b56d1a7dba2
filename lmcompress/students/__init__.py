"""Smaller models out of a teacher: students of fewer blocks or widths, and compact layers in the place of matrices."""

from lmcompress.students.costs import model_flops
from lmcompress.students.cross_layer import share_layers
from lmcompress.students.depth import (
    NAMED_SHAPES,
    NamedShape,
    Student,
    by_layers,
    by_shape,
    by_width,
    choose_layers,
    named,
)
from lmcompress.students.grouped import fold_shuffles, group
from lmcompress.students.low_rank import factorize, factorize_embeddings
from lmcompress.students.report import CompactReport
from lmcompress.students.separable import separate

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
