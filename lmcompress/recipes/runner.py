"""Carries out the plan of a recipe: trains the stages, measures all of them, writes one self-contained folder."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from lmcompress.card import model_card
from lmcompress.config import Provenance
from lmcompress.data import TaskKind
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
from lmcompress.evaluation import (
    LatencyRow,
    compare_latency,
    compute_metrics,
    evaluate_classifier,
    machine,
    parameter_count,
    perplexity,
    predictions_from_logits,
    size_on_disk,
    verdict,
)
from lmcompress.model import REPORT_FILE, CompressedModel, library_version
from lmcompress.recipes.building import (
    Materials,
    auto_class,
    base_model,
    different_tokenizer,
    gate_batches,
    is_stage,
    load_tokenizer,
    make_student,
    text_of,
)
from lmcompress.recipes.loading import dump_recipe
from lmcompress.recipes.planning import Plan, StagePlan, plan
from lmcompress.recipes.progress import StageBar, quiet_libraries
from lmcompress.recipes.schema import Recipe, Stage, StoreSpec
from lmcompress.reporting import card_rows, write_report
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


@dataclass(frozen=True)
class _Entry:
    """A row of the table in the making."""

    name: str
    role: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    training: dict[str, Any]


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
    folder = Path(output or recipe.output or f"runs/{recipe.name}")
    if folder.exists() and not folder.is_dir():
        raise LmcompressError(f"{folder} is a file; the output of a run is a folder")
    with quiet_libraries():
        console.print(f"[bold]{recipe.name}[/]: checking rows, models and layers")
        planned = plan(recipe)
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
            console.print(f"{headline}: {stage.steps:,} steps on {stage.train_rows:,} rows")
            _StageRun(planned, stage, folder, hashes[stage.stage.name], console, resume).train()
            gc.collect()
        if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
            (folder / CHECKPOINTS).rmdir()
        console.print("[bold]measuring[/] quality, size and latency")
        report = _measure(planned, folder, models)
        write_report(report, folder)
        _update_cards(report, models)
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


class _StageRun:
    """One stage: its model, its teachers, its trainer, its folder."""

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
        self.materials: Materials = planned.materials
        self.recipe = planned.recipe
        self.auto_class = auto_class(self.materials.task)

    def train(self) -> None:
        start = time.monotonic()
        checkpoint = self._prepare_checkpoints()
        if checkpoint is not None:
            self.console.print(f"  going on from {checkpoint.name}")
        model = self._model()
        trainer, bar = self._trainer(model)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.close()
        trainer.finish()
        seconds = time.monotonic() - start
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        training = {"seconds": round(seconds, 1), "steps": trainer.state.global_step, "resumed": checkpoint is not None}
        training |= {"last_log": history[-1] if history else {}}
        marker = {
            "hash": self.digest,
            "stage": _described(self.stage),
            "training": training,
            "log": trainer.state.log_history,
        }
        trained = trainer.student.to("cpu")
        # no reference cycle may keep two models in memory while the gate reloads one
        del trainer
        compressed = CompressedModel(trained, self._provenance())
        equivalence = compressed.save_pretrained(
            self.target,
            format=self.stage.save,
            tokenizer=self.materials.tokenizer,
            batches=gate_batches(self.materials),
            report={"recipe": self.recipe.name, "task": self.materials.task.name, "stage": self.stage.name},
            write_more=lambda temporary: _write_json(temporary / STAGE_FILE, marker),
        )
        shutil.rmtree(self.checkpoints)
        self.console.print(
            f"  {seconds:.0f} s; saved to {self.target}, reloaded, greatest difference of "
            f"any output {equivalence.max_error:.2g}"
        )

    def _model(self) -> PreTrainedModel:
        if is_stage(self.stage.start):
            start = self.auto_class.from_pretrained(self.folder / self.stage.start)
        else:
            start = base_model(self.materials)
        set_seed(self.recipe.seed)
        return make_student(start, self.stage.student, self.recipe.seed)

    def _trainer(self, model: PreTrainedModel) -> tuple[CompressionTrainer, StageBar]:
        stages = dict.fromkeys(p.stage.name for p in self.planned.stages)
        teacher_tokenizer = different_tokenizer(self.stage, stages, self.materials)
        rows = self.materials.rows(self.stage.augmentation, teacher_tokenizer)
        collate = self.materials.collator(teacher_tokenizer)
        methods = []
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

    def _teachers(
        self, config: DistillationConfig, train: Any, collate: Any
    ) -> tuple[list[Teacher], DistillationConfig]:
        assert self.stage.distillation is not None
        stages = {p.stage.name for p in self.planned.stages}
        precision = self.stage.distillation.teacher_precision or "float32"
        paths = [self.folder / name if name in stages else name for name in self.stage.distillation.teachers]
        models = [load_teacher(path, self.auto_class, precision) for path in paths]
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
        methods = ("distillation",) if self.stage.distillation else ()
        before = self.stage.student is not None
        return Provenance(
            library_version=library_version(),
            base_model=self.recipe.model[:1024] if isinstance(self.recipe.model, str) else "",
            recipe=self.recipe.name,
            methods=(*(("smaller student",) if before else ()), *methods),
        )

    def _prepare_checkpoints(self) -> Path | None:
        """Where to go on from, if anywhere; marks the folder of checkpoints as this stage's."""
        folder = self.checkpoints
        if folder.exists() and (_hash_in(folder) != self.digest or not self.resume):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / STAGE_FILE, {"hash": self.digest, "stage": _described(self.stage)})
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
        _write_text(folder / "recipe.yaml", dump_recipe(recipe))
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


