"""Zeros among single weights, and in groups: what to remove, when, and how the rest makes it good."""

from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot
from lmcompress.sparsity.config import SparsityConfig, SparsityRule, Surgery
from lmcompress.sparsity.criteria import CRITERIA, Criterion
from lmcompress.sparsity.cutting import CutLayer, cut_zero_units
from lmcompress.sparsity.group_lasso import GroupLassoConfig, GroupReport, GroupRule, GroupSparsity
from lmcompress.sparsity.method import Sparsity, prune_weights
from lmcompress.sparsity.patterns import Blocks, NOfM, Unstructured
from lmcompress.sparsity.report import SparseMatrix, SparsityReport
from lmcompress.sparsity.sensitivity import Scan, sensitivity_scan

__all__ = [
    "Blocks",
    "CRITERIA",
    "Criterion",
    "CutLayer",
    "Gradual",
    "GroupLassoConfig",
    "GroupReport",
    "GroupRule",
    "GroupSparsity",
    "HardThresholding",
    "Iterative",
    "NOfM",
    "OneShot",
    "Scan",
    "SparseMatrix",
    "Sparsity",
    "SparsityConfig",
    "SparsityReport",
    "SparsityRule",
    "Surgery",
    "Unstructured",
    "cut_zero_units",
    "prune_weights",
    "sensitivity_scan",
]
