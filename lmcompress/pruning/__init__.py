"""Pruning: structured (whole units), unstructured (single weights and groups), and of the vocabulary."""

from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.costs import CostModel, EnergyCost, FlopCost, ModelSizes, ParameterCost
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.latency import LatencyTable, measure_latency
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.ranking import select
from lmcompress.pruning.structured.registry import CRITERIA, Criterion
from lmcompress.pruning.structured.repair import compensate_bias, least_squares, least_squares_in_order
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.scoring import normalized, score
from lmcompress.pruning.structured.sensitivity import SensitivityRow, mean_loss, sensitivity
from lmcompress.pruning.structured.stock import StockVerdict, stock_verdict
from lmcompress.pruning.structured.surgery import census, coverage, cut, fold
from lmcompress.pruning.structured.targets import Shape, Target
from lmcompress.pruning.structured.units import PARTS, Part, Units, check_units, full, masked_structure, unit_shapes
from lmcompress.pruning.vocabulary.embeddings import count_tokens, prune_vocabulary
from lmcompress.pruning.vocabulary.report import VocabularyReport
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot

__all__ = [
    "CRITERIA",
    "PARTS",
    "CostModel",
    "Criterion",
    "EnergyCost",
    "FlopCost",
    "Gates",
    "Gradual",
    "GroupLasso",
    "HardConcrete",
    "HardThresholding",
    "Iterative",
    "LatencyTable",
    "ModelSizes",
    "Movement",
    "OneShot",
    "ParameterCost",
    "Part",
    "PruningConfig",
    "PruningReport",
    "SensitivityRow",
    "Shape",
    "StockVerdict",
    "StructuredPruning",
    "Target",
    "Units",
    "VocabularyReport",
    "census",
    "check_units",
    "compensate_bias",
    "count_tokens",
    "coverage",
    "cut",
    "fold",
    "full",
    "least_squares",
    "least_squares_in_order",
    "masked_structure",
    "mean_loss",
    "measure_latency",
    "normalized",
    "prune",
    "prune_vocabulary",
    "score",
    "select",
    "sensitivity",
    "stock_verdict",
    "unit_shapes",
]
