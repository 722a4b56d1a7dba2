"""The training loop: a ``Trainer`` whose loss is a sum of named terms, correct under accumulation and DDP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lmcompress.clustering.config import SharingConfig
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.teachers import Teachers
from lmcompress.errors import LmcompressError
from lmcompress.families.inside import inner_model, input_names, with_decoder_inputs
from lmcompress.method import UNITS, Step, SteppedMethod, Term, Unit
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.quantization.config import QuantizationConfig
from lmcompress.trainers.building import Asked, Methods
from lmcompress.trainers.counting import count_vector, exact, reading_of
from lmcompress.trainers.labels import LabelLoss, first_tensor, overridden_loss
from lmcompress.trainers.lifecycle import MethodsTrainer
from lmcompress.trainers.monitoring import check_alive, gradient_shares
from lmcompress.trainers.sampling import length_grouped
from lmcompress.trainers.schedulers import add_group

# inputs that a teacher may take and the student not; Trainer removes columns that the student does not know
TEACHER_COLUMNS = ("token_type_ids", "teacher_input_ids", "teacher_attention_mask", "teacher_token_type_ids")


@dataclass
class _Logged:
    """Sum of the means of one term since the last log, and the number of optimizer steps it took part in."""

    total: Tensor
    measured: bool
    steps: int = 0
    last_step: int = -1


class CompressionTrainer(MethodsTrainer):
    """A :class:`~transformers.Trainer` to which compression methods add loss terms.

    Without methods it trains as ``Trainer`` does, except for the denominator: every term, including the loss on the
    labels, is a mean over the whole optimizer step, all micro-batches and processes, so that a batch of 8 × 1 equals 1
    × 8. (For GPT-2, ``Trainer`` 5.17 and 5.23 divide by the labels before the shift, this one by the tokens predicted.)

    Each term is logged by name (``loss_kd``, ``loss_hidden_mse_0``, …), unweighted. Checkpoints contain the state of
    the methods and resume bit-exact on a CPU; only the student is saved at the end.

    The finished model is what the trainer ends with: :meth:`train` calls :meth:`finish`, :meth:`evaluate` then measures
    the cut and packed model, and :meth:`save_model` and :meth:`push_to_hub` write it.

    Args:
        model: the student; a :class:`CompressedModel` or a compiled model is unwrapped. Half-precision weights are
            trained in float32.
        args: as for ``Trainer``, and so on to ``preprocess_logits_for_metrics``.
        data_collator: as for ``Trainer``.
        train_dataset: as for ``Trainer``.
        eval_dataset: as for ``Trainer``.
        processing_class: as for ``Trainer``; saved with the model.
        model_init: as for ``Trainer``; every call of :meth:`train` begins with a new student and new methods.
        compute_loss_func: as for ``Trainer``: ``f(outputs, labels, num_items_in_batch=…)`` in place of the model's own
            loss on the labels; terms of methods are added to it. What it returns must be normalized for the whole
            optimizer step, which ``num_items_in_batch`` is for.
        compute_metrics: as for ``Trainer``.
        callbacks: as for ``Trainer``; they see the values that methods log.
        optimizers: as for ``Trainer``; parameters of methods become further groups, which follow the schedule.
        optimizer_cls_and_kwargs: as for ``Trainer``.
        preprocess_logits_for_metrics: as for ``Trainer``.
        methods: further compression methods, or a function that creates them, in the order in which they act; those
            that cut come before quantization.
        teacher: a model, another source of outputs, or several of them. Borrowed: its mode and flags are as they were
            when training ends.
        distillation: compared features and their weights; default: logits and labels, or for a quantized student
            :func:`~lmcompress.trainers.building.default_distillation`.
        pruning: structured pruning.
        quantization: quantization in training.
        sparsity: pruning of single weights.
        sharing: clustering of weights.
        calibration: batches for scores and ranges that need data; default: rows of the training data.
        cost: a latency table, for a latency target of ``pruning``.
        auto_finish: whether :meth:`train` finishes the methods. Without it :meth:`train` may be called several times,
            and :meth:`finish` after the last.
        float32_weights: whether half-precision weights are trained in float32; with ``False``, as they are.
        gradient_shares: every n optimizer steps, also log each term's share of the norm of the student's gradient
            (``share_kd``, …); costs one more backward pass for each term in that step. 0: never.

    Attributes:
        student: the model, not wrapped.
        methods: the methods of the run.
        compressed_model: the student as :class:`CompressedModel`.

    Raises:
        LmcompressError: If the arguments are not ``TrainingArguments``, several GPUs in one process are requested,
            which the terms do not support, or a method refuses the model.
    """

    # terms are divided by the counts of the step; transformers checks from 5.19 on, before it divided without loss
    # kwargs
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        methods: Methods = (),
        teacher: Teachers | None = None,
        distillation: DistillationConfig | None = None,
        pruning: PruningConfig | None = None,
        quantization: QuantizationConfig | None = None,
        sparsity: SparsityConfig | None = None,
        sharing: SharingConfig | None = None,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        cost: CostModel | None = None,
        auto_finish: bool = True,
        float32_weights: bool = True,
        gradient_shares: int = 0,
    ) -> None:
        _check_arguments(args)
        asked = Asked(
            methods, teacher, distillation, pruning, quantization, sparsity, sharing, calibration, cost
        )  # fmt: skip
        self._asked = self._completed(asked, args)
        self.methods = []
        self.auto_finish = auto_finish
        self.gradient_shares = gradient_shares
        self._float32_weights = float32_weights
        self._counts: dict[Unit, Tensor] | None = None
        self._items: Tensor | int | None = None
        self._logged: dict[str, _Logged] = {}
        self._silent_steps: dict[str, int] = {}
        self._shares: dict[str, float] = {}
        self._own_parameters: list[nn.Parameter] = []
        self._known: WeakKeyDictionary[Any, tuple[frozenset[str], tuple[bool, bool, bool]]] = WeakKeyDictionary()
        super().__init__(
            None if model is None else self._adopt(model), args, data_collator, train_dataset, eval_dataset,
            processing_class, model_init, compute_loss_func, compute_metrics, callbacks, optimizers,
            optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        self._refuse_data_parallel()
        # without this, transformers before 5.19 passes num_items_in_batch to the model and skips its own division, or
        # not, depending on the model's signature
        self.model_accepts_loss_kwargs = False
        # and not with a loss function of the user's
        old = not hasattr(Trainer, "loss_is_scaled_for_ga")
        self._divides_by_accumulation = old and self.compute_loss_func is None
        self._label_loss = LabelLoss(self)
        self._heed_overrides()
        self._prepare_methods()

    def _heed_overrides(self) -> None:
        """Put what the terms and the methods need around functions that a subclass has in place of ours."""
        self._overridden = overridden_loss(self, CompressionTrainer)
        if self._overridden is not None:
            self.loss_is_scaled_for_ga = True
            self.compute_loss = functools.partial(  # type: ignore[method-assign]
                CompressionTrainer.compute_loss, self
            )
        if type(self).create_optimizer is not CompressionTrainer.create_optimizer:
            self.create_optimizer = self._create_with_groups  # type: ignore[method-assign]

    def _refuse_data_parallel(self) -> None:
        if self.args.n_gpu > 1:
            raise LmcompressError(
                f"{self.args.n_gpu} GPUs in one process would split batches behind the hooks' back: start with "
                "'torchrun --nproc_per_node=N' or 'accelerate launch', or set CUDA_VISIBLE_DEVICES to one"
            )

    def _completed(self, asked: Asked, args: TrainingArguments | None) -> Asked:
        """What was asked for, completed by a subclass and by the arguments, or refused."""
        given = getattr(args, "asked", None)
        return asked if given is None else given(asked)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step; counts all units in them, over all processes.

        Args:
            epoch_iterator: iterator of the data loader.
            num_batches: number of micro-batches.
            device: device of the counts.

        Returns:
            As in ``Trainer``; no batches where the last step was taken before a checkpoint was resumed from, after
            which ``Trainer`` would take one more.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        replacing = [method for method in self.methods if method.replaces_batches(self.state.global_step)]
        if batches and replacing:
            with self._inactive():
                for method in replacing:
                    batches = method.replace_batches(batches, self.state.global_step)
            items = self._get_num_items_in_batch(batches, device)
        # not after the step: a gradient scaler skips steps that overflow, and Trainer zeroes its model only
        for parameter in self._own_parameters:
            parameter.grad = None
        if batches:
            total = torch.stack([self._count(batch).to(device) for batch in batches]).sum(0)
            if self.args.world_size > 1:
                total = self.accelerator.reduce(total, reduction="sum")
            self._counts = dict(zip(UNITS, total.unbind(), strict=True))
        self._items = items
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

        A subclass's own is the loss on the labels, in training and in evaluation.

        Args:
            model: the student, possibly wrapped.
            inputs: one micro-batch.
            return_outputs: whether to return the student's outputs too.
            num_items_in_batch: as in ``Trainer``; in training, units are counted in :meth:`get_batch_samples`.

        Returns:
            The loss, or ``(loss, outputs)``.

        Raises:
            LmcompressError: If there is nothing to train on, or a term has no gradient.
        """
        if not model.training:
            if self._overridden is not None and not self._overridden.running:
                return self._overridden.evaluated(model, dict(inputs), return_outputs, num_items_in_batch)
            return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        if self._overridden is not None and self._overridden.running:
            return self._overridden.ordinary(model, inputs, return_outputs)
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
        terms = self._run(step, label_weight)
        for method in self.methods:
            new = method.loss_terms(step)
            if clash := sorted(terms.keys() & new.keys()):
                raise LmcompressError(
                    f"two methods have a loss term {clash[0]!r}; give both teachers to one Distillation"
                )
            terms |= new
        if not terms and not self._label_loss.labels_in(inputs):
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
            loss = torch.stack([value.to(exact(value.device)) for value in weighted.values()]).sum().float()
        if not weighted or self.args.world_size > 1:
            # schedules may begin at 0; and DDP waits for every parameter that the outputs depend on
            nothing = 0.0 * first_tensor(step.outputs).float().sum()
            loss = loss + nothing if weighted else nothing
        return (loss, step.outputs) if return_outputs else loss

    def _run(self, step: Step, label_weight: float) -> dict[str, Term]:
        """Run the student, and compute the loss on the labels."""
        inputs = step.inputs
        with_labels = label_weight > 0 and bool(self._label_loss.labels_in(inputs))
        if self._overridden is not None and with_labels:
            step.outputs, term = self._overridden(step, inputs, label_weight)
            return {"label": term}
        labels = self._label_loss.model_inputs(inputs) if with_labels else {}
        as_mapping = {} if getattr(self._config_for(inputs), "return_dict", True) else {"return_dict": True}
        step.outputs = step.model(**step.student_inputs, **labels, **as_mapping)
        return {"label": self._label_loss.term(step.outputs, inputs, label_weight)} if with_labels else {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of ``Trainer``, with the methods' own parameters as further groups without weight decay.

        Args:
            model: as for ``Trainer``.

        Returns:
            The optimizer.
        """
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        return self._with_groups(optimizer)

    def _create_with_groups(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of a subclass of the user's, which may know nothing of methods."""
        made = type(self).create_optimizer(self, *args, **kwargs)
        # as in Trainer, what counts is the attribute
        return self._with_groups(made if self.optimizer is None else self.optimizer)

    def _with_groups(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for method in self.methods:
            parameters = []
            for group in method.parameter_groups():
                # a second train() arrives here with the optimizer of the first
                if not known.intersection(map(id, group["params"])):
                    add_group(optimizer, self.lr_scheduler, {"weight_decay": 0.0, **group})
                    parameters += list(group["params"])
            if parameters:
                self._care_for(optimizer, parameters, method.max_norm)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last log, and what methods measure, before any callback sees them.

        Args:
            logs: the entry of ``Trainer``.
            start_time: as for ``Trainer``.

        Raises:
            LmcompressError: If a term was exactly zero for 50 steps or more.
        """
        if "loss" in logs and (self._logged or self.methods):
            for name, logged in self._logged.items():
                value = float(self.accelerator.gather(logged.total.reshape(1)).sum()) / logged.steps
                logs[name if logged.measured else f"loss_{name}"] = value
                if not logged.measured:
                    self._silent_steps[name] = self._silent_steps.get(name, 0) + logged.steps if value == 0 else 0
                    check_alive(name, self._silent_steps[name])
            logs |= {f"share_{name}": share for name, share in self._shares.items()}
            for method in self.methods:
                if isinstance(method, SteppedMethod) and not self.finished:
                    logs |= method.metrics()
            self._logged, self._shares = {}, {}
        super().log(logs) if start_time is None else super().log(logs, start_time)

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
        with self._inactive():
            return super().prediction_step(model, kept, prediction_loss_only, ignore_keys)

    def _model_for(self, batch: Mapping[str, Any]) -> Any:
        """The model, not wrapped, that this batch is for."""
        return self.student

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        names, _ = self._known_of(inputs)
        other = ("labels", *self.label_names)
        kept = {k: v for k, v in inputs.items() if not k.startswith("teacher_") and k not in other}
        # a column may be for the teacher only, such as BERT's token types for a DistilBERT
        kept = {k: v for k, v in kept.items() if k in names} if "input_ids" in names else kept
        if "decoder_input_ids" not in names or "labels" not in inputs:
            return kept
        # from the labels, which the model does not always get, as it would make them itself
        made = with_decoder_inputs(
            inner_model(self._model_for(inputs), prompts=True), kept | {"labels": inputs["labels"]}
        )
        return {k: v for k, v in made.items() if k != "labels"}

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        return count_vector(batch, *self._reading(batch))

    def _reading(self, batch: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        return self._known_of(batch)[1]

    def _known_of(self, batch: Mapping[str, Any]) -> tuple[frozenset[str], tuple[bool, bool, bool]]:
        """Names of the inputs of the model that a batch is for, and how it reads them; looked up once a model."""
        model = self._model_for(batch)
        if model not in self._known:
            inner = inner_model(model, prompts=True)
            self._known[model] = input_names(inner), reading_of(inner)
        return self._known[model]

    def _config_for(self, batch: Mapping[str, Any]) -> Any:
        return getattr(self._model_for(batch), "config", None)

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


def _mean(term: Term, counts: Mapping[Unit, Tensor]) -> Tensor:
    return term.total / counts[term.unit].clamp(min=1)


def _check_arguments(args: Any) -> None:
    if args is None:
        return
    if not isinstance(args, TrainingArguments):
        raise LmcompressError(
            f"args must be TrainingArguments, got {type(args).__name__}. A trainer's arguments are in the order of "
            "Trainer: (model, args, data_collator, train_dataset, …); what methods need is given by keyword: teacher=, "
            "distillation=, pruning=, quantization=, methods="
        )
