"""Several tasks in one run: students that share a body, a teacher for each task, batches of one task at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.data import MultiTaskCollator, MultiTaskDataset, TaskSampledBatches
from lmcompress.distillation import Distillation
from lmcompress.errors import CheckpointError, LmcompressError, nearest
from lmcompress.method import Method, Step, Term
from lmcompress.model import CompressedModel
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.saving import write_finished

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class MultiTaskStudent(nn.Module):
    """One model for each task; with a shared body, all are heads on one.

    Args:
        models: by task; a task's name is also that of its folder.
        share_backbone: whether all use the base model of the first, whose weights are kept; the others' are dropped.

    Raises:
        LmcompressError: If there are no models, a name is not a valid folder, or bodies differ in shape.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel | CompressedModel], *, share_backbone: bool = True) -> None:
        super().__init__()
        if not models:
            raise LmcompressError("a multi-task student needs at least one task, got none")
        for task in models:
            if not re.fullmatch(r"\w[\w-]*", task):
                raise LmcompressError(f"a task's name is made of letters, digits, - and _, got {task!r}")
        self.models = {task: CompressedModel.wrap(model).model for task, model in models.items()}
        if share_backbone:
            first, *others = self.models.values()
            for model in others:
                _share(first, model)
        # a list, since ModuleDict refuses names such as "keys"
        self.heads = nn.ModuleList(self.models.values())

    def model_for(self, task: str) -> PreTrainedModel:
        """The model of a task.

        Args:
            task: its name.

        Returns:
            The model.

        Raises:
            LmcompressError: If the task does not exist.
        """
        if task not in self.models:
            raise LmcompressError(f"there is no task {task!r}{nearest(task, self.models)}")
        return self.models[task]

    def forward(self, task: str, **inputs: Any) -> Any:
        """Runs the model of a task.

        Args:
            task: its name.
            **inputs: inputs of that model.

        Returns:
            its outputs.
        """
        return self.model_for(task)(**inputs)


class MultiTaskDistillation(Method):
    """A method that passes every batch to the distillation of its task; terms are named ``task/term``.

    A step's loss is a mean over all units of the step, whatever their tasks.

    Args:
        methods: by task.
    """

    name = "multi_task_distillation"
    goes_on = True
    captures = True

    def __init__(self, methods: Mapping[str, Distillation]) -> None:
        self.methods = dict(methods)
        self._task = ""

    def fresh(self) -> MultiTaskDistillation:
        """The same, with fresh methods of the tasks."""
        return MultiTaskDistillation({task: method.fresh() for task, method in self.methods.items()})

    def prepare(self, trainer: Any) -> None:
        """Prepare each task's distillation for its student; see :class:`~lmcompress.method.Method`.

        Args:
            trainer: a :class:`MultiTaskTrainer`.

        Raises:
            LmcompressError: If tasks have no distillation, or one does not fit; the message names the task.
        """
        if set(self.methods) != set(trainer.student.models):
            raise LmcompressError(
                f"the student's tasks are {sorted(trainer.student.models)}, the teachers' {sorted(self.methods)}"
            )
        if writes := [task for task, method in self.methods.items() if method.config.on_policy is not None]:
            raise LmcompressError(
                f"task {writes[0]!r}: on_policy lets the student of one task write texts; leave it out, or distil this "
                "task by itself"
            )
        for task, method in self.methods.items():
            try:
                method.attach(trainer.student.models[task], trainer.args.device, trainer.accelerator.autocast)
            except LmcompressError as error:
                raise LmcompressError(f"task {task!r}: {error}") from error
        self.set_active(False)

    def before_forward(self, step: Step) -> None:
        """Let only the hooks of the batch's task record: those of several tasks may be on the same modules.

        Args:
            step: the step, of a batch with ``"task"``.
        """
        self._task = step.inputs["task"]
        for task, method in self.methods.items():
            method.set_active(task == self._task)
        self.methods[self._task].before_forward(step)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The terms of the batch's task.

        Args:
            step: the step, with outputs.

        Returns:
            The terms, by ``task/term``.
        """
        terms = self.methods[self._task].loss_terms(step)
        return {f"{self._task}/{name}": _renamed(self._task, term) for name, term in terms.items()}

    def label_weight(self, progress: float) -> float:
        """Factor of the loss on the labels in the task of this batch.

        Args:
            progress: share of the training done.
        """
        return self.methods[self._task].label_weight(progress)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all tasks."""
        return [group for method in self.methods.values() for group in method.parameter_groups()]

    def modules(self) -> dict[str, nn.Module]:
        """Modules of all tasks."""
        return {f"{task}/{n}": m for task, method in self.methods.items() for n, m in method.modules().items()}

    @property
    def max_norm(self) -> float | None:
        """The minimum of all tasks'."""
        return min((method.max_norm for method in self.methods.values() if method.max_norm is not None), default=None)

    def set_active(self, active: bool) -> None:
        """Nothing is recorded until a batch names its task.

        Args:
            active: unused.
        """
        for method in self.methods.values():
            method.set_active(False)

    def finish(self) -> None:
        """Remove all hooks."""
        for method in self.methods.values():
            method.finish()

    def release(self) -> None:
        """Give all teachers back."""
        for method in self.methods.values():
            method.release()

    def resume(self, trainer: Any) -> None:
        """Take all teachers again.

        Args:
            trainer: as for :meth:`prepare`.
        """
        for method in self.methods.values():
            method.resume(trainer)


