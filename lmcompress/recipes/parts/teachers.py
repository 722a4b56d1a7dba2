"""Teachers of a stage: their sources, their tokenizer, and their stored outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.capture import extract, resolve
from lmcompress.data import TaskKind, nearest_words, same_tokenizer
from lmcompress.distillation import DistillationConfig, LiveTeacher, StoredTeacher, TeacherStore, load_teacher
from lmcompress.distillation.checks import crosses
from lmcompress.distillation.matches import match_for
from lmcompress.distillation.store.format import META_FILE
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.materials import Materials, load_tokenizer
from lmcompress.recipes.parts.base import Running
from lmcompress.recipes.specs import SchemaPart

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage

Precision = Literal["float32", "bfloat16", "float16", "8bit", "4bit"]
"""Precision in which a teacher is loaded."""


class StoreSpec(SchemaPart):
    """The teacher's outputs are computed once and stored on disk."""

    top_k: Annotated[
        int | None,
        Field(ge=1, description="Number of the largest logits to keep per row or token; default: all."),
    ] = None
    folder: Annotated[str | None, Field(description="Folder of the store; default: in the stage's folder.")] = None


def teachers_of(
    work: Running, config: DistillationConfig, precision: Precision, store: StoreSpec | None
) -> tuple[list[Teacher], DistillationConfig]:
    """The teachers of a stage, loaded, or their stored outputs.

    Args:
        work: the stage, with its training rows.
        config: configuration of the distillation.
        precision: precision of the teachers.
        store: store of their outputs, if any.

    Returns:
        The teachers, and the config with layers resolved against them.
    """
    cls = auto_class(work.materials.task)
    models = [load_teacher(path, cls, precision) for path in _paths(work)]
    if store is None:
        tokenizer = work.teacher_tokenizer or work.materials.tokenizer
        return [LiveTeacher(model, tokenizer) for model in models], config
    config = _layers_counted_from_the_beginning(config, models)
    return [StoredTeacher(_stored(work, store, number, model, config)) for number, model in enumerate(models)], config


def neighbours(work: Running) -> Mapping[str, Sequence[str]]:
    """Words and their nearest neighbours in the first teacher's embeddings.

    Args:
        work: a stage with distillation.
    """
    tokenizer = work.teacher_tokenizer or work.materials.tokenizer
    embed = load_teacher(_paths(work)[0], auto_class(work.materials.task)).get_input_embeddings()
    with torch.no_grad():
        return nearest_words(embed(torch.arange(len(tokenizer))), tokenizer)


def different_tokenizer(
    stage: Stage, stages: Mapping[str, Materials], materials: Materials
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a stage's teachers, if it differs from the student's.

    Args:
        stage: a stage with distillation.
        stages: names of stages, and the materials of each, with its tokenizer.
        materials: materials of this stage.

    Raises:
        LmcompressError: If the teachers have several, or single tokens are compared.
    """
    teachers = stage.distillation.teachers
    tokenizers = {
        name: stages[name].tokenizer if name in stages else load_tokenizer(name, materials.task) for name in teachers
    }
    others = {name: t for name, t in tokenizers.items() if not same_tokenizer(materials.tokenizer, t)}
    if not others:
        return None
    first = next(iter(others.values()))
    if len(others) < len(teachers) or not all(same_tokenizer(first, t) for t in others.values()):
        raise LmcompressError(
            f"stage {stage.name!r}: all teachers must have one tokenizer; {', '.join(others)} differ from the others"
        )
    if materials.task.kind is TaskKind.CAUSAL_LM and crosses(stage.distillation):
        return first
    if materials.task.kind.per_token:
        way_out = "prune the vocabulary of the teacher's stage, or of an earlier one that both start from"
        if stage.vocabulary is None:
            way_out = "choose a student of the teacher's family"
        if materials.task.kind is TaskKind.CAUSAL_LM:
            way_out += ", or compare two vocabularies with distillation.loss: uld or distillation.shared_tokens"
        raise LmcompressError(
            f"stage {stage.name!r}: the teacher {next(iter(others))} has another tokenizer than the student, so that "
            f"their outputs for single tokens can't be compared; {way_out}"
        )
    return first


def _paths(work: Running) -> list[str | Path]:
    return [work.folder / name if name in work.staged else name for name in work.stage.distillation.teachers]


def _stored(
    work: Running, spec: StoreSpec, number: int, teacher: PreTrainedModel, config: DistillationConfig
) -> TeacherStore:
    folder = Path(spec.folder) if spec.folder else work.folder / "stores" / work.stage.name
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
    if (folder / META_FILE).is_file():
        try:
            store = _opened(folder, work, teacher)
        except LmcompressError as error:
            if spec.folder is not None:
                raise
            # its contents follow from the teacher and the rows, and no other stage reads it
            work.console.print(f"  building the store {folder} again: {error}", highlight=False)
        else:
            if set(features) <= set(store.features) and store.meta.top_k == spec.top_k:
                return store
    work.console.print(f"  running teacher {number} once over all rows: {folder}")
    if torch.cuda.is_available():
        teacher.to("cuda")
    rows = work.stage.training.per_device_eval_batch_size
    return TeacherStore.build(
        folder,
        teacher,
        work.train,
        work.collate,
        extract=extract,
        top_k=spec.top_k,
        features=features,
        batch_size=rows,
    )


def _opened(folder: Path, work: Running, teacher: PreTrainedModel) -> TeacherStore:
    """A store, if it was made by this teacher from rows that hold all those to train on."""
    store = TeacherStore.open(folder, teacher=teacher)
    size = work.stage.training.per_device_eval_batch_size
    batches = (range(start, min(start + size, len(work.train))) for start in range(0, len(work.train), size))
    if missing := sum(store.missing(work.collate([work.train[i] for i in batch])) for batch in batches):
        raise LmcompressError(
            f"{missing:,} of {len(work.train):,} training rows are not in the store {folder}: the rows, the tokenizer "
            "or max_length have changed. Remove it, or name another folder in distillation.store.folder"
        )
    return store


def _layers_counted_from_the_beginning(
    config: DistillationConfig, teachers: Sequence[PreTrainedModel]
) -> DistillationConfig:
    """A store does not record the number of its teacher's layers."""
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
    # what is only measured uses the first teacher
    return {resolve(teacher, "output", -1)} if config.homogeneity and config.contrast is None and number == 0 else set()
