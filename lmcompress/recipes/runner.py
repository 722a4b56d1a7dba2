"""Carries out the plan of a recipe: trains the stages, measures all of them, writes one self-contained folder."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from lmcompress.checkpoint.config import Provenance, recorded_compression
from lmcompress.clustering import WeightSharing
from lmcompress.data import TaskKind, nearest_words
from lmcompress.distillation import (
    Distillation,
    DistillationConfig,
    LiveTeacher,
    StoredTeacher,
    TeacherStore,
    load_teacher,
)
from lmcompress.distillation.capture import extract, resolve
from lmcompress.distillation.matches import match_for
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import compute_metrics, predictions_from_logits
from lmcompress.method import Method
from lmcompress.model import CompressedModel, library_version, outputs_of
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.unstructured import Sparsity
from lmcompress.pruning.vocabulary.report import VocabularyReport
from lmcompress.quantization.method import Quantization
from lmcompress.quantization.post_training import quantize
from lmcompress.quantization.report import QuantizationReport
from lmcompress.recipes.building import (
    Materials,
    auto_class,
    base_model,
    different_tokenizer,
    drawn_batches,
    gate_batches,
    is_stage,
    load_tokenizer,
    make_student,
)
from lmcompress.recipes.compact import compact_notes, make_compact
from lmcompress.recipes.files import write_json, write_text
from lmcompress.recipes.loading import dump_recipe
from lmcompress.recipes.measuring import Entry, measure, update_cards
from lmcompress.recipes.planning import Plan, StagePlan, plan, run_folder
from lmcompress.recipes.progress import StageBar, quiet_libraries
from lmcompress.recipes.pruning import calibration_batches, prune_stage_vocabulary, pruning_notes
from lmcompress.recipes.quantization import quantization_notes
from lmcompress.recipes.schema import Recipe, Stage, StoreSpec
from lmcompress.recipes.weights import change_weights, seeded, weights_notes
from lmcompress.reporting import write_report
from lmcompress.students import CompactReport
from lmcompress.trainers import CompressionTrainer

STAGE_FILE = "stage.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: with ``recipe.yaml``, ``results.json``, ``metrics.json``, ``report.md``, ``report.html``, ``plots/``
            and the models.
        report: as ``results.json`` has it.
        models: name of a stage to the folder of its model.
    """

    folder: Path
    report: dict[str, Any]
    models: dict[str, Path]


