"""The end of structured pruning: repair, cut, compare with the masked model, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.checkpoint.schema import Structure
from lmcompress.checkpoint.structure import recorded_structure
from lmcompress.errors import EquivalenceError, LmcompressError
from lmcompress.pruning.saved import saved
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.goals import Goal
from lmcompress.pruning.structured.masks import kept_heads, leaves_gaps
from lmcompress.pruning.structured.repair import Repaired, compensate_bias, least_squares, least_squares_in_order
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.stock import stock_verdict
from lmcompress.pruning.structured.surgery import census, coverage, cut, fold
from lmcompress.pruning.structured.units import Units

TOLERANCE = 1e-5
"""Max abs difference of outputs allowed between masked and cut model in float32, relative to the max abs output."""

_REPAIRS = {
    "bias": compensate_bias, "least_squares": least_squares, "least_squares_in_order": least_squares_in_order
}  # fmt: skip


class Finish:
    """The state of a model before it is cut, and the final steps of pruning.

    Args:
        model: the model to cut.
        config: the configuration.

    Raises:
        LmcompressError: If the criterion, or another custom part, has no name for the report.
    """

    def __init__(self, model: PreTrainedModel, config: PruningConfig) -> None:
        self._model, self._config = model, config
        self._before, self._census = recorded_structure(model), census(model)
        # now, not after training
        self._dumped = saved(config)
        self.repaired: list[Repaired] = []

    def repair(self, mask: Units, batches: Sequence[Batch]) -> None:
        """Re-fit what reads pruned units, as configured.

        Args:
            mask: bool, True is kept.
            batches: calibration data.

        Raises:
            LmcompressError: If there are no batches.
        """
        kind = self._config.repair
        if kind == "none" or not leaves_gaps(mask):
            return
        if not batches:
            raise LmcompressError(f"repair: {kind} needs calibration batches, got none; pass batches=")
        self.repaired = _REPAIRS[kind](self._model, mask, batches)

    def cut(
        self, gates: Gates, values: Units, mask: Units, batches: Sequence[Batch], goal: Goal, seconds: float
    ) -> PruningReport:
        """Fold the gates into the weights, cut, compare with the masked model, and report.

        Args:
            gates: with ``values`` set; removed.
            values: values of the gates.
            mask: bool, True is kept.
            batches: batches to compare on; random ones if there are none.
            goal: goal of the target.
            seconds: time spent on choosing; that of cutting is added.

        Raises:
            EquivalenceError: If the outputs of the cut model differ from the masked one's.
            LmcompressError: If nothing was cut.
        """
        started = time.perf_counter()
        error = _cut_behind(self._model, gates, values, mask, batches)
        after = recorded_structure(self._model)
        covered = coverage(self._census, census(self._model))
        if covered["unchanged"]:
            raise LmcompressError(
                "nothing was pruned, although the mask has pruned units; please report this with the configuration"
            )
        return PruningReport(
            before=self._before,
            after=after,
            coverage=covered,
            target=self._dumped["target"],
            unit=goal.counted.unit,
            removed=goal.share_removed(after),
            asked=goal.removed,
            method={name: value for name, value in self._dumped.items() if name != "target"},
            masked_error=error,
            repaired=[dict(vars(one)) for one in self.repaired],
            stock=_stock(after, self._model),
            seconds=seconds + time.perf_counter() - started,
            kept_heads=kept_heads(mask, self._before),
        )


def _cut_behind(model: PreTrainedModel, gates: Gates, values: Units, mask: Units, batches: Sequence[Batch]) -> float:
    """Cut a gated model; the max abs difference of outputs, relative to the max abs output."""
    probes = list(batches[:2]) or random_batches(model)
    reference = outputs_of(model, probes)
    gates.remove()
    fold(model, values)
    cut(model, mask)
    after = outputs_of(model, probes)
    # hidden states of a base model lose the dimensions that are pruned
    if mask.hidden is not None and reference[0].shape != after[0].shape:
        reference = [output[..., mask.hidden.cpu()] for output in reference]
    error = float(torch.stack([(a - b).abs().max() for a, b in zip(after, reference, strict=True)]).max())
    scale = float(torch.stack([b.abs().max() for b in reference]).max())
    relative = error / scale if scale > 0 else error
    allowed = TOLERANCE if model.dtype == torch.float32 else 0.05
    # written this way round so that NaN fails
    if not relative <= allowed:
        raise EquivalenceError(
            f"the cut model differs from the masked one by {error:.3g} ({relative:.3g} relative, allowed "
            f"{allowed:.3g}). If the model returns NaN, training diverged; otherwise please report this with the "
            "configuration"
        )
    return relative


def _stock(after: Structure, model: PreTrainedModel) -> dict[str, Any]:
    verdict = stock_verdict(after, model.config)
    nearest = verdict.nearest.model_dump(mode="json", exclude_none=True)
    return {"loads": verdict.loads, "reason": verdict.reason, "nearest": nearest}
