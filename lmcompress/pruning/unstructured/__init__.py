"""Unstructured pruning of single weights and groups: criteria, schedules, and compensation by the remaining weights."""

from lmcompress.pruning.unstructured.config import SparsityConfig, SparsityRule, Surgery
from lmcompress.pruning.unstructured.criteria import CRITERIA, Criterion
from lmcompress.pruning.unstructured.cutting import CutLayer, cut_zero_units
from lmcompress.pruning.unstructured.group_lasso import GroupLassoConfig, GroupReport, GroupSparsity
from lmcompress.pruning.unstructured.groups import GroupRule
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.pruning.unstructured.patterns import Blocks, NOfM, Unstructured
from lmcompress.pruning.unstructured.post_training import prune_weights
from lmcompress.pruning.unstructured.report import SparseMatrix, SparsityReport
from lmcompress.pruning.unstructured.sensitivity import Scan, sensitivity_scan
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot

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