def run(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Train the recipe's stages, measure them beside each other, and write everything into one folder.

    A stage that is finished is not trained again as long as what it was made from has not changed; one that was
    interrupted goes on from its
    last checkpoint. So the same call after a crash takes up where it was.

    Args:
        recipe: validated.
        output: folder; default: the recipe's.
        overwrite: train stages anew that were made by a different recipe, instead of refusing.
        resume: go on from checkpoints of an interrupted stage; else it begins anew.
        console: where headlines and bars go.

    Raises:
        LmcompressError: the recipe does not fit its rows or models (see :func:`~lmcompress.recipes.planning.plan`),
            or the folder holds
            another recipe's stages. Both are found before anything is trained.
    """
    console = console or Console()
    folder = run_folder(recipe, output)
    if folder.exists() and not folder.is_dir():
        raise LmcompressError(f"{folder} is a file; the output of a run is a folder")
    with quiet_libraries():
        console.print(f"[bold]{recipe.name}[/]: checking rows, models and layers")
        planned = plan(recipe, folder, measure=True)
        hashes = stage_hashes(planned)
        _check_folder(folder, planned, hashes, overwrite)
        _begin(folder, recipe)
        models: dict[str, Path] = {}
        for number, stage in enumerate(planned.stages, 1):
            target = folder / stage.stage.name
            models[stage.stage.name] = target
            headline = f"[bold]{number}/{len(planned.stages)} {stage.stage.name}[/] ({stage.role}, {stage.shape})"
            if _finished_hash(target) == hashes[stage.stage.name]:
                console.print(f"{headline}: finished before, kept")
                continue
            does = f"{stage.steps:,} steps on {stage.train_rows:,} rows" if stage.steps else "without training"
            console.print(f"{headline}: {does}")
            StageRun(planned, stage, folder, hashes[stage.stage.name], console, resume).train()
            gc.collect()
        if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
            (folder / CHECKPOINTS).rmdir()
        console.print("[bold]measuring[/] quality, size and latency")
        report = _measured(planned, folder, models)
        write_report(report, folder)
        update_cards(report, list(models.values()))
    return RunResult(folder, report, models)


def stage_hashes(planned: Plan) -> dict[str, str]:
    """A hash for each stage of all that its model depends on: its own description, the task, the model, and the
    stages before it.

    Args:
        planned: the plan.
    """
    recipe = planned.recipe
    common = recipe.model_dump(mode="json", include={"model", "task", "seed"})
    hashes: dict[str, str] = {}
    for entry in planned.stages:
        stage = entry.stage
        needs = [name for name in (stage.start, *entry.teachers) if name in hashes]
        # the control flag only adds another stage
        own = stage.model_dump(mode="json", exclude={"control"}, exclude_none=True)
        text = json.dumps([common, own, [hashes[name] for name in needs]], sort_keys=True)
        hashes[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


@dataclass(frozen=True)
class _Done:
    """What became of a stage's model, beside the model.

    Attributes:
        log: of the trainer.
        steps: optimizer steps.
        pruning: what was cut, if anything.
        quantization: what was quantized, if anything.
        masked: outputs of the masked model before it was cut, for the gate's batches; None where it was quantized
            since, by which an input on the edge may be rounded the other way, or its weights were changed.
        weights: what was done to single weights, by the name of the method, as JSON types.
    """

    log: list[dict[str, Any]]
    steps: int
    pruning: PruningReport | None
    quantization: QuantizationReport | None
    masked: list[Tensor] | None
    weights: dict[str, dict[str, Any]]


class StageRun:
    """One stage: its model, its teachers, its trainer, its folder.

    Args:
        planned: the whole run.
        entry: this stage in it.
        folder: of the run.
        digest: hash of all that the stage depends on.
        console: where lines and bars go.
        resume: go on from a checkpoint, if there is one.
    """

    def __init__(
        self, planned: Plan, entry: StagePlan, folder: Path, digest: str, console: Console, resume: bool
    ) -> None:
        self.planned = planned
        self.entry = entry
        self.stage: Stage = entry.stage
        self.folder = folder
        self.target = folder / entry.stage.name
        # beside the model, not in it: a checkpoint is replaced as a whole
        self.checkpoints = folder / CHECKPOINTS / entry.stage.name
        self.digest = digest
        self.console = console
        self.resume = resume
        self.materials: Materials = entry.materials
        self.vocabulary: VocabularyReport | None = None
        self.compact: list[CompactReport] | None = None
        self.outcome: dict[str, Any] = {}
        self.recipe = planned.recipe
        self.auto_class = auto_class(self.materials.task)

    def train(self) -> None:
        """Train, prune, save; ``outcome`` says afterwards what became of it, as JSON types."""
        start = time.monotonic()
        checkpoint = self._prepare_checkpoints() if self.stage.trains else None
        if checkpoint is not None:
            self.console.print(f"  going on from {checkpoint.name}")
        model = self._model()
        done = self._trained(model, checkpoint) if self.stage.trains else self._without_training(model)
        # trainer and methods know one another; the optimizer's state need not be there while the gate reloads a model
        gc.collect()
        seconds = time.monotonic() - start
        history = [entry for entry in done.log if "loss" in entry]
        training: dict[str, Any] = {"seconds": round(seconds, 1), "steps": done.steps}
        training |= {"resumed": checkpoint is not None, "last_log": history[-1] if history else {}}
        more = {
            "compact": None if self.compact is None else [report.to_dict() for report in self.compact],
            "pruning": None if done.pruning is None else done.pruning.to_dict(),
            "quantization": None if done.quantization is None else done.quantization.to_dict(),
            "sparsity": done.weights.get("sparsity"),
            "sharing": done.weights.get("sharing"),
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_dict(),
        }
        self.outcome = {"training": training} | more
        marker = {"hash": self.digest, "stage": _described(self.stage), "training": training, "log": done.log} | more
        report = {"recipe": self.recipe.name, "task": self.materials.task.name, "stage": self.stage.name} | more
        # outputs of the masked model are compared where they were made
        compressed = CompressedModel(model if done.masked else model.to("cpu"), self._provenance())
        equivalence = compressed.save_pretrained(
            self.target,
            format=self.stage.save,
            storage=self.stage.storage,
            tokenizer=self.materials.tokenizer,
            batches=gate_batches(self.materials),
            reference=done.masked,
            report=report,
            write_more=lambda temporary: write_json(temporary / STAGE_FILE, marker),
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        done_to_it = {"masked, cut": done.pruning, "packed": done.quantization}
        compared = ", ".join([*(name for name, report in done_to_it.items() if report is not None), "saved"])
        self.console.print(
            f"  {seconds:.0f} s; {compared} to {self.target}, reloaded, greatest difference of "
            f"any output {equivalence.max_error:.2g}"
        )

    def _model(self) -> PreTrainedModel:
        if is_stage(self.stage.start):
            start = self.auto_class.from_pretrained(self.folder / self.stage.start)
        else:
            start = base_model(self.planned.materials)
        if self.stage.vocabulary is not None:
            # the plan has made the same tokenizer from the same texts
            before = self.planned.materials_of(self.stage.start)
            _, self.vocabulary = prune_stage_vocabulary(start, before, self.stage.vocabulary)
        set_seed(self.recipe.seed)
        model = make_student(start, self.stage.student, self.recipe.seed)
        if self.stage.compact is not None:
            self.compact = make_compact(self.stage.compact, model, self.materials, self.recipe.seed)
        return model

    def _trained(self, model: PreTrainedModel, checkpoint: Path | None) -> _Done:
        pruning = None
        if self.entry.pruning is not None:
            pruning = StructuredPruning(self.entry.pruning.config, cost=self.entry.pruning.cost)
        quantization = None if self.entry.quantization is None else Quantization(self.entry.quantization.config)
        seed = self.recipe.seed
        sparsity = None if self.stage.sparsity is None else Sparsity(seeded(self.stage.sparsity, seed))
        sharing = None if self.stage.sharing is None else WeightSharing(seeded(self.stage.sharing, seed))
        # zeros first, so that nothing is shared or quantized that goes; gates are hooked before distillation captures
        chosen: list[Method | None] = [sparsity, pruning, sharing, quantization]
        trainer, bar = self._trainer(model, [method for method in chosen if method is not None])
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.close()
        masked = None
        if pruning is not None and quantization is None:
            for method in trainer.methods:
                method.set_active(False)
            if sparsity is not None:
                sparsity.settle()
            pruning.settle()
            masked = outputs_of(model, gate_batches(self.materials))
        trainer.finish()
        return _Done(
            trainer.state.log_history,
            trainer.state.global_step,
            None if pruning is None else pruning.report,
            None if quantization is None else quantization.report,
            masked,
            {
                method.name: method.report.to_dict()
                for method in (sparsity, sharing)
                if method is not None and method.report is not None
            },
        )

    def _without_training(self, model: PreTrainedModel) -> _Done:
        entry, masked = self.entry, []
        pruned = quantized = None
        if torch.cuda.is_available() and (entry.pruning or entry.quantization or self.stage.sparsity):
            model.to("cuda")
        if entry.pruning is not None:
            pruned = prune(
                model,
                entry.pruning.config,
                calibration_batches(self.materials, entry.pruning.config),
                cost=entry.pruning.cost,
                before_cut=lambda gated: masked.extend(outputs_of(gated, gate_batches(self.materials))),
            )
        weights = change_weights(self.stage, model, self.materials, self.recipe.seed)
        if entry.quantization is not None:
            config = entry.quantization.config
            batches = drawn_batches(self.materials, config.calibration_rows, config.calibration_batch_size, config.seed)
            quantized = quantize(model, config, batches, method=entry.quantization.method or "rtn", progress=False)
        compared = pruned is not None and quantized is None and not weights
        return _Done([], 0, pruned, quantized, masked if compared else None, weights)

    def _trainer(self, model: PreTrainedModel, methods: list[Method]) -> tuple[CompressionTrainer, StageBar]:
        stages = {entry.stage.name: entry.materials for entry in self.planned.stages}
        teacher_tokenizer = different_tokenizer(self.stage, stages, self.materials)
        rows = self.materials.rows(self.stage.augmentation, teacher_tokenizer, self._neighbours(teacher_tokenizer))
        collate = self.materials.collator(teacher_tokenizer)
        if self.entry.distillation is not None:
            teachers, config = self._teachers(self.entry.distillation, rows.train, collate)
            methods.append(Distillation(config, teachers))
        args = self._arguments()
        evaluates = args.eval_strategy != "no"
        classifies = self.materials.task.kind not in (TaskKind.CAUSAL_LM, TaskKind.TOKEN_CLASSIFICATION)
        bar = StageBar(self.console, self.stage.name)
        trainer = CompressionTrainer(
            model,
            args,
            methods,
            train_dataset=rows.train,
            eval_dataset=rows.validation if evaluates else None,
            data_collator=collate,
            processing_class=self.materials.tokenizer,
            compute_metrics=self._compute_metrics if evaluates and classifies else None,
            callbacks=[bar],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer, bar

    def _arguments(self) -> TrainingArguments:
        chosen = self.stage.training.arguments()
        defaults = {"report_to": "none", "seed": self.recipe.seed, "dataloader_pin_memory": torch.cuda.is_available()}
        try:
            return TrainingArguments(output_dir=str(self.checkpoints), disable_tqdm=True, **defaults | chosen)
        except (ValueError, TypeError) as error:
            raise LmcompressError(f"stage {self.stage.name!r}, training: {error}") from error

    def _teacher_paths(self) -> list[Any]:
        stages = {p.stage.name for p in self.planned.stages}
        names = self.stage.distillation.teachers if self.stage.distillation else ()
        return [self.folder / name if name in stages else name for name in names]

    def _neighbours(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, Sequence[str]] | None:
        """What words give way to, where the stage replaces any."""
        if self.stage.augmentation is None or not self.stage.augmentation.replaces:
            return None
        tokenizer = tokenizer or self.materials.tokenizer
        embed = load_teacher(self._teacher_paths()[0], self.auto_class).get_input_embeddings()
        with torch.no_grad():
            return nearest_words(embed(torch.arange(len(tokenizer))), tokenizer)

    def _teachers(
        self, config: DistillationConfig, train: Any, collate: Any
    ) -> tuple[list[Teacher], DistillationConfig]:
        assert self.stage.distillation is not None
        precision = self.stage.distillation.teacher_precision or "float32"
        models = [load_teacher(path, self.auto_class, precision) for path in self._teacher_paths()]
        store = self.stage.distillation.store
        if store is None:
            return [LiveTeacher(model) for model in models], config
        config = _layers_counted_from_the_beginning(config, models)
        return [
            StoredTeacher(self._store(store, number, model, config, train, collate))
            for number, model in enumerate(models)
        ], config

    def _store(
        self,
        spec: StoreSpec,
        number: int,
        teacher: PreTrainedModel,
        config: DistillationConfig,
        train: Any,
        collate: Any,
    ) -> TeacherStore:
        folder = Path(spec.folder) if spec.folder else self.folder / "stores" / self.stage.name
        folder = folder / str(number)
        features = sorted(
            {
                resolve(teacher, match_for(match.loss, match.on).feature or "hidden", layer)
                for match in config.matches
                if match.which == number
                for layer in ((match.teacher,) if isinstance(match.teacher, int) else match.teacher)
            }
            | _contrasted(config, number, teacher)
        )
        if (folder / "meta.json").is_file():
            store = TeacherStore.open(folder, teacher=teacher)
            if set(features) <= set(store.features) and store.meta.top_k == spec.top_k:
                return store
        self.console.print(f"  asking teacher {number} once for all rows: {folder}")
        if torch.cuda.is_available():
            teacher.to("cuda")
        rows = self.stage.training.per_device_eval_batch_size
        return TeacherStore.build(
            folder, teacher, train, collate, extract=extract, top_k=spec.top_k, features=features, batch_size=rows
        )

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        task = self.materials.task
        said = predictions_from_logits(prediction.predictions, task.kind.value)
        return compute_metrics(task.metrics, said, prediction.label_ids)

    def _provenance(self) -> Provenance:
        applied = {
            "vocabulary pruning": self.stage.vocabulary,
            "smaller student": self.stage.student,
            "compact layers": self.stage.compact,
            "structured pruning": self.stage.pruning,
            "sparsity": self.stage.sparsity,
            "weight sharing": self.stage.sharing,
            "distillation": self.stage.distillation,
        }
        if is_stage(self.stage.start):
            # what earlier stages did to the model is in it still
            before = recorded_compression(AutoConfig.from_pretrained(self.folder / self.stage.start))
            earlier = before.provenance.methods if before is not None else ()
        else:
            earlier = ()
        return Provenance(
            library_version=library_version(),
            base_model=self.recipe.model[:1024] if isinstance(self.recipe.model, str) else "",
            recipe=self.recipe.name,
            methods=(*earlier, *(name for name, given in applied.items() if given is not None and name not in earlier)),
        )

    def _prepare_checkpoints(self) -> Path | None:
        """Where to go on from, if anywhere; marks the folder of checkpoints as this stage's."""
        folder = self.checkpoints
        if folder.exists() and (_hash_in(folder) != self.digest or not self.resume):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STAGE_FILE, {"hash": self.digest, "stage": _described(self.stage)})
        numbered = {
            int(p.name.rpartition("-")[2]): p
            for p in folder.glob("checkpoint-*")
            if p.name.rpartition("-")[2].isdecimal()
        }
        for _, checkpoint in sorted(numbered.items(), reverse=True):
            # the state is written last: without it the process died while it wrote
            if (checkpoint / "trainer_state.json").is_file():
                return checkpoint
            shutil.rmtree(checkpoint)
        return None


