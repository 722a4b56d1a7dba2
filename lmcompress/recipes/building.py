"""What a recipe names, made: rows, tokenizer, models; on ``meta``, where nothing is allocated, or with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.layers import finish_replaced, refuse_compact, replace_skeleton
from lmcompress.checkpoint.structure import shape_skeleton, stock_structure
from lmcompress.data import (
    Collator,
    Operation,
    Task,
    TaskData,
    TaskKind,
    augment,
    collator,
    delete_tokens,
    load_task,
    long_disorder,
    mask_tokens,
    n_gram_sample,
    replace_tokens,
    same_tokenizer,
    short_disorder,
    tokenize,
    train_tokenizer,
)
from lmcompress.data.loading import limit_rows
from lmcompress.errors import LmcompressError, argument, nearest
from lmcompress.families import FAMILIES, family_of
from lmcompress.recipes.checks import found
from lmcompress.recipes.metrics import with_metrics
from lmcompress.recipes.schema import BASE_MODEL, Augmentation, FromScratch, Recipe, Stage, StudentSpec, TaskSpec
from lmcompress.students.depth import by_layers, by_shape, by_width, named

_OPERATIONS: dict[str, Callable[..., list[str]]] = {
    "mask": mask_tokens,
    "delete": delete_tokens,
    "replace": replace_tokens,
    "n_gram": n_gram_sample,
    "short_disorder": short_disorder,
    "long_disorder": long_disorder,
}


@dataclass
class Materials:
    """What all stages of a run share.

    Attributes:
        recipe: the recipe.
        data: the task's rows as they are.
        tokenizer: of the recipe's model and all its students.
    """

    recipe: Recipe
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    _tokenized: dict[str, TaskData] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task."""
        return self.data.task

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Materials:
        """The same rows for models with another tokenizer.

        Args:
            tokenizer: such as one with a pruned vocabulary.
        """
        return Materials(self.recipe, self.data, tokenizer)

    def rows(
        self,
        augmentation: Augmentation | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        neighbours: Mapping[str, Sequence[str]] | None = None,
    ) -> TaskData:
        """The rows as model inputs.

        Args:
            augmentation: of the training texts.
            teacher_tokenizer: its inputs are added if it differs from the student's.
            neighbours: of words, for ``replace``.
        """
        # a tokenizer with a pruned vocabulary keeps its name
        other = None if teacher_tokenizer is None else (teacher_tokenizer.name_or_path, len(teacher_tokenizer))
        words = None if neighbours is None else hash(tuple((word, *near) for word, near in neighbours.items()))
        key = repr((augmentation, other, words))
        if key not in self._tokenized:
            data = self.data
            if augmentation is not None:
                data = _augmented(data, augmentation, neighbours, self.recipe.seed)
            length = self.recipe.task.max_length
            with _progress_bars_of_datasets_off():
                tokenized = tokenize(data, self.tokenizer, max_length=length, teacher_tokenizer=teacher_tokenizer)
            # of a text's blocks the first ones, which perplexity is measured on as well; rows are limited before
            causal = self.task.kind is TaskKind.CAUSAL_LM
            self._tokenized[key] = limit_rows(tokenized, self.recipe.task.limit, first=True) if causal else tokenized
        return self._tokenized[key]

    def collator(self, teacher_tokenizer: PreTrainedTokenizerBase | None = None) -> Collator:
        """What makes batches of :meth:`rows`.

        Args:
            teacher_tokenizer: as for :meth:`rows`.
        """
        return collator(self.task, self.tokenizer, teacher_tokenizer)


def gather(recipe: Recipe) -> Materials:
    """Load and check the rows, and load or train the tokenizer.

    Args:
        recipe: any.

    Raises:
        LmcompressError: rows, columns or labels are not as the recipe says, or there is no such tokenizer.
    """
    with _progress_bars_of_datasets_off():
        data = with_metrics(read_task(recipe.task), recipe.evaluation.metrics)
    if not data.train.num_rows:
        raise LmcompressError(f"{data.task.name} has no rows to train on; {'; '.join(data.notes)}")
    for split in recipe.evaluation.splits:
        check_split(data, split)
    tokenizer = _tokenizer(recipe.model, data)
    return Materials(recipe, data, tokenizer)


