"""The models that a recipe names: on ``meta``, where nothing is allocated, or with weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.layers import finish_replaced, replace_skeleton
from lmcompress.checkpoint.structure import shape_skeleton, stock_structure
from lmcompress.data import Task, TaskKind
from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES, family_of
from lmcompress.recipes.lookup import found
from lmcompress.recipes.materials import Materials
from lmcompress.recipes.specs import BASE_MODEL, FromScratch


def auto_class(task: Task) -> Any:
    """The ``AutoModelFor...`` of a task.

    Args:
        task: any task.
    """
    if task.kind is TaskKind.CAUSAL_LM:
        return AutoModelForCausalLM
    return (
        AutoModelForTokenClassification
        if task.kind is TaskKind.TOKEN_CLASSIFICATION
        else AutoModelForSequenceClassification
    )


def has_head_for(config: PretrainedConfig, task: Task) -> bool:
    """Whether a checkpoint holds a head for a kind of task; True where its config does not say.

    Args:
        config: of the checkpoint.
        task: any.
    """
    wanted = auto_class(task).__name__.removeprefix("AutoModel")
    names = (wanted, "LMHead") if task.kind is TaskKind.CAUSAL_LM else (wanted,)
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
                return cls.from_config(config)
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
        return skeleton(config, cls)
    set_seed(materials.recipe.seed)
    trained = AutoConfig.from_pretrained(model)
    # a head for other labels is created anew
    other_head = bool(_head(task)) and trained.num_labels != task.num_labels
    with found(model, "model"):
        return cls.from_pretrained(model, config=config, ignore_mismatched_sizes=other_head)


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


def skeleton(config: PretrainedConfig, cls: Any) -> PreTrainedModel:
    """A model without weights, in the shapes of its config.

    Args:
        config: a config, possibly of a compressed model.
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
    decided = values | special | _head(materials.task)
    synonyms = {known.attribute_map.get(name, name) for name in decided}
    for name in model.config:
        if known.attribute_map.get(name, name) in synonyms:
            raise LmcompressError(f"model.config.{name}: follows from the rest of the recipe; leave it out")
    return AutoConfig.for_model(model.family, **decided | model.config)


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