def _check_folder(folder: Path, planned: Plan, hashes: Mapping[str, str], overwrite: bool) -> None:
    for entry in planned.stages:
        name = entry.stage.name
        target = folder / name
        checkpoints = folder / CHECKPOINTS / name
        finished, interrupted = _finished_hash(target), _hash_in(checkpoints)
        if finished is None and (target.is_file() or target.is_dir() and any(target.iterdir())):
            raise LmcompressError(f"{target} holds something that is no stage of a run; name another --output")
        if overwrite or hashes[name] in (finished, interrupted):
            continue
        if finished is not None or interrupted is not None:
            changed = _what_changed((target, checkpoints), entry.stage)
            raise LmcompressError(
                f"{target} was made by a different recipe ({changed}). Name another --output to keep it, or pass "
                "--overwrite to train that stage and those after it anew"
            )


def _what_changed(folders: Sequence[Path], stage: Stage) -> str:
    for folder in folders:
        try:
            before = _flat(json.loads((folder / STAGE_FILE).read_text("utf-8"))["stage"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        now = _flat(_described(stage))
        keys = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        if keys:
            shown = ", ".join(
                f"{key}: {before.get(key, 'unset')} then, {now.get(key, 'unset')} now" for key in keys[:3]
            )
            return shown + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
        return "the model, the task, the seed or an earlier stage differs"
    return "its stage.json cannot be read"


def _described(stage: Stage) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude={"control"}, exclude_none=True)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}.{key}" if prefix else key).items()}


