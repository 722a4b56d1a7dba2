"""The training loop: a ``Trainer`` whose loss is a sum of named terms, correct under accumulation and DDP."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import UNITS, Method, Step, Term, Unit
from lmcompress.model import CompressedModel
from lmcompress.trainers.monitoring import check_alive, gradient_shares
from lmcompress.trainers.sampling import length_grouped
from lmcompress.trainers.state import describe_structure, load_state, save_state

# inputs that a teacher may take and the student not; Trainer removes columns that the student does not know
TEACHER_COLUMNS = ("token_type_ids", "teacher_input_ids", "teacher_attention_mask", "teacher_token_type_ids")


@dataclass
class _Logged:
    """Sum of the means of one term since the last log, and the number of optimizer steps it took part in."""

    total: Tensor
    measured: bool
    steps: int = 0
    last_step: int = -1


class CompressionTrainer(Trainer):  # type: ignore[misc]
    """A :class:`~transformers.Trainer` to which compression methods add loss terms.

    Without methods it trains as ``Trainer`` does, except for the denominator: every term, including the loss on the
    labels, is a mean over the whole optimizer step, all micro-batches and processes, so that a batch of 8 × 1 equals 1
    × 8. (For GPT-2, ``Trainer`` 5.17 and 5.23 divide by the labels before the shift, this one by the tokens predicted.)

    Each term is logged by name (``loss_kd``, ``loss_hidden_mse_0``, …), unweighted. Checkpoints contain the state of
    the methods and resume bit-exact on a CPU; only the student is saved at the end.

    Args:
        model: the student; a :class:`CompressedModel` is unwrapped.
        args: as for ``Trainer``.
        methods: compression methods, in the order in which they were created.
        gradient_shares: every n optimizer steps, also log each term's share of the norm of the student's gradient
            (``share_kd``, …); costs one more backward pass for each term in that step. 0: never.
        **kwargs: as for ``Trainer``.

    Raises:
        LmcompressError: If label smoothing, a custom loss function, or several GPUs in one process are requested, none
            of which the terms support.
    """

    # terms are divided by the counts of the step; transformers checks from 5.19 on, before it divided without loss
    # kwargs
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module,
        args: TrainingArguments | None = None,
        methods: Sequence[Method] = (),
        *,
        gradient_shares: int = 0,
        **kwargs: Any,
    ) -> None:
        student = model.model if isinstance(model, CompressedModel) else model
        if args is not None and args.label_smoothing_factor:
            raise LmcompressError("label_smoothing_factor must be 0: smooth the teacher's temperature instead")
        if kwargs.get("compute_loss_func") is not None:
            raise LmcompressError("compute_loss_func is not used here: pass what it does as a method")
        self.student: Any = student
        self.methods = list(methods)
        self.gradient_shares = gradient_shares
        self._counts: dict[Unit, Tensor] | None = None
        self._logged: dict[str, _Logged] = {}
        self._silent_steps: dict[str, int] = {}
        self._shares: dict[str, float] = {}
        self._own_parameters: list[nn.Parameter] = []
        self._reads = {id(model): _reading_of(model) for model in self._models()}
        super().__init__(student, args, **kwargs)
        if self.args.n_gpu > 1:
            raise LmcompressError(
                f"{self.args.n_gpu} GPUs in one process would split batches behind the hooks' back: start with "
                "'torchrun --nproc_per_node=N' or 'accelerate launch', or set CUDA_VISIBLE_DEVICES to one"
            )
        # without this, transformers before 5.19 passes num_items_in_batch to the model and skips its own division, or
        # not, depending on the model's signature
        self.model_accepts_loss_kwargs = False
        self._divides_by_accumulation = not hasattr(Trainer, "loss_is_scaled_for_ga")
        if isinstance(student, PreTrainedModel):
            describe_structure(student)
        for method in self.methods:
            method.prepare(self)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step; counts all units in them, over all processes.

        Args:
            epoch_iterator: iterator of the data loader.
            num_batches: number of micro-batches.
            device: device of the counts.

        Returns:
            ``(batches, None)``.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # not after the step: a gradient scaler skips steps that overflow, and Trainer zeroes its model only
        for parameter in self._own_parameters:
            parameter.grad = None
        if batches:
            total = torch.stack([self._count(batch).to(device) for batch in batches]).sum(0)
            if self.args.world_size > 1:
                total = self.accelerator.reduce(total, reduction="sum")
            self._counts = dict(zip(UNITS, total.unbind(), strict=True))
        return batches, items

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(rows, "__len__") or not len(rows):
            return super()._get_train_sampler(train_dataset)
        return length_grouped(rows, self.args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of all terms; in evaluation only the loss on the labels, as in ``Trainer``.

        Args:
            model: the student, possibly wrapped.
            inputs: one micro-batch.
            return_outputs: whether to return the student's outputs too.
            num_items_in_batch: unused: units are counted in :meth:`get_batch_samples`.

        Returns:
            The loss, or ``(loss, outputs)``.

        Raises:
            LmcompressError: If there is nothing to train on, or a term has no gradient.
        """
        if not model.training:
            outputs = model(**inputs)
            loss = outputs["loss"] if "loss" in outputs else None
            return (loss, outputs) if return_outputs else loss
        counts = (
            self._counts if self._counts is not None else dict(zip(UNITS, self._count(inputs).unbind(), strict=True))
        )
        progress = self.state.global_step / max(1, self.state.max_steps)
        measured = self.gradient_shares > 0 and self.state.global_step % self.gradient_shares == 0
        step = Step(model, inputs, self._student_inputs(inputs), progress, retain_graph=measured)
        label_weight = 1.0
        for method in self.methods:
            method.before_forward(step)
            label_weight *= method.label_weight(progress)
        with_labels = label_weight > 0 and "labels" in inputs
        step.outputs = model(**step.student_inputs, **({"labels": inputs["labels"]} if with_labels else {}))
        terms: dict[str, Term] = {}
        if with_labels:
            terms["label"] = self._label_term(step.outputs, inputs, label_weight)
        for method in self.methods:
            new = method.loss_terms(step)
            if clash := sorted(terms.keys() & new.keys()):
                raise LmcompressError(
                    f"two methods have a loss term {clash[0]!r}; give both teachers to one Distillation"
                )
            terms |= new
        if not terms and "labels" not in inputs:
            raise LmcompressError(
                "there is nothing to train on: the batch has no labels and no method returned a loss term"
            )
        # DDP averages gradients over processes; the counts are of all processes
        scale = float(self.accelerator.num_processes)
        if self._divides_by_accumulation:
            scale *= self.current_gradient_accumulation_steps
        weighted = {name: term.weight * scale * _mean(term, counts) for name, term in terms.items() if term.weight > 0}
        self._check_gradients(terms)
        if measured:
            self._shares = gradient_shares(weighted, [p for p in self.student.parameters() if p.requires_grad])
        self._remember(terms, counts)
        if weighted:
            loss = torch.stack([value.to(_exact(value.device)) for value in weighted.values()]).sum().float()
        if not weighted or self.args.world_size > 1:
            # schedules may begin at 0; and DDP waits for every parameter that the outputs depend on
            nothing = 0.0 * step.outputs["logits"].float().sum()
            loss = loss + nothing if weighted else nothing
        return (loss, step.outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of ``Trainer``, with the methods' own parameters as further groups without weight decay.

        Args:
            model: as for ``Trainer``.

        Returns:
            The optimizer.
        """
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for method in self.methods:
            parameters = []
            for group in method.parameter_groups():
                # a second train() arrives here with the optimizer of the first
                if not known.intersection(map(id, group["params"])):
                    optimizer.add_param_group({"weight_decay": 0.0, **group})
                    parameters += list(group["params"])
            if parameters:
                self._care_for(optimizer, parameters, method.max_norm)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last log; raises if a term has been zero for long.

        Args:
            logs: the entry of ``Trainer``.
            start_time: as for ``Trainer``.

        Raises:
            LmcompressError: If a term was exactly zero for 50 steps or more.
        """
        if "loss" in logs and self._logged:
            for name, logged in self._logged.items():
                value = float(self.accelerator.gather(logged.total.reshape(1)).sum()) / logged.steps
                logs[name if logged.measured else f"loss_{name}"] = value
                if not logged.measured:
                    self._silent_steps[name] = self._silent_steps.get(name, 0) + logged.steps if value == 0 else 0
                    check_alive(name, self._silent_steps[name])
            logs |= {f"share_{name}": share for name, share in self._shares.items()}
            self._logged, self._shares = {}, {}
        super().log(logs) if start_time is None else super().log(logs, start_time)

    def freeze(self) -> None:
        """Freeze the decisions of every method: the model already computes what it will after :meth:`finish`."""
        for method in self.methods:
            method.freeze()

    def finish(self) -> None:
        """Freeze the decisions of every method, materialize them and remove the hooks; ends the use of the trainer."""
        self.freeze()
        for method in self.methods:
            method.finish()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As in ``Trainer``, without a teacher's columns in the batch, and without capturing anything.

        Args:
            model: the student, possibly wrapped.
            inputs: one batch.
            prediction_loss_only: as for ``Trainer``.
            ignore_keys: as for ``Trainer``.

        Returns:
            Loss, logits and labels, as in ``Trainer``.
        """
        kept = self._student_inputs(inputs) | {k: v for k, v in inputs.items() if k in self.label_names}
        for method in self.methods:
            method.set_active(False)
        try:
            return super().prediction_step(model, kept, prediction_loss_only, ignore_keys)
        finally:
            for method in self.methods:
                method.set_active(True)

    def _models(self) -> list[Any]:
        """All models that a batch may be for."""
        return [self.student]

    def _model_for(self, batch: Mapping[str, Any]) -> Any:
        """The model, not wrapped, that this batch is for."""
        return self.student

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        names = _parameters_of(type(self._model_for(inputs)).forward)
        other = ("labels", *self.label_names)
        kept = {k: v for k, v in inputs.items() if not k.startswith("teacher_") and k not in other}
        # a column may be for the teacher only, such as BERT's token types for a DistilBERT
        return {k: v for k, v in kept.items() if k in names} if "input_ids" in names else kept

    def _label_term(self, outputs: Any, inputs: Mapping[str, Any], weight: float) -> Term:
        # heads return the mean over the units they count; times that count it is the sum
        count = self._count(inputs)[UNITS.index("labels")]
        loss = outputs["loss"].float()
        # a micro-batch without a single label has a mean of 0 / 0
        return Term(torch.where(count > 0, loss, torch.zeros_like(loss)) * count, "labels", weight)

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        return _count_vector(batch, *self._reads[id(self._model_for(batch))])

    def _check_gradients(self, terms: Mapping[str, Term]) -> None:
        for name, term in terms.items():
            if not term.total.requires_grad and term.weight > 0:
                raise LmcompressError(
                    f"the loss term {name!r} has no gradient: it does not depend on any trained parameter. "
                    "Are its layers frozen, or is the student the teacher itself?"
                )

    def _remember(self, terms: Mapping[str, Term], counts: Mapping[Unit, Tensor]) -> None:
        for name, term in terms.items():
            for part, total in ({name: term.total} if term.parts is None else term.parts).items():
                value = total.detach() / counts[term.unit].clamp(min=1)
                logged = self._logged.setdefault(part, _Logged(torch.zeros_like(value), term.measured))
                logged.total = logged.total + value
                if logged.last_step != self.state.global_step:
                    logged.steps, logged.last_step = logged.steps + 1, self.state.global_step

    def _care_for(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float | None
    ) -> None:
        # Trainer averages and clips the gradients of its model only
        self._own_parameters += parameters
        limit = max_norm if max_norm is not None else self.args.max_grad_norm

        def before(*_: Any) -> None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if self.args.world_size > 1:
                for gradient in gradients:
                    gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
            if limit and limit > 0:
                torch.nn.utils.clip_grad_norm_(parameters, limit)

        optimizer.register_step_pre_hook(before)

    def _set_signature_columns_if_needed(self) -> None:
        known = self._signature_columns
        super()._set_signature_columns_if_needed()
        if known is None and self.methods:
            columns = getattr(self.train_dataset, "column_names", None) or []
            wanted = dict.fromkeys([*TEACHER_COLUMNS, *(c for c in columns if c.startswith("teacher_"))])
            self._signature_columns += [c for c in wanted if c not in self._signature_columns]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # here, and not after the checkpoint: older checkpoints are deleted when it is complete, and this must not come
        # later
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(self.methods, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_student(resume_from_checkpoint, model)
        load_state(self.methods, resume_from_checkpoint)

    def _load_student(self, folder: str, model: nn.Module | None) -> None:
        super()._load_from_checkpoint(folder, model)


@cache
def _parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _mean(term: Term, counts: Mapping[Unit, Tensor]) -> Tensor:
    return term.total / counts[term.unit].clamp(min=1)


def _exact(device: torch.device) -> torch.dtype:
    # MPS has no float64
    return torch.float32 if device.type == "mps" else torch.float64


def _reading_of(model: Any) -> tuple[bool, bool]:
    """Whether a token attends only to those before it, and whether each position predicts the next token."""
    if not isinstance(model, PreTrainedModel):
        return False, False
    anatomy = anatomy_of(model)
    # a classifier on GPT-2 has causal attention, but no next token to predict
    return anatomy.family.causal, anatomy.head is not None


def _count_vector(batch: Mapping[str, Any], causal: bool, shifted: bool) -> Tensor:
    """Number of each unit in a batch, ``(len(UNITS),)``, in the order of ``UNITS``.

    Args:
        batch: on any device.
        causal: whether a token attends only to those before it.
        shifted: whether each position predicts the next token.

    Returns:
        Counts, float64 except on MPS.
    """
    ids = batch["input_ids"] if "input_ids" in batch else next(v for v in batch.values() if isinstance(v, Tensor))
    mask = batch.get("attention_mask")
    mask = torch.ones(ids.shape[:2], device=ids.device) if mask is None else mask
    # exact counts, so that sum / count of one micro-batch is its mean bit-exact
    lengths = mask.sum(-1).to(_exact(ids.device))
    pairs = (lengths * (lengths + 1) / 2 if causal else lengths * lengths).sum()
    labels = batch.get("labels")
    if labels is None and shifted:
        counted = (mask[:, 1:].bool() & mask[:, :-1].bool()).sum().to(lengths.dtype)
    elif labels is None or labels.is_floating_point():
        counted = lengths.new_tensor(ids.shape[0])
    else:
        counted = (labels[:, 1:] if shifted else labels).ne(-100).sum().to(lengths.dtype)
    return torch.stack([lengths.new_tensor(ids.shape[0]), counted, lengths.sum(), pairs])
