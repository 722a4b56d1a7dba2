"""The models that a recipe names: on ``meta``, where nothing is allocated, or with weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.guard import open_config
from lmcompress.checkpoint.layers import finish_replaced, replace_skeleton
from lmcompress.checkpoint.structure import shape_skeleton, stock_structure
from lmcompress.data import Task, TaskKind
from lmcompress.data.tasks import auto_class_name
from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES, anatomy_of, family_of
from lmcompress.families.positions import first_position
from lmcompress.recipes.lookup import found
from lmcompress.recipes.materials import Materials
from lmcompress.recipes.specs import BASE_MODEL, FromScratch, TaskSpec

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Recipe


def auto_class(task: Task) -> Any:
    """The ``AutoModelFor...`` of a task.

    Args:
        task: any task.
    """
    return getattr(transformers, auto_class_name(task.kind.value))


def has_head_for(config: PretrainedConfig, task: Task) -> bool:
    """Whether a checkpoint holds a head for a kind of task; True where its config does not say.

    Args:
        config: of the checkpoint.
        task: any.
    """
    wanted = auto_class(task).__name__.removeprefix("AutoModel")
    names = (wanted, "LMHead") if task.kind is TaskKind.CAUSAL_LM else (wanted,)
    # Transformers has no one name for models that write texts
    names = ("ForConditionalGeneration",) if task.kind.generates else names
    known = config.architectures
    return not known or any(name in architecture for architecture in known for name in names)


def base_model(materials: Materials, *, meta: bool = False) -> PreTrainedModel:
    """The recipe's own model with the head that the task needs.

    Args:
        materials: materials of the run.
        meta: whether to build it without weights.

    Raises:
        LmcompressError: If the model does not exist, or its family is unknown.
    """
    model, task = materials.recipe.model, materials.task
    cls = auto_class(task)
    if isinstance(model, FromScratch):
        set_seed(materials.recipe.seed)
        try:
            config = _config_from_scratch(model, materials)
            with torch.device("meta") if meta else nullcontext():
                return cls.from_config(config, dtype=dtype_of(materials.recipe) or torch.float32)
        except LmcompressError:
            raise
        except Exception as error:
            if not model.config:
                raise
            raise LmcompressError(
                f"model.config makes no {model.family}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
    config = _config_of(model, _head(task))
    if config.pad_token_id is None:
        config.pad_token_id = materials.tokenizer.pad_token_id
    if meta:
        bare = skeleton(config, cls)
        return bare if dtype_of(materials.recipe) is None else bare.to(dtype_of(materials.recipe))
    set_seed(materials.recipe.seed)
    trained = AutoConfig.from_pretrained(model)
    # a head for other labels is created anew
    other_head = bool(_head(task)) and trained.num_labels != task.num_labels
    dtype = dtype_of(materials.recipe) or "auto"
    with found(model, "model"):
        return cls.from_pretrained(model, config=config, dtype=dtype, ignore_mismatched_sizes=other_head)


def dtype_of(recipe: Recipe) -> torch.dtype | None:
    """The type of the weights in all stages; None: that of the model's checkpoint.

    Args:
        recipe: any recipe.
    """
    return None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def teacher_skeleton(path: str, task: Task) -> PreTrainedModel:
    """An external teacher, without weights, to check student and matches against.

    Args:
        path: folder, or name on the Hub.
        task: task of the recipe.

    Raises:
        LmcompressError: If the model does not exist, or has no head for the task.
    """
    config = _config_of(path, {})
    if not has_head_for(config, task):
        raise LmcompressError(
            f"the teacher {path} is a {', '.join(config.architectures or ())}, without a trained head for {task.kind}: "
            "train it in an earlier stage, and name that stage as the teacher"
        )
    model = skeleton(config, auto_class(task))
    model.config.name_or_path = path
    return model


def check_packing(task: TaskSpec, model: PreTrainedModel) -> None:
    """Refuse to pack documents apart for a model that does not keep them apart.

    Args:
        task: task of the recipe.
        model: a student or a teacher.

    Raises:
        LmcompressError: If its family lets tokens attend to the whole row.
    """
    if task.packing == "apart" and not anatomy_of(model).packs:
        raise LmcompressError(
            f"task.packing: apart needs models that keep packed documents apart by their position ids, "
            f"{model.config.model_type} attends to the whole row; use packing: joined"
        )


def skeleton(config: PretrainedConfig, cls: Any) -> PreTrainedModel:
    """A model without weights, in the shapes of its config.

    Args:
        config: a config, possibly of a compressed model.
        cls: an ``AutoModelFor...``.
    """
    stock_structure(config)
    with torch.device("meta"):
        model = cls.from_config(open_config(copy.deepcopy(config)))
    described = getattr(config, "quantization_config", None)
    if isinstance(described, Mapping) and described.get("quant_method") == "lmcompress":
        described = CompressionConfig.from_dict(described)
    if isinstance(described, CompressionConfig):
        if described.structure is not None:
            shape_skeleton(model, described.structure)
        replace_skeleton(model, described.layers)
        finish_replaced(model, described.layers)
    return model


def is_stage(name: str) -> bool:
    """Whether a start is a stage rather than the recipe's model.

    Args:
        name: name of the start.
    """
    return name != BASE_MODEL


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
    if materials.task.kind.generates:
        # as in BART: what ends a text begins the next
        start = tokenizer.eos_token_id
        special |= {"eos_token_id": start, "decoder_start_token_id": start, "forced_eos_token_id": start}
    # RoBERTa and its relatives count positions from the padding's id
    positions = model.positions + first_position(AutoConfig.for_model(model.family, **special))
    values = {
        family.hidden_size: model.hidden_size,
        **{stack.num_layers: model.layers for stack in family.stacks},
        **{stack.num_heads: model.num_heads for stack in family.stacks},
        **{stack.intermediate_size: model.intermediate_size or 4 * model.hidden_size for stack in family.stacks},
        "max_position_embeddings" if model.family != "gpt2" else "n_positions": positions,
        "vocab_size": len(tokenizer),
        **({family.embedding_size: model.hidden_size} if family.embedding_size else {}),
    }
    # a query head has a key of its own and a share of the hidden size, unless the recipe says otherwise
    sizes = {family.key_value_heads: model.num_heads, family.head_size: model.hidden_size // model.num_heads}
    values |= {name: size for name, size in sizes.items() if name and name not in model.config}
    decided = values | special | _head(materials.task)
    synonyms = {known.attribute_map.get(name, name) for name in decided}
    for name in model.config:
        if known.attribute_map.get(name, name) in synonyms:
            raise LmcompressError(f"model.config.{name}: follows from the rest of the recipe; leave it out")
    return AutoConfig.for_model(model.family, **decided | model.config)


def _head(task: Task) -> dict[str, Any]:
    if task.kind is TaskKind.CAUSAL_LM or task.kind.generates:
        return {}
    names = {"id2label": task.id2label, "label2id": task.label2id} if task.label_names else {}
    problem = {"problem_type": task.problem_type} if task.problem_type else {}
    return {"num_labels": task.num_labels} | names | problem


def _config_of(path: str, head: Mapping[str, Any]) -> PretrainedConfig:
    with found(path, "model"):
        config = AutoConfig.from_pretrained(path, **head)
    family_of(config)
    return config