def read_task(task: TaskSpec, data: Any = None) -> TaskData:
    """The rows that a recipe's task names, checked; of texts for a language model all, for these are limited in blocks.

    Args:
        task: of the recipe.
        data: rows to take instead of those that it names.
    """
    loaded = load_task(
        task.name,
        data=task.data if data is None else data,
        text_columns=task.text_columns,
        label_column=task.label_column,
        kind=None if task.kind is None else task.kind.value,
        splits=task.splits,
    )
    return loaded if loaded.task.kind is TaskKind.CAUSAL_LM else limit_rows(loaded, task.limit)


def check_split(data: TaskData, split: str) -> None:
    """Refuse a split that quality cannot be measured on.

    Args:
        data: of the task.
        split: its name.

    Raises:
        LmcompressError: If there is no such split, or it has no labels.
    """
    where = argument("evaluation.splits")
    if split not in data.splits():
        raise LmcompressError(f"{where}: no split {split!r} in {data.task.name}{nearest(split, data.splits())}")
    label = data.task.label_column
    if label is not None and label not in data.splits()[split].column_names:
        raise LmcompressError(
            f"{where}: split {split!r} of {data.task.name} has no labels: it can be predicted, not scored"
        )


def auto_class(task: Task) -> Any:
    """The ``AutoModelFor...`` of a task.

    Args:
        task: any.
    """
    if task.kind is TaskKind.CAUSAL_LM:
        return AutoModelForCausalLM
    return (
        AutoModelForTokenClassification
        if task.kind is TaskKind.TOKEN_CLASSIFICATION
        else AutoModelForSequenceClassification
    )