def _measure(planned: Plan, folder: Path, models: Mapping[str, Path]) -> dict[str, Any]:
    materials, recipe = planned.materials, planned.recipe
    entries = [_Entry(t, "teacher", t, load_tokenizer(t, materials.task), {}) for t in planned.outside_teachers]
    for staged in planned.stages:
        name = staged.stage.name
        marker = json.loads((models[name] / STAGE_FILE).read_text("utf-8"))
        entries.append(_Entry(name, staged.role, str(models[name]), materials.tokenizer, marker["training"]))
    entries.sort(key=lambda e: e.name != planned.reference)
    cls = auto_class(materials.task)
    loaded = {entry.name: cls.from_pretrained(entry.path).eval() for entry in entries}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for entry in entries:
        model = loaded[entry.name].to(device)
        size = _size(entry.path)
        saved = json.loads((Path(entry.path) / REPORT_FILE).read_text("utf-8")) if entry.name in models else {}
        rows.append(
            {
                "name": entry.name,
                "role": entry.role,
                "folder": entry.path,
                "metrics": {
                    split: _quality(materials, model, entry.tokenizer, split) for split in recipe.evaluation.splits
                },
                "parameters": parameter_count(model),
                "size_bytes": None if size is None else size.total_bytes,
                "weights_bytes": None if size is None else size.weights_bytes,
                "equivalence": saved.get("equivalence"),
                "format": saved.get("format"),
                "training": entry.training,
                "latency": [],
            }
        )
    latency = _latency(planned, loaded)
    for row in rows:
        row["latency"] = [entry for entry in latency if entry["model"] == row["name"]]
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "paper": recipe.paper,
        "task": materials.task.name,
        "kind": materials.task.kind.value,
        "metric": "token_perplexity" if materials.task.kind is TaskKind.CAUSAL_LM else materials.task.metrics[0],
        "lower_is_better": materials.task.kind is TaskKind.CAUSAL_LM,
        "split": recipe.evaluation.splits[0],
        "reference": planned.reference,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("lmcompress", "torch", "transformers", "datasets", "tokenizers")},
        "seed": recipe.seed,
        "rows": rows,
        "notes": list(planned.notes),
    }


def _quality(
    materials: Materials, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str
) -> dict[str, float]:
    evaluation = materials.recipe.evaluation
    if materials.task.kind is TaskKind.CAUSAL_LM:
        found = perplexity(
            model,
            tokenizer,
            text_of(materials.data, split),
            stride=evaluation.stride,
            max_length=materials.recipe.task.max_length,
            batch_size=evaluation.batch_size,
        )
        return {name: float(getattr(found, name)) for name in ("token_perplexity", "word_perplexity", "bits_per_byte")}
    own = tokenizer is materials.tokenizer
    rows = materials.rows() if own else Materials(materials.recipe, materials.data, tokenizer).rows()
    collate = materials.collator() if own else Materials(materials.recipe, materials.data, tokenizer).collator()
    kind = materials.task.kind.value
    return evaluate_classifier(
        model, rows.splits()[split], collate, kind, materials.task.metrics, evaluation.batch_size
    )


def _latency(planned: Plan, models: Mapping[str, PreTrainedModel]) -> list[dict[str, Any]]:
    evaluation = planned.recipe.evaluation
    if not evaluation.latency_batches:
        return []
    length = evaluation.sequence_length or min(128, planned.recipe.task.max_length)
    measured: list[LatencyRow] = compare_latency(
        models, batch_sizes=evaluation.latency_batches, sequence_length=length, repeats=evaluation.repeats
    )
    return [{**vars(row), "verdict": words} for row, words in zip(measured, verdict(measured), strict=True)]


def _size(path: str) -> Any:
    # the size of a model that only the Hub has is not known
    return size_on_disk(path) if Path(path).is_dir() else None


def _update_cards(report: Mapping[str, Any], models: Mapping[str, Path]) -> None:
    """The table is known only now: it goes into each model's card and report."""
    more = {"table": card_rows(report), "machine": report["machine"], "notes": report["notes"]}
    for folder in models.values():
        saved = json.loads((folder / REPORT_FILE).read_text("utf-8")) | more
        _write_json(folder / REPORT_FILE, saved)
        _write_text(folder / "README.md", model_card(saved))


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


__all__ = ["RunResult", "run", "stage_hashes"]
