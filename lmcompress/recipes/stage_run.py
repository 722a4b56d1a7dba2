"""One stage of a run: its model, its methods, its trainer, its folder."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, EvalPrediction, PreTrainedModel, PrinterCallback, set_seed

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.saving import outputs_of
from lmcompress.checkpoint.schema import Provenance
from lmcompress.evaluation import compute_metrics, predictions_from_logits
from lmcompress.method import Method
from lmcompress.model import CompressedModel, library_version
from lmcompress.recipes.building import auto_class, base_model, dtype_of, is_stage
from lmcompress.recipes.class_weights import WeightedLoss, class_weights
from lmcompress.recipes.contents import Dependencies, described
from lmcompress.recipes.files import write_json
from lmcompress.recipes.folder import CHECKPOINTS, checkpoint_to_resume
from lmcompress.recipes.materials import gate_batches
from lmcompress.recipes.measuring import STAGE_FILE
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.parts.base import Running
from lmcompress.recipes.parts.teachers import neighbours
from lmcompress.recipes.planning import Plan, StagePlan
from lmcompress.recipes.progress import StageBar
from lmcompress.recipes.schema import Stage
from lmcompress.trainers import CompressionTrainer


@dataclass(frozen=True)
class _Done:
    """The results of a stage besides its model.

    Attributes:
        log: the trainer's log.
        steps: number of optimizer steps.
        masked: outputs of the masked model before it was cut, for the batches of the round-trip check; None if it
            was not cut, or has changed since.
        reports: report of each part, by its key.
    """

    log: list[dict[str, Any]]
    steps: int
    masked: list[Tensor] | None
    reports: dict[str, Any]


class StageRun:
    """One stage: its model, its methods, its trainer, its folder.

    Args:
        planned: the plan of the run.
        entry: this stage in it.
        folder: folder of the run.
        needs: what the stage depends on; None for a stage that is not part of a run.
        console: console for lines and bars.
        resume: whether to resume from a checkpoint, if there is one.

    Attributes:
        target: folder of the model.
        outcome: results of the stage, as JSON types: fields of
            :class:`~lmcompress.recipes.measuring.Entry`.
    """

    def __init__(
        self, planned: Plan, entry: StagePlan, folder: Path, needs: Dependencies | None, console: Console, resume: bool
    ) -> None:
        self.planned, self.entry = planned, entry
        self.stage: Stage = entry.stage
        self.folder = folder
        self.target = folder / entry.stage.name
        # next to the model, not in it: a checkpoint is replaced as a whole
        self.checkpoints = folder / CHECKPOINTS / entry.stage.name
        self.needs, self.console, self.resume = needs, console, resume
        self.outcome: dict[str, Any] = {}

    def train(self) -> None:
        """Train or change the model, save it, and record the results in ``outcome``."""
        start = time.monotonic()
        checkpoint = None
        if self.stage.trains and self.needs is not None:
            checkpoint = checkpoint_to_resume(
                self.checkpoints, self.needs, resume=self.resume, say=lambda text: self.console.print(f"  {text}")
            )
        if checkpoint is not None:
            self.console.print(f"  resuming from {checkpoint.name}")
        work, prepared = self._begun()
        done = self._trained(work, checkpoint) if self.stage.trains else self._without_training(work)
        # trainer and methods refer to each other; the optimizer's state need not be in memory while a model is reloaded
        gc.collect()
        seconds = time.monotonic() - start
        history = [entry for entry in done.log if "loss" in entry]
        training: dict[str, Any] = {"seconds": round(seconds, 1), "steps": done.steps}
        training |= {"resumed": checkpoint is not None, "last_log": history[-1] if history else {}}
        if self.stage.trains:
            training["bf16"] = self.stage.training.computes_in_bfloat16()
        reports = {part.key: _as_json((prepared | done.reports).get(part.key)) for part in PARTS if part.reports}
        self.outcome = {"training": training, "done": reports}
        made_from = {"hash": "", "stage": described(self.stage)} if self.needs is None else self.needs.to_dict()
        marker = made_from | {"training": training, "log": done.log} | reports
        max_error = self._save(work.model, done.masked, marker, reports)
        verbs = [part.verb for part, _ in self.stage.parts() if part.verb is not None]
        self.console.print(
            f"  {seconds:.0f} s; {', '.join([*verbs, 'saved'])} to {self.target}, reloaded, max abs difference of "
            f"outputs {max_error:.2g}"
        )

    def _save(
        self, model: PreTrainedModel, masked: list[Tensor] | None, marker: dict[str, Any], reports: dict[str, Any]
    ) -> float:
        report = {"recipe": self.planned.recipe.name, "task": self.entry.materials.task.name, "stage": self.stage.name}
        # outputs of the masked model are compared on the device where they were computed
        compressed = CompressedModel(model if masked else model.to("cpu"), self._provenance())
        equivalence = compressed.save_pretrained(
            self.target,
            format=self.stage.save,
            storage=self.stage.storage,
            tokenizer=self.entry.materials.tokenizer,
            batches=gate_batches(self.entry.materials),
            reference=masked,
            report=report | reports,
            write_more=lambda temporary: write_json(temporary / STAGE_FILE, marker),
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return equivalence.max_error

    def _begun(self) -> tuple[Running, dict[str, Any]]:
        """The stage with the model that it trains, made from its start, and a report of how."""
        if is_stage(self.stage.start):
            dtype = dtype_of(self.planned.recipe) or "auto"
            model = auto_class(self.entry.materials.task).from_pretrained(self.folder / self.stage.start, dtype=dtype)
        else:
            model = base_model(self.planned.materials)
        work = Running(
            recipe=self.planned.recipe,
            stage=self.stage,
            folder=self.folder,
            # a part that changes the vocabulary creates the same tokenizer again, from the same texts
            materials=self.planned.materials_of(self.stage.start),
            model=model,
            staged={entry.stage.name: entry.materials for entry in self.planned.stages},
            console=self.console,
            plans=dict(self.entry.plans),
        )
        set_seed(self.planned.recipe.seed)
        prepared = {part.key: part.prepare(spec, work) for part, spec in self.stage.parts()}
        # these rows are tokenized already
        work.materials = self.entry.materials
        return work, prepared

    def _trained(self, work: Running, checkpoint: Path | None) -> _Done:
        parts = self.stage.parts()
        self._rows(work)
        found = {part.key: part.method(spec, work) for part, spec in sorted(parts, key=lambda one: not one[0].begins)}
        methods = {key: method for key, method in found.items() if method is not None}
        trainer, bar = self._trainer(work, list(methods.values()))
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.close()
        masked = None
        cuts = any(method.changes_shapes for method in methods.values())
        if cuts and not any(part.codes for part, _ in parts):
            for method in trainer.methods:
                method.set_active(False)
            trainer.freeze()
            masked = outputs_of(work.model, gate_batches(work.materials))
        trainer.finish()
        reports = {key: getattr(method, "report", None) for key, method in methods.items()}
        return _Done(trainer.state.log_history, trainer.state.global_step, masked, reports)

    def _without_training(self, work: Running) -> _Done:
        reports = {}
        for part, spec in self.stage.parts():
            before = len(work.masked)
            if (report := part.apply(spec, work)) is not None:
                reports[part.key] = report
                # earlier masked outputs are no reference after further changes
                del work.masked[:before]
        return _Done([], 0, work.masked or None, reports)

    def _rows(self, work: Running) -> None:
        augmentation = self.stage.augmentation
        near = neighbours(work) if augmentation is not None and augmentation.replaces else None
        self.data = work.materials.rows(augmentation, work.teacher_tokenizer, near)
        work.train, work.collate = self.data.train, work.materials.collator(work.teacher_tokenizer)

    def _trainer(self, work: Running, methods: Sequence[Method]) -> tuple[CompressionTrainer, StageBar]:
        task = work.materials.task
        args = self.stage.training.trainer_arguments(
            str(self.checkpoints),
            seed=self.planned.recipe.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
        evaluates = args.eval_strategy != "no"
        classifies = not task.kind.per_token
        bar = StageBar(self.console, self.stage.name)
        trainer = CompressionTrainer(
            work.model,
            args,
            methods=methods,
            train_dataset=work.train,
            eval_dataset=self.data.validation if evaluates else None,
            data_collator=work.collate,
            processing_class=work.materials.tokenizer,
            compute_loss_func=self._label_loss(),
            compute_metrics=self._compute_metrics if evaluates and classifies else None,
            callbacks=[bar],
            # outputs of the masked model are taken between the last step and the cut
            auto_finish=False,
            float32_weights=self.planned.recipe.dtype == "float32",
        )
        trainer.remove_callback(PrinterCallback)
        return trainer, bar

    def _label_loss(self) -> WeightedLoss | None:
        """The loss on the labels, if it is not the model's own."""
        materials = self.entry.materials
        weights = class_weights(materials.data, materials.recipe.task.class_weights)
        return None if weights is None else WeightedLoss(weights)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        task = self.entry.materials.task
        said = predictions_from_logits(prediction.predictions, task.kind.value)
        return compute_metrics(task.metrics, said, prediction.label_ids)

    def _provenance(self) -> Provenance:
        recipe = self.planned.recipe
        return Provenance(
            library_version=library_version(),
            base_model=_public_name(recipe.model) if isinstance(recipe.model, str) else "",
            recipe=recipe.name,
            methods=tuple(dict.fromkeys((*_methods_before(self.planned, self.stage), *_methods_of(self.stage)))),
        )


def _methods_before(planned: Plan, stage: Stage) -> tuple[str, ...]:
    """The methods by which a stage's start was made: their changes are still in the model."""
    if is_stage(stage.start):
        # not from its config: a stock config records nothing
        start = next(entry.stage for entry in planned.stages if entry.stage.name == stage.start)
        return (*_methods_before(planned, start), *_methods_of(start))
    if not isinstance(planned.recipe.model, str):
        return ()
    recorded = recorded_compression(AutoConfig.from_pretrained(planned.recipe.model))
    return recorded.provenance.methods if recorded is not None else ()


def _methods_of(stage: Stage) -> tuple[str, ...]:
    return tuple(part.applied for part, _ in stage.parts())


def _public_name(model: str) -> str:
    """A name on the Hub or a relative path as it is; of an absolute path the last part: a config may be published."""
    return (Path(model).name if Path(model).is_absolute() else model)[:1024]


def _as_json(report: Any) -> Any:
    if isinstance(report, list):
        return [one.to_dict() for one in report]
    return None if report is None else report.to_dict()
