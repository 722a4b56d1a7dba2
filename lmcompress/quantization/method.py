"""Quantization-aware training as a method of the trainer; the weights are packed when it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.batches import as_batches, batches_for
from lmcompress.checkpoint.encoding import matrices
from lmcompress.checkpoint.places import Packable
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import weight_bytes
from lmcompress.families import anatomy_of, refuse_foreign, weight_view
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.families.refusal import refuse_unproven
from lmcompress.families.weights import modules_by_path
from lmcompress.method import SteppedMethod, calibration_rows, inner_optimizer, undisturbed
from lmcompress.numerics.errors import relative_error
from lmcompress.numerics.grids import Bits
from lmcompress.quantization.carried import CarriedCodes, FrozenCodes
from lmcompress.quantization.checks import check_trainable, is_cut
from lmcompress.quantization.config import QuantizationConfig, width
from lmcompress.quantization.fake import FakeQuantized
from lmcompress.quantization.packing import pack
from lmcompress.quantization.planning import plan
from lmcompress.quantization.report import QuantizationReport, QuantizedMatrix, matrix_row
from lmcompress.quantization.state import ScheduleState

Batch = Mapping[str, Tensor]


class Quantization(SteppedMethod):
    """Quantizes weights and activations of the model in training.

    Until :meth:`finish` the model computes with quantized numbers, and the optimizer has the full-precision
    weights. Learned scales have a separate learning rate and no weight decay. Bits may follow a descending schedule,
    and activations may stay unquantized at first. Schedules advance by optimizer steps.

    With pruning in the same run, codes and scales are those of the masked model: they follow the rows when it is cut,
    since a mean over the remaining ones would differ. So pruning must come before this in the list of methods.

    Args:
        config: quantization and its schedule; default: QuantGPT's at 8 bits.
        calibration: batches for calibrated ranges; default: training rows.

    Attributes:
        plan: quantization of each matrix; set by :meth:`prepare`.
        faked: the fake-quantized model; set by :meth:`prepare`.
        report: the result; set by :meth:`finish`.
    """

    name = "quantization"
    changes_values = True

    def __init__(self, config: QuantizationConfig | None = None, *, calibration: Sequence[Batch] | None = None) -> None:
        self.config = QuantizationConfig() if config is None else config
        self.report: QuantizationReport | None = None
        self._given = None if calibration is None else as_batches(calibration)
        self._trainer: Any = None
        self._optimizer: Any = None
        self._cut_later = False
        self._frozen: FrozenCodes | None = None
        self._codes: dict[str, Tensor] | None = None
        self._max_steps = 0
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Plan, add the quantizers, and calibrate what is calibrated at the start.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If :func:`~lmcompress.quantization.planning.plan` refuses the config, a quantizer does not
                support bits of the schedule, calibration rows are not available, or pruning comes later in the list of
                methods or leaves no codes.
        """
        refuse_foreign(trainer.student, "quantize")
        if not isinstance(trainer.student, PreTrainedModel):
            raise LmcompressError(
                f"the student must be a model of transformers to be quantized, got {type(trainer.student).__name__}; "
                "quantize the models of several tasks one by one"
            )
        self._trainer = trainer
        self.attach(trainer.student, cut_later=is_cut(trainer.methods, self))
        if self.config.start_activations_at == 0:
            self._start_activations()

    def attach(self, student: PreTrainedModel, *, cut_later: bool = False) -> None:
        """The effect of :meth:`prepare` on the model, without a trainer; nothing is calibrated.

        Args:
            student: the model, not wrapped.
            cut_later: whether another method cuts it between :meth:`freeze` and :meth:`finish`.

        Raises:
            LmcompressError: If :meth:`prepare` would refuse it.
        """
        self._student = student
        self._cut_later = cut_later
        refuse_unproven(student, "training")
        self.plan = plan(student, self.config)
        check_trainable(self.plan, self.config, cut_later=cut_later)
        self.faked = FakeQuantized(student, self.plan)
        self._matrices = {planned.path: planned for planned in self.plan.matrices}
        self._curved = [path for path, one in self._matrices.items() if one.weights.function().takes_curvature]
        self._curved = self._curved if self.config.curvature_every else []
        self._set_bits(0)
        curvatures = {path: self.faked.parameter(path) for path in self._curved}
        self._state = ScheduleState(self.faked.scales(), curvatures).to(student.device)
        self.faked.set_enabled(False, "activations")
        self._started = False

    # called by the trainer in every step

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Learned scales of weights and ranges of activations; without weight decay."""
        scales = [fake.state for fake in self.faked.weights.values() if isinstance(fake.state, nn.Parameter)]
        ranges = [parameter for fake in self.faked.activations.values() for parameter in fake.parameters()]
        groups: list[dict[str, Any]] = []
        if scales:
            groups.append({"params": scales, "lr": self.config.scale_learning_rate})
        if ranges:
            rate = self.config.range_learning_rate
            groups.append({"params": ranges} if rate is None else {"params": ranges, "lr": rate})
        return groups

    def modules(self) -> dict[str, nn.Module]:
        """Scales, ranges, curvatures and the state of the schedules, for checkpoints."""
        return {"scales": self.faked.state, "state": self._state}

    def freeze(self) -> None:
        """Complete the schedules; if the model is to be cut, fix its current codes and scales.

        In that case weights take their quantized values, nothing is fake any more, activations are not
        quantized until :meth:`finish`, and codes and scales follow the rows of the weights.

        Raises:
            LmcompressError: If a range cannot be calibrated, or weights or scales are NaN or infinite.
        """
        if self.report is not None or self._frozen is not None:
            return
        self._arrive()
        if not self._cut_later:
            return
        started = time.perf_counter()
        reference = outputs_of(self._student, self._probes())
        before = weight_bytes(self._student).total
        ranges = {name: fake.final() for name, fake in self.faked.activations.items()}
        attention = self.faked.attention_ranges()
        modules = modules_by_path(self._student)
        carried: dict[str, CarriedCodes] = {}
        for path, planned in self._matrices.items():
            quantized, weight = self.faked.quantized_matrix(path), weight_view(modules[path])
            _ = quantized.codes  # refuses values that are not finite
            inputs, fixed = ranges[self.faked.inputs[path].name] if path in self.faked.inputs else (None, None)
            error = relative_error(weight, quantized.values)
            carried[path] = CarriedCodes(
                planned,
                quantized.scales,
                quantized.zero_points,
                quantized.grid,
                quantized.granularity,
                inputs,
                fixed,
                error,
            )
            with torch.no_grad():
                weight.copy_(quantized.values)
        self.faked.remove()
        for path, companion in carried.items():
            accompany(modules[path], companion)
        self._frozen = FrozenCodes(reference, before, attention)
        self._seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Pack the model, turning its weights into codes, and write the report.

        Raises:
            LmcompressError: If a range cannot be calibrated, weights or scales are NaN or infinite, or the model was
                cut without :meth:`freeze`.
        """
        if self.report is not None:
            return
        if self._cut_later and self._frozen is None:
            raise LmcompressError(
                "freeze() must come before the model is cut, so that codes are those of the masked model; "
                "CompressionTrainer.finish() calls both in that order"
            )
        started = time.perf_counter()
        if self._frozen is None:
            self._arrive()
            rows = []
            reference, before = outputs_of(self._student, self._probes()), weight_bytes(self._student).total
            modules = modules_by_path(self._student)
            for path, planned in self._matrices.items():
                quantized, weight = self.faked.quantized_matrix(path), weight_view(modules[path])
                error = relative_error(weight, quantized.values)
                rows.append(matrix_row(planned, quantized, method="trained", error=error))
            self.faked.finish()
        else:
            reference, before = self._frozen.reference, self._frozen.bytes_before
            rows = self._pack_carried(self._frozen)
        # codes are not trained
        self._student.eval()
        after = outputs_of(self._student, self._probes())
        self.report = QuantizationReport(
            method="trained",
            config=self.config.model_dump(mode="json"),
            matrices=rows,
            dense=dict(self.plan.dense),
            bytes_before=before,
            bytes_after=weight_bytes(self._student).total,
            attention=None if self.plan.attention is None else self.plan.attention.bits,
            seconds=self._seconds + time.perf_counter() - started,
            packed_error=_max_difference(reference, after),
            drift=self._state.drift(self.faked),
        )

    def detach(self) -> None:
        """Take quantization away: the student computes with its float weights again."""
        if self.report is None:
            self.faked.remove()

    @property
    def complete(self) -> bool:
        """Whether weights have their final bits and activations are quantized."""
        return self._stage + 1 >= len(self.config.bits_schedule) and self._started

    # called by the callback

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Load the state of a checkpoint, if there is one.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: the model's optimizer.

        Raises:
            LmcompressError: If a curvature is configured and the optimizer has no second moments.
        """
        self._max_steps, self._optimizer = max_steps, optimizer
        inner = inner_optimizer(optimizer)
        if self._curved and "betas" not in inner.defaults:
            raise LmcompressError(
                f"the optimizer must keep second moments for laq's curvature, got {type(inner).__name__}; use "
                "optim='adamw_torch', or curvature_every=0, which weights all errors equally"
            )
        self.restored()

    def restored(self) -> None:
        """Bits, scales and ranges as in the checkpoint that was loaded."""
        # the loaded state belongs to the bits at that time: nothing may be reinitialized
        kept = {name: scale.detach().clone() for name, scale in self.faked.scales().items()}
        self._set_bits(int(self._state.stage))
        with torch.no_grad():
            for name, scale in self.faked.scales().items():
                scale.copy_(kept[name])
        self._started = bool(self._state.activations)
        self.faked.set_enabled(self._started, "activations")
        if bool(self._state.curved):
            self.faked.set_curvature(self._state.curvatures())
        self._codes = self._codes_now()

    def advance(self, step: int) -> None:
        """The action due before an optimizer step.

        Args:
            step: optimizer steps done.

        Raises:
            LmcompressError: If a range cannot be calibrated.
        """
        progress, schedule = step / max(1, self._max_steps), self.config.bits_schedule
        while self._stage + 1 < len(schedule) and progress >= schedule[self._stage + 1][0]:
            self._begin_stage(self._stage + 1)
        if not self._started and progress >= self.config.start_activations_at:
            self._start_activations()
        if self._curved and step and step % self.config.curvature_every == 0:
            self._state.measure_curvature(self.faked, inner_optimizer(self._optimizer))

    def metrics(self) -> dict[str, float]:
        """For the log: drift of scales and ranges by kind of module, and the share of codes that have changed."""
        values = self._state.drift(self.faked)
        if (codes := self._codes_now()) is not None:
            if self._codes is not None:
                # one transfer from the GPU
                changed = torch.stack([(codes[path] != old).sum() for path, old in self._codes.items()]).sum()
                values["quantization_codes_changed"] = float(changed) / sum(old.numel() for old in codes.values())
            self._codes = codes
        return values

    def _bits_at(self, stage: int, own: Bits) -> Bits:
        schedule = self.config.bits_schedule
        if not schedule or width(schedule[stage][1]) <= width(own):
            return own
        return schedule[stage][1]

    def _set_bits(self, stage: int) -> list[nn.Parameter]:
        """Give every matrix the bits of a stage; returns the reinitialized scales."""
        anew = []
        for path, planned in self._matrices.items():
            fake, bits = self.faked.weights[path], self._bits_at(stage, planned.weights.bits)
            if bits != fake.scheme.bits:
                fake.set_bits(bits, self.faked.parameter(path))
                anew += [fake.state] if isinstance(fake.state, nn.Parameter) else []
        self._stage = stage
        return anew

    def _begin_stage(self, stage: int) -> None:
        inner = inner_optimizer(self._optimizer)
        for scale in self._set_bits(stage):
            scale.grad = None
            if inner is not None:
                # the momentum belongs to another scale
                inner.state.pop(scale, None)
        self._state.stage.fill_(stage)
        self._state.begin(self.faked.scales())
        self._codes = self._codes_now()

    def _start_activations(self) -> None:
        self.faked.set_enabled(True, "activations")
        waiting = [fake for fake in self.faked.activations.values() if fake.scheme.range != "dynamic"]
        if waiting:
            started = time.perf_counter()
            with undisturbed(self._student):
                self.faked.calibrate(self._calibration())
            self._seconds += time.perf_counter() - started
        self._started = True
        self._state.activations.fill_(1)
        self._state.begin({name: scale for name, scale in self.faked.scales().items() if name not in self._matrices})

    def _arrive(self) -> None:
        """The end of the schedules, wherever the training stopped."""
        if self.config.bits_schedule and self._stage + 1 < len(self.config.bits_schedule):
            self._begin_stage(len(self.config.bits_schedule) - 1)
        if not self._started:
            self._start_activations()

    def _calibration(self) -> list[Batch]:
        if self._given is None:
            config = self.config
            if self._trainer is None:
                raise LmcompressError("calibrated ranges need data, got none; pass calibration=")
            rows = calibration_rows(self._trainer, config.calibration_rows, config.calibration_batch_size, config.seed)
            self._given = batches_for(self._student, rows)
        return self._given

    def _probes(self) -> list[Batch]:
        return list(self._given[:2]) if self._given else list(random_batches(self._student))

    @torch.no_grad()
    def _codes_now(self) -> dict[str, Tensor] | None:
        if not self.config.monitor:
            return None
        return {path: self.faked.quantized_matrix(path).codes for path in self._matrices}

    def _pack_carried(self, frozen: FrozenCodes) -> list[QuantizedMatrix]:
        rows: list[QuantizedMatrix] = []

        def parts() -> Iterator[tuple[str, Packable]]:
            for path, module in matrices(self._student).items():
                carried: CarriedCodes | None = companion_of(module)
                if carried is not None:
                    packable = carried.packable(weight_view(module), path)
                    row = matrix_row(carried.planned, packable.quantized, method="trained", error=carried.error)
                    rows.append(replace(row, path=path))
                    yield path, packable

        # blocks that were pruned, or have no heads left, have nothing to quantize
        attentions = [module for block in anatomy_of(self._student).blocks for module in block.attentions()]
        pack(self._student, parts(), {m: frozen.attention[m] for m in attentions if m in frozen.attention})
        return rows


def _max_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    if [a.shape for a in after] != [b.shape for b in before]:
        # hidden states of a base model lose the pruned dimensions
        return None
    error = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    scale = max(float(b.abs().max()) for b in before)
    return error / scale if scale > 0 else error