def _finished_hash(target: Path) -> str | None:
    return _hash_in(target) if (target / "config.json").is_file() else None


def _hash_in(folder: Path) -> str | None:
    try:
        found = json.loads((folder / STAGE_FILE).read_text("utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def _begin(folder: Path, recipe: Recipe) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise LmcompressError(f"cannot write to {folder}: {error.strerror or error}") from error


def _layers_counted_from_the_beginning(
    config: DistillationConfig, teachers: Sequence[PreTrainedModel]
) -> DistillationConfig:
    """A store does not know how many layers its teacher has."""
    matches = []
    for match in config.matches:
        teacher, feature = teachers[match.which], match_for(match.loss, match.on).feature or "hidden"
        layers = match.teacher if isinstance(match.teacher, tuple) else (match.teacher,)
        found = tuple(resolve(teacher, feature, layer)[1] for layer in layers)
        matches.append(match.model_copy(update={"teacher": found if isinstance(match.teacher, tuple) else found[0]}))
    return config.model_copy(update={"matches": tuple(matches)})


def _contrasted(config: DistillationConfig, number: int, teacher: PreTrainedModel) -> set[tuple[str, int]]:
    if config.contrast is not None and config.contrast.which == number:
        return {resolve(teacher, *config.contrast.feature("teacher"))}
    # what is only measured is asked of the first teacher
    return {resolve(teacher, "output", -1)} if config.homogeneity and config.contrast is None and number == 0 else set()


def _measured(planned: Plan, folder: Path, models: Mapping[str, Path]) -> dict[str, Any]:
    materials = planned.materials
    entries = [
        Entry(name, "teacher", name, materials.with_tokenizer(load_tokenizer(name, materials.task)))
        for name in planned.outside_teachers
    ]
    for staged in planned.stages:
        name = staged.stage.name
        marker = json.loads((models[name] / STAGE_FILE).read_text("utf-8"))
        entries.append(
            Entry(
                name,
                staged.role,
                str(models[name]),
                staged.materials,
                made_here=True,
                training=marker["training"],
                compact=marker.get("compact"),
                pruning=marker.get("pruning"),
                quantization=marker.get("quantization"),
                sparsity=marker.get("sparsity"),
                sharing=marker.get("sharing"),
                vocabulary=marker.get("vocabulary"),
            )
        )
    notes = [*planned.notes, *(note for entry in entries for note in notes_of(entry))]
    return measure(entries, planned.reference, notes)


def notes_of(entry: Entry) -> list[str]:
    """What a reader of the table must know of how a model was made.

    Args:
        entry: a row.
    """
    return [
        *compact_notes(entry.name, entry.compact),
        *pruning_notes(entry.name, entry.pruning),
        *weights_notes(entry.name, entry.sparsity, entry.sharing),
        *quantization_notes(entry.name, entry.quantization),
    ]


__all__ = ["RunResult", "notes_of", "run", "stage_hashes"]