class MultiTaskTrainer(CompressionTrainer):
    """The training loop for a :class:`MultiTaskStudent`; tasks are sampled by the tempered share of their rows.

    Checkpoints and :meth:`save_model` write each task's model to a folder of its name. Evaluate the models one by one.

    Args:
        model: the student.
        args: as for ``Trainer``.
        methods: usually one :class:`MultiTaskDistillation`.
        train_datasets: tokenized rows by task.
        collators: by task.
        tau: 1 samples tasks in proportion to their rows, 0 uniformly.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: If the tasks of model, data and collators are not the same.
    """

    def __init__(
        self,
        model: MultiTaskStudent,
        args: TrainingArguments | None = None,
        *,
        methods: Sequence[Method] = (),
        train_datasets: Mapping[str, Sequence[dict[str, Any]]],
        collators: Mapping[str, Collate],
        tau: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for what, given in (("train_datasets", train_datasets), ("collators", collators)):
            if set(given) != set(model.models):
                raise LmcompressError(
                    f"the student's tasks are {sorted(model.models)}, those of {what} {sorted(given)}"
                )
        dataset = MultiTaskDataset(train_datasets)
        super().__init__(
            model, args, train_dataset=dataset, data_collator=MultiTaskCollator(collators), methods=methods, **kwargs
        )
        self.tau = tau

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one task each, on every process the same task."""
        batches = TaskSampledBatches(
            self.train_dataset.sizes,
            self._train_batch_size,
            tau=self.tau,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.args.world_size,
        )
        # accelerate passes the epoch to the sampler of a batch sampler that it has split between processes
        batches.sampler = batches  # type: ignore[attr-defined]
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _write_checkpoint(self, folder: str | None, internal: bool) -> None:
        if self.args.should_save:
            for task, model in self.student.models.items():
                model.save_pretrained(Path(folder or self.args.output_dir) / task)

    def _write_finished(self, folder: Path) -> None:
        tokenizer = self.processing_class
        for task, model in self.student.models.items():
            write_finished(CompressedModel(model), folder / task, tokenizer=tokenizer)

    @property
    def _saves_compressed(self) -> bool:
        return True

    def _model_for(self, batch: Mapping[str, Any]) -> PreTrainedModel:
        model: PreTrainedModel = self.student.model_for(batch["task"])
        return model

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._student_inputs(inputs), "task": inputs["task"]}

    def _load_best_student(self) -> None:
        self._load_student(self.state.best_model_checkpoint, None)

    def _load_student(self, folder: str, model: nn.Module | None) -> None:
        for task, head in self.student.models.items():
            if not (Path(folder) / task).is_dir():
                raise CheckpointError(f"{folder} has no folder {task!r}: it was written for other tasks")
            saved = type(head).from_pretrained(Path(folder) / task, dtype=head.dtype)
            head.load_state_dict(saved.state_dict())


def _share(first: PreTrainedModel, model: PreTrainedModel) -> None:
    body, other = first.base_model, model.base_model
    shapes = [{name: tensor.shape for name, tensor in part.state_dict().items()} for part in (body, other)]
    if type(body) is not type(other) or shapes[0] != shapes[1]:
        raise LmcompressError(
            f"tasks can share a body of one class and shape only, got {type(body).__name__} of {type(first).__name__} "
            f"and {type(other).__name__} of {type(model).__name__}; use share_backbone=False"
        )
    setattr(model, model.base_model_prefix, body)
    model.tie_weights()


def _renamed(task: str, term: Term) -> Term:
    parts = None if term.parts is None else {f"{task}/{name}": part for name, part in term.parts.items()}
    return replace(term, parts=parts)
