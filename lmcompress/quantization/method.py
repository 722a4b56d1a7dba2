"""Quantization as a method of the trainer: weights learn to be codes, and become codes when it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.config import ActivationEncoding, AttentionEncoding
from lmcompress.checkpoint.encoding import Packable, matrices, pack_model
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import weight_bytes
from lmcompress.families import anatomy_of, weight_view
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.method import StepCallback, SteppedMethod, calibration_rows, inner_optimizer, undisturbed
from lmcompress.model import outputs_of, random_batches
from lmcompress.nn.packed import InputRange
from lmcompress.nn.quantized_attention import ROLES, Role, attention_quantizers, quantize_attention
from lmcompress.numerics.grids import Bits, Granularity, Grid, PerGroup, PerRow
from lmcompress.numerics.packing import dequantize
from lmcompress.numerics.quantizers import Quantized, quantizer_for
from lmcompress.quantization.config import QuantizationConfig, WeightScheme, width
from lmcompress.quantization.fake import FakeQuantized
from lmcompress.quantization.planning import Plan, Planned, plan, relative_path
from lmcompress.quantization.post_training import rounding_of, stored_bytes
from lmcompress.quantization.report import QuantizationReport, QuantizedMatrix

Batch = Mapping[str, Tensor]


class Quantization(SteppedMethod):
    """Quantizes the weights, and what enters their products, of the model that is trained.

    Until :meth:`finish` the model computes with quantized numbers, and the weights that the optimizer has are what they
    were. Scales that are learned have a learning rate of their own and no weight decay. Bits may go from many to few,
    and activations may be left alone at first. Schedules advance by optimizer steps.

    With pruning in the same run, codes and scales are those of the masked model: they go with the rows when it is cut,
    for a mean taken anew of what is left would be another. So pruning must come before this in the list of methods.

    Args:
        config: what is quantized to what, and when; default: QuantGPT's at 8 bits.
        calibration: batches for ranges that are calibrated; default: rows of the training data.

    Attributes:
        plan: what gets what; after :meth:`prepare`.
        faked: what quantizes; likewise.
        report: what was done; after :meth:`finish`.
    """

    name = "quantization"
    changes_values = True

    def __init__(self, config: QuantizationConfig | None = None, *, calibration: Sequence[Batch] | None = None) -> None:
        self.config = QuantizationConfig() if config is None else config
        self.report: QuantizationReport | None = None
        self._given = None if calibration is None else list(calibration)
        self._trainer: Any = None
        self._optimizer: Any = None
        self._cut_later = False
        self._settled: _Settled | None = None
        self._codes: dict[str, Tensor] | None = None
        self._max_steps = 0
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Plan, put the quantizers in, and calibrate what is calibrated at the start.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: what :func:`~lmcompress.quantization.planning.plan` refuses, bits of the schedule that a
                quantizer has not, calibration rows that cannot be had, a best checkpoint that is to be loaded at the
                end, or pruning that comes later in the list of methods or leaves no codes.
        """
        if trainer.args.load_best_model_at_end:
            raise LmcompressError(
                "load_best_model_at_end must be false with quantization: the weights of an earlier checkpoint do not "
                "fit the scales of the last. Compare checkpoints after the run, or train for fewer steps"
            )
        if not isinstance(trainer.student, PreTrainedModel):
            raise LmcompressError(
                f"the student must be a model of transformers to be quantized, got {type(trainer.student).__name__}; "
                "quantize the models of several tasks one by one"
            )
        self._trainer = trainer
        self.attach(trainer.student, cut_later=self._is_cut(trainer.methods))
        if self.config.start_activations_at == 0:
            self._start_activations()
        trainer.add_callback(StepCallback(self))

    def attach(self, student: PreTrainedModel, *, cut_later: bool = False) -> None:
        """What :meth:`prepare` does to the model, without a trainer; nothing is calibrated.

        Args:
            student: the model, not wrapped.
            cut_later: whether something else cuts it between :meth:`settle` and :meth:`finish`.

        Raises:
            LmcompressError: as :meth:`prepare`.
        """
        self._student = student
        self._cut_later = cut_later
        self.plan = plan(student, self.config)
        check_trainable(self.plan, self.config, cut_later=cut_later)
        self.faked = FakeQuantized(student, self.plan)
        self._matrices = {planned.path: planned for planned in self.plan.matrices}
        self._curved = [path for path, one in self._matrices.items() if one.weights.quantizer == "laq"]
        self._curved = self._curved if self.config.curvature_every else []
        self._set_bits(0)
        curvatures = {path: self.faked.parameter(path) for path in self._curved}
        self._state = _State(self.faked.scales(), curvatures).to(student.device)
        self.faked.set_enabled(False, "activations")
        self._started = False

    # what the trainer calls in every step

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Scales of weights, and ranges of activations, that are learned; without weight decay."""
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
        """Scales, ranges, curvatures and where the schedules are, for checkpoints."""
        return {"scales": self.faked.state, "state": self._state}

    def settle(self) -> None:
        """Bring schedules to their end; where the model is to be cut, fix codes and scales as they are now.

        In that case weights become what their codes stand for, nothing is fake any more, inputs of products are not
        quantized until :meth:`finish`, and codes and scales go with the rows of the weights.

        Raises:
            LmcompressError: a range that cannot be calibrated, or weights or scales that are NaN or infinite.
        """
        if self.report is not None or self._settled is not None:
            return
        self._arrive()
        if not self._cut_later:
            return
        started = time.perf_counter()
        reference = outputs_of(self._student, self._probes())
        before = weight_bytes(self._student).total
        ranges = {name: fake.final() for name, fake in self.faked.activations.items()}
        attention = self._attention_ranges(ranges)
        modules = _modules(self._student)
        carried: dict[str, _Carried] = {}
        for path, planned in self._matrices.items():
            quantized, weight = self.faked.quantized_matrix(path), weight_view(modules[path])
            _ = quantized.codes  # refuses what is not finite
            inputs, fixed = ranges[self.faked.inputs[path].name] if path in self.faked.inputs else (None, None)
            error = _relative_error(weight.detach().float(), quantized.values)
            carried[path] = _Carried(
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
        self._settled = _Settled(reference, before, attention)
        self._seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Pack the model: its weights become codes; and say what was done.

        Raises:
            LmcompressError: a range that cannot be calibrated, weights or scales that are NaN or infinite, or a model
                that was cut without :meth:`settle`.
        """
        if self.report is not None:
            return
        if self._cut_later and self._settled is None:
            raise LmcompressError(
                "settle() must come before the model is cut, so that codes are those of the masked model; "
                "CompressionTrainer.finish() calls both in that order"
            )
        started = time.perf_counter()
        rows: list[QuantizedMatrix] = []
        if self._settled is None:
            self._arrive()
            reference, before = outputs_of(self._student, self._probes()), weight_bytes(self._student).total
            modules = _modules(self._student)
            for path, planned in self._matrices.items():
                quantized, weight = self.faked.quantized_matrix(path), weight_view(modules[path])
                rows.append(_row(planned, quantized, _relative_error(weight.detach().float(), quantized.values)))
            self.faked.finish()
        else:
            reference, before = self._settled.reference, self._settled.bytes_before
            self._pack_carried(self._settled, rows)
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
            packed_error=_greatest_difference(reference, after),
            drift=self._drift(),
        )

    # what the callback calls

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Take up the state of a checkpoint, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.

        Raises:
            LmcompressError: a curvature is wanted of an optimizer that has none.
        """
        self._max_steps, self._optimizer = max_steps, optimizer
        inner = inner_optimizer(optimizer)
        if self._curved and "betas" not in inner.defaults:
            raise LmcompressError(
                f"the optimizer must keep second moments for laq's curvature, got {type(inner).__name__}; use "
                "optim='adamw_torch', or curvature_every=0, by which all weights count alike"
            )
        # what was loaded belongs to the bits of then: nothing may begin anew
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
        """What is due before an optimizer step.

        Args:
            step: optimizer steps done.

        Raises:
            LmcompressError: a range that cannot be calibrated.
        """
        progress, schedule = step / max(1, self._max_steps), self.config.bits_schedule
        while self._stage + 1 < len(schedule) and progress >= schedule[self._stage + 1][0]:
            self._begin_stage(self._stage + 1)
        if not self._started and progress >= self.config.start_activations_at:
            self._start_activations()
        if self._curved and step and step % self.config.curvature_every == 0:
            self._look_at_curvature()

    def metrics(self) -> dict[str, float]:
        """For the log: drift of scales and ranges by kind of module, and share of codes that are others than before."""
        values = self._drift()
        if (codes := self._codes_now()) is not None:
            if self._codes is not None:
                # one copy from the GPU
                changed = torch.stack([(codes[path] != old).sum() for path, old in self._codes.items()]).sum()
                values["quantization_codes_changed"] = float(changed) / sum(old.numel() for old in codes.values())
            self._codes = codes
        return values

    # below: nobody else's business

    def _is_cut(self, methods: Sequence[Any]) -> bool:
        later = False
        for method in methods:
            if method is self:
                later = True
            elif method.changes_shapes:
                if later:
                    raise LmcompressError(
                        f"{method.name} must come before quantization in the list of methods, got it after: what "
                        "quantization sees is what its gates have left"
                    )
                if method.folds:
                    raise LmcompressError(
                        f"{method.name} must end with gates of 0 and 1 in a run that quantizes too, got a schedule "
                        "whose gates end between: weights that are multiplied by those are no codes any more. Use "
                        "another schedule, or prune in a stage before"
                    )
        return any(method.changes_shapes for method in methods)

    def _bits_at(self, stage: int, own: Bits) -> Bits:
        schedule = self.config.bits_schedule
        if not schedule or width(schedule[stage][1]) <= width(own):
            return own
        return schedule[stage][1]

    def _set_bits(self, stage: int) -> list[nn.Parameter]:
        """Give every matrix the bits of a stage; returns the scales that began anew."""
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
                # the momentum of another scale
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

    @torch.no_grad()
    def _look_at_curvature(self) -> None:
        inner = inner_optimizer(self._optimizer)
        second, eps = inner.defaults["betas"][1], inner.defaults.get("eps", 1e-8)
        for path, curvature in self._state.curvatures().items():
            state = inner.state.get(self.faked.parameter(path), {})
            moments = state.get("exp_avg_sq")
            if moments is None:
                # frozen, or no gradient yet
                curvature.fill_(1.0)
            else:
                # more than 0, for words that no batch had
                curvature.copy_((moments / (1 - second ** float(state["step"]))).sqrt() + eps)
        self._state.curved.fill_(1)
        self.faked.set_curvature(self._state.curvatures())

    def _calibration(self) -> list[Batch]:
        if self._given is None:
            config = self.config
            if self._trainer is None:
                raise LmcompressError("ranges that are calibrated must have data, got none; pass calibration=")
            self._given = calibration_rows(
                self._trainer, config.calibration_rows, config.calibration_batch_size, config.seed
            )
        return self._given

    def _probes(self) -> list[Batch]:
        return list(self._given[:2]) if self._given else list(random_batches(self._student))

    @torch.no_grad()
    def _codes_now(self) -> dict[str, Tensor] | None:
        if not self.config.monitor:
            return None
        return {path: self.faked.quantized_matrix(path).codes for path in self._matrices}

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        groups: dict[str, list[Tensor]] = {}
        starts = self._state.starts()
        readers = {fake.name: self._matrices[path].part or path for path, fake in reversed(self.faked.inputs.items())}
        for name, scale in self.faked.scales().items():
            if name in self._matrices:
                group = f"scale_drift_{self._matrices[name].part or name}"
            else:
                activation = name.rpartition(".")[0]
                group = f"range_drift_{readers.get(activation) or activation.rpartition('.')[2]}"
            start = starts[name]
            ratio = (scale - start).abs() / start.abs()
            groups.setdefault(group, []).append(ratio[start != 0].float().mean())
        names, means = list(groups), [torch.stack(values).nanmean() for values in groups.values()]
        values = torch.stack(means).tolist() if means else []
        return {name: value for name, value in zip(names, values, strict=True) if value == value}

    def _attention_ranges(
        self, ranges: Mapping[str, tuple[ActivationEncoding, InputRange | None]]
    ) -> dict[nn.Module, dict[Role, tuple[ActivationEncoding, InputRange | None]]]:
        if self.plan.attention is None:
            return {}
        modules = _modules(self._student)
        paths = {id(module): path for path, module in modules.items()}
        found = {}
        for block in anatomy_of(self._student).blocks:
            if block.num_heads:
                module = block.get("attention")
                found[module] = {role: ranges[f"{paths[id(module)]}.{role}"] for role in ROLES}
        return found

    def _pack_carried(self, settled: _Settled, rows: list[QuantizedMatrix]) -> None:
        student = self._student
        parts = _CarriedParts(student)
        # blocks that are gone, or have no heads left, have nothing to quantize
        attentions = [block.get("attention") for block in anatomy_of(student).blocks if block.num_heads]
        attentions = [module for module in attentions if module in settled.attention]
        roles = settled.attention[attentions[0]] if attentions else {}
        attention = AttentionEncoding(**{role: entry[0] for role, entry in roles.items()}) if roles else None
        for path in parts:
            companion: _Carried = parts.companion(path)
            rows.append(replace(_row(companion.planned, parts[path].quantized, companion.error), path=path))
        pack_model(student, parts, attention)
        if attention is None:
            return
        quantize_attention(student, attentions, attention)
        for module in attentions:
            places = dict(cast(nn.Module, attention_quantizers(module)).named_buffers())
            for role, (_, given) in settled.attention[module].items():
                for place, value in zip((f"{role}_scale", f"{role}_zero_point"), given or (), strict=False):
                    if value is not None:
                        places[place].copy_(value)


@dataclass(frozen=True, eq=False)
class _Settled:
    """What is known of the model before it is cut."""

    reference: list[Tensor]
    bytes_before: int
    attention: dict[nn.Module, dict[Role, tuple[ActivationEncoding, InputRange | None]]]


@dataclass(frozen=True, eq=False)
class _Carried:
    """What makes codes of plain weights again, wherever a cut has taken them."""

    planned: Planned
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid
    granularity: Granularity
    inputs: ActivationEncoding | None
    input_range: InputRange | None
    error: float

    def rows(self, keep: Tensor) -> _Carried:
        """What belongs to some of the rows.

        Args:
            keep: their numbers.

        Returns:
            A new one.
        """
        if not isinstance(self.granularity, PerRow):
            return self
        keep = keep.to(self.scales.device)
        zeros = None if self.zero_points is None else self.zero_points[keep]
        return replace(self, scales=self.scales[keep], zero_points=zeros)

    def packable(self, weight: Tensor, path: str) -> Packable:
        """Codes of weights that are on the grid.

        Args:
            weight: ``(out, in)``.
            path: of the module, for the error.

        Returns:
            The codes, and what happens to the input.

        Raises:
            LmcompressError: some are not on the grid.
        """
        values = weight.detach().float()
        steps = values / torch.where(self.scales > 0, self.scales, torch.inf)
        levels = self.grid.nearest(steps if self.zero_points is None else steps.round() + self.zero_points.float())
        again = dequantize(levels, self.scales, granularity=self.granularity, zero_points=self.zero_points)
        if not torch.equal(again.to(weight.dtype), weight.detach()):
            raise LmcompressError(
                f"{path} must be what its codes stand for when it is packed, something has changed it since settle(); "
                "finish pruning and quantization by CompressionTrainer.finish()"
            )
        quantized = Quantized(
            again, self.scales, self.zero_points, self.grid, self.granularity, self.granularity.split(levels), values
        )
        return Packable(quantized, self.inputs, self.input_range)


class _CarriedParts(Mapping[str, Packable]):
    """What is packed after a cut, made one after another when it is asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        found = {path: (module, companion_of(module)) for path, module in matrices(model).items()}
        self._modules = {path: entry for path, entry in found.items() if entry[1] is not None}

    def companion(self, path: str) -> _Carried:
        """What came with a module.

        Args:
            path: of the module.

        Returns:
            The companion.
        """
        companion: _Carried = self._modules[path][1]
        return companion

    def __getitem__(self, path: str) -> Packable:
        module, companion = self._modules[path]
        packable: Packable = companion.packable(weight_view(module), path)
        return packable

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class _State(nn.Module):
    """What a checkpoint needs to go on, beside the scales themselves."""

    stage: Tensor
    activations: Tensor
    curved: Tensor

    def __init__(self, scales: Mapping[str, nn.Parameter], curvatures: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("stage", "activations", "curved"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self._names = {f"start/{name.replace('.', '/')}": name for name in scales}
        self._paths = {f"curvature/{path.replace('.', '/')}": path for path in curvatures}
        for key, name in self._names.items():
            self.register_buffer(key, scales[name].detach().clone())
        for key, path in self._paths.items():
            self.register_buffer(key, torch.ones_like(curvatures[path], dtype=torch.float32))

    def starts(self) -> dict[str, Tensor]:
        """Of each scale what it was when it began, by its name."""
        return {name: self.get_buffer(key) for key, name in self._names.items()}

    def curvatures(self) -> dict[str, Tensor]:
        """By path."""
        return {path: self.get_buffer(key) for key, path in self._paths.items()}

    @torch.no_grad()
    def begin(self, scales: Mapping[str, Tensor]) -> None:
        """Take some scales as they are for their start.

        Args:
            scales: by name.
        """
        starts = self.starts()
        for name, scale in scales.items():
            starts[name].copy_(scale)


def check_trainable(planned: Plan, config: QuantizationConfig, *, cut_later: bool = False) -> None:
    """Refuse what cannot be trained, before anything is.

    Args:
        planned: what gets what.
        config: with the schedule of bits.
        cut_later: whether something else cuts the model in the same run.

    Raises:
        LmcompressError: bits of the schedule that a quantizer has not, or that end above those of a matrix; and where
            the model is cut, groups, or a grid without a zero.
    """
    schedule = config.bits_schedule
    for one in planned.matrices:
        own, name = one.weights.bits, one.weights.quantizer
        if schedule and width(schedule[-1][1]) > width(own):
            raise LmcompressError(
                f"bits_schedule must end with the bits of all matrices or fewer, got {schedule[-1][1]} at its end and "
                f"{own} for {one.path}"
            )
        for _, bits in schedule:
            if width(bits) > width(own):
                try:
                    quantizer_for(name, bits)
                except LmcompressError as error:
                    raise LmcompressError(f"bits_schedule does not fit {one.path}: {error}") from error
        if cut_later and isinstance(one.weights.grouping(), PerGroup):
            raise LmcompressError(
                f"the granularity of {one.path} must be tensor or row in a run that prunes too, got groups of "
                f"{one.weights.granularity}: what is left of a group is no group. Prune in a stage before"
            )
        if cut_later and _has_no_zero(one.weights):
            raise LmcompressError(
                f"the grid of {one.path} must have a zero in a run that prunes too, {name} at {own} bits has none: "
                "what is masked would not be silent. Prune in a stage before"
            )


def _has_no_zero(scheme: WeightScheme) -> bool:
    grid = scheme.model_copy(update={"granularity": "tensor"})
    found = rounding_of(grid)(torch.tensor([[1.0, -1.0]]))
    return found.zero_points is None and float(found.grid.nearest(torch.zeros(()))) != 0


def _modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {relative_path(model, name): module for name, module in model.named_modules()}


def _row(planned: Planned, quantized: Quantized, error: float) -> QuantizedMatrix:
    scheme, inputs = planned.weights, planned.inputs
    fixed = 0 if inputs is None or inputs.range == "dynamic" else 4 if inputs.symmetric else 5
    weights = quantized.values.numel()
    return QuantizedMatrix(
        path=planned.path,
        part=planned.part,
        quantizer=scheme.quantizer,
        bits=scheme.bits,
        granularity=scheme.granularity,
        method="trained",
        error=error,
        measured="weights",
        weights=weights,
        bytes_before=weights * quantized.source.element_size(),
        bytes_after=stored_bytes(quantized) + fixed,
        inputs=None if inputs is None else inputs.bits,
    )


def _relative_error(weight: Tensor, values: Tensor) -> float:
    norm = float(weight.square().sum())
    return float((weight - values).square().sum()) / norm if norm > 0 else 0.0


def _greatest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    if [a.shape for a in after] != [b.shape for b in before]:
        # hidden states of a base model lose the dimensions that are gone
        return None
    error = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    scale = max(float(b.abs().max()) for b in before)
    return error / scale if scale > 0 else error
