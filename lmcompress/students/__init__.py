"""Smaller models from a teacher: students with fewer blocks or smaller widths, and compact layers."""

from lmcompress.students.costs import model_flops
from lmcompress.students.cross_layer import share_layers
from lmcompress.students.folding import fold_shuffles
from lmcompress.students.grouped import group
from lmcompress.students.layers import Student, by_layers, choose_layers
from lmcompress.students.low_rank import factorize, factorize_embeddings
from lmcompress.students.named_shapes import NAMED_SHAPES, NamedShape, named
from lmcompress.students.report import CompactReport
from lmcompress.students.separable import separate
from lmcompress.students.shape import by_shape, by_width

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