def load_tokenizer(path: str | Path, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model.

    Args:
        path: folder, or name on the Hub.
        task: words that come one by one need a space before them.

    Raises:
        LmcompressError: there is none.
    """
    words = {"add_prefix_space": True} if task.kind is TaskKind.TOKEN_CLASSIFICATION else {}
    with found(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **words)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_model(materials: Materials, *, meta: bool = False) -> PreTrainedModel:
    """The recipe's own model with the head that the task needs.

    Args:
        materials: of the run.
        meta: without weights.

    Raises:
        LmcompressError: there is no such model, or its family is not known.
    """
    model, task = materials.recipe.model, materials.task
    cls = auto_class(task)
    if isinstance(model, FromScratch):
        config = _config_from_scratch(model, materials)
        set_seed(materials.recipe.seed)
        with torch.device("meta") if meta else nullcontext():
            return cls.from_config(config)
    config = _config_of(model, _head(task))
    if config.pad_token_id is None:
        config.pad_token_id = materials.tokenizer.pad_token_id
    if meta:
        return skeleton(config, cls)
    set_seed(materials.recipe.seed)
    trained = AutoConfig.from_pretrained(model)
    # a head for other labels is made anew
    other_head = bool(_head(task)) and trained.num_labels != task.num_labels
    with found(model, "model"):
        return cls.from_pretrained(model, config=config, ignore_mismatched_sizes=other_head)


def teacher_skeleton(path: str, task: Task) -> PreTrainedModel:
    """A teacher from outside, without weights, to check student and matches against.

    Args:
        path: folder, or name on the Hub.
        task: of the recipe.

    Raises:
        LmcompressError: there is no such model, or it has no head for the task.
    """
    config = _config_of(path, {})
    cls = auto_class(task)
    wanted = cls.__name__.removeprefix("AutoModel")
    if config.architectures and not any(wanted in name or "LMHead" in name for name in config.architectures):
        raise LmcompressError(
            f"the teacher {path} is a {', '.join(config.architectures)}, without a trained head for {task.kind}: "
            "train it in an earlier stage, and name that stage as the teacher"
        )
    model = skeleton(config, cls)
    model.config.name_or_path = path
    return model


def skeleton(config: PretrainedConfig, cls: Any) -> PreTrainedModel:
    """A model without weights, of the shapes that its config names.

    Args:
        config: perhaps with what lmcompress did to the model.
        cls: an ``AutoModelFor...``.
    """
    stock_structure(config)
    with torch.device("meta"):
        model = cls.from_config(config)
    described = getattr(config, "quantization_config", None)
    if isinstance(described, Mapping) and described.get("quant_method") == "lmcompress":
        described = CompressionConfig.from_dict(described)
    if isinstance(described, CompressionConfig):
        if described.structure is not None:
            shape_skeleton(model, described.structure)
        replace_skeleton(model, described.layers)
        finish_replaced(model, described.layers)
    return model


def make_student(start: PreTrainedModel, spec: StudentSpec | None, seed: int) -> PreTrainedModel:
    """The model that a stage trains.

    Args:
        start: what it is made from; on ``meta``, so is the student.
        spec: how; None: it is the start itself.
        seed: of what is drawn.

    Raises:
        LmcompressError: layers that are not there, sizes that do not fit, or a slice of compact layers.
    """
    if spec is None:
        return start
    meta = start.device.type == "meta"
    choose: Any = spec.choose
    if spec.layers is not None:
        return by_layers(start, spec.layers, choose=choose).model
    if spec.initialise == "slice":
        refuse_compact(start, "slice")
    # norms, by which a slice is chosen, need weights
    initialise: Any = "random" if meta else spec.initialise
    with torch.device("meta") if meta else nullcontext():
        if spec.named is not None:
            return named(spec.named, start, initialise=initialise, seed=seed).model
        if spec.width is not None:
            return by_width(start, spec.width, initialise=initialise, seed=seed).model
        assert spec.shape is not None
        sizes: dict[str, Any] = spec.shape.model_dump()
        return by_shape(start, **sizes, choose=choose, initialise=initialise, seed=seed).model


def different_tokenizer(
    stage: Stage, stages: Mapping[str, Materials], materials: Materials
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a stage's teachers, if it is another than the student's.

    Args:
        stage: with distillation.
        stages: names of stages, and the materials of each, with its tokenizer.
        materials: of this stage.

    Raises:
        LmcompressError: the teachers have several.
    """
    tokenizers = {
        name: stages[name].tokenizer if name in stages else load_tokenizer(name, materials.task)
        for name in (stage.distillation.teachers if stage.distillation else ())
    }
    others = {name: t for name, t in tokenizers.items() if not same_tokenizer(materials.tokenizer, t)}
    if not others or stage.distillation is None:
        return None
    first = next(iter(others.values()))
    if len(others) < len(stage.distillation.teachers) or not all(same_tokenizer(first, t) for t in others.values()):
        raise LmcompressError(
            f"stage {stage.name!r}: all teachers must have one tokenizer; {', '.join(others)} differ from the others"
        )
    if materials.task.kind in (TaskKind.CAUSAL_LM, TaskKind.TOKEN_CLASSIFICATION):
        way_out = "prune the vocabulary of the teacher's stage, or of an earlier one that both start from"
        if stage.vocabulary is None:
            way_out = "choose a student of the teacher's family"
        raise LmcompressError(
            f"stage {stage.name!r}: the teacher {next(iter(others))} has another tokenizer than the student, so that "
            f"their answers for single tokens can't be compared; {way_out}"
        )
    return first


def text_of(data: TaskData, split: str) -> str:
    """A split of a causal task as one text, for perplexity.

    Args:
        data: not tokenised.
        split: its name.
    """
    return "\n\n".join(data.splits()[split][data.task.text_columns[0]])


def gate_batches(materials: Materials, *, count: int = 2, rows: int = 8) -> list[Any]:
    """Real inputs for the equivalence gate: the first validation rows.

    Args:
        materials: of the run.
        count: batches.
        rows: of each.
    """
    data = materials.rows().validation
    together = materials.collator()
    spans = [range(i * rows, min((i + 1) * rows, data.num_rows)) for i in range(count)]
    return [together([data[i] for i in span]) for span in spans if len(span)]


def drawn_batches(materials: Materials, rows: int, batch_size: int, seed: int) -> list[Any]:
    """Batches of training rows, drawn as methods of the trainer draw them.

    Args:
        materials: of the stage.
        rows: how many, or as many as there are.
        batch_size: rows of one batch.
        seed: of the choice.

    Returns:
        Batches on the CPU.
    """
    data, collate = materials.rows().train, materials.collator()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(data.num_rows, generator=generator)[:rows].tolist()
    spans = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return [collate([data[i] for i in span]) for span in spans]


def is_stage(name: str) -> bool:
    """Whether a start is a stage rather than the recipe's model.

    Args:
        name: of the start.
    """
    return name != BASE_MODEL


def _tokenizer(model: str | FromScratch, data: TaskData) -> PreTrainedTokenizerBase:
    if isinstance(model, str):
        return load_tokenizer(model, data.task)
    texts = (text for column in data.task.text_columns for text in data.train[column])
    if data.task.kind is TaskKind.TOKEN_CLASSIFICATION:
        texts = (" ".join(words) for words in texts)
    tokenizer = train_tokenizer(texts, kind=model.tokenizer.kind, vocab_size=model.tokenizer.vocab_size)
    tokenizer.model_max_length = model.positions
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config_from_scratch(model: FromScratch, materials: Materials) -> PretrainedConfig:
    family = FAMILIES[model.family]
    tokenizer = materials.tokenizer
    known = AutoConfig.for_model(model.family)
    for name in model.config:
        if not hasattr(known, name):
            raise LmcompressError(f"model.config.{name}: a config of the family {model.family} has no such field")
    special = {"pad_token_id": tokenizer.pad_token_id}
    if materials.task.kind is TaskKind.CAUSAL_LM:
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # RoBERTa counts positions from the padding's id
    positions = model.positions + (tokenizer.pad_token_id + 1 if model.family == "roberta" else 0)
    values = {
        family.hidden_size: model.hidden_size,
        family.num_layers: model.layers,
        family.num_heads: model.num_heads,
        family.intermediate_size: model.intermediate_size or 4 * model.hidden_size,
        "max_position_embeddings" if model.family != "gpt2" else "n_positions": positions,
        "vocab_size": len(tokenizer),
        **({"embedding_size": model.hidden_size} if model.family == "electra" else {}),
    }
    return AutoConfig.for_model(model.family, **values | special | _head(materials.task) | model.config)


def _head(task: Task) -> dict[str, Any]:
    if task.kind is TaskKind.CAUSAL_LM:
        return {}
    names = {"id2label": task.id2label, "label2id": task.label2id} if task.label_names else {}
    problem = {"problem_type": task.problem_type} if task.problem_type else {}
    return {"num_labels": task.num_labels} | names | problem


def _config_of(path: str, head: Mapping[str, Any]) -> PretrainedConfig:
    with found(path, "model"):
        config = AutoConfig.from_pretrained(path, **head)
    family_of(config)
    return config


def _augmented(
    data: TaskData, augmentation: Augmentation, neighbours: Mapping[str, Sequence[str]] | None, seed: int
) -> TaskData:
    operations: list[Operation] = []
    for name in augmentation.operations:
        given: dict[str, Any] = {"neighbours": neighbours} if name == "replace" else {}
        if augmentation.probability is not None and name != "n_gram":
            given["p"] = augmentation.probability
        operations.append(partial(_OPERATIONS[name], **given))
    rows = augment(data.train, data.task.text_columns, operations, copies=augmentation.copies, seed=seed)
    return replace(data, train=rows)


@contextmanager
def _progress_bars_of_datasets_off() -> Iterator[None]:
    import datasets

    was_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
