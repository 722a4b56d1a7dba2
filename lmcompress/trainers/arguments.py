"""Arguments that ``HfArgumentParser`` reads from the command line, JSON or YAML, with the configurations of methods."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from transformers import TrainingArguments

from lmcompress.errors import LmcompressError, nearest
from lmcompress.trainers.building import CONFIGS, Asked

_TAKES = "a JSON object, or a file of YAML or JSON"


# annotations of dataclasses that HfArgumentParser reads must be types: "dict | str | None" is resolved by it
@dataclass
class CompressionArguments(TrainingArguments):  # type: ignore[misc]
    """``TrainingArguments`` that also carry the configurations of methods.

    Each is a dictionary, a JSON object in a string, or the name of a file of YAML or JSON, with the fields of the
    configuration (``DistillationConfig``, …). The trainers take from here what no keyword gives.

    Raises:
        LmcompressError: If a configuration is not valid, with the field, what was expected and what came.
    """

    distillation: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": f"DistillationConfig: what is compared with the teacher; {_TAKES}."}
    )
    pruning: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": f"PruningConfig: what is pruned, and how much; {_TAKES}."}
    )
    quantization: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": f"QuantizationConfig: bits of weights and activations; {_TAKES}."}
    )
    sparsity: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": f"SparsityConfig: pruning of single weights; {_TAKES}."}
    )
    sharing: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": f"SharingConfig: clustering of weights; {_TAKES}."}
    )

    # options that are one field of a configuration: name of the option to configuration and path of the field
    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (config, *path) in self._SHORT.items():
            if (value := getattr(self, name)) is not None:
                whole = _read(config, getattr(self, config)) or {}
                _put(whole, path, value, name)
                setattr(self, config, whole)
        for name in CONFIGS:
            setattr(self, name, _read(name, getattr(self, name)))
            self.config_of(name)

    def config_of(self, name: str) -> Any:
        """A configuration, validated.

        Args:
            name: ``distillation``, ``pruning``, ``quantization``, ``sparsity`` or ``sharing``.

        Returns:
            The configuration, or None if there is none.

        Raises:
            LmcompressError: If it is not valid.
        """
        given = getattr(self, name)
        if given is None:
            return None
        try:
            return CONFIGS[name].model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            unknown = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
            known = nearest(str(first["loc"][0]), CONFIGS[name].model_fields) if unknown else ""
            raise LmcompressError(f"{where}: {first['msg']}, got {first['input']!r}{known}") from error

    def asked(self, given: Asked) -> Asked:
        """What a trainer's keywords ask for, completed by these arguments.

        Args:
            given: of the keywords, which come first.
        """
        # a script may have arguments for a teacher and run without one
        wanted = [name for name in CONFIGS if name != "distillation" or given.teacher is not None]
        return given.with_defaults(**{name: self.config_of(name) for name in wanted})


@dataclass
class DistillationArguments(CompressionArguments):
    """Arguments of :class:`~lmcompress.trainers.DistillationTrainer`."""

    temperature: float | None = field(default=None, metadata={"help": "Temperature of teacher and student."})
    logits_weight: float | None = field(default=None, metadata={"help": "Weight of the loss on the logits."})
    label_weight: float | None = field(default=None, metadata={"help": "Weight of the loss on the labels; 0: none."})

    on_policy_fraction: float | None = field(
        default=None, metadata={"help": "Share of the optimizer steps on texts that the student writes itself."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Maximum tokens that the student writes for a row, where it writes."}
    )

    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {
        "temperature": ("distillation", "temperature"),
        "logits_weight": ("distillation", "weight"),
        "label_weight": ("distillation", "label_weight"),
        "on_policy_fraction": ("distillation", "on_policy", "fraction"),
        "max_new_tokens": ("distillation", "on_policy", "max_new_tokens"),
    }


@dataclass
class PruningArguments(CompressionArguments):
    """Arguments of :class:`~lmcompress.trainers.PruningTrainer`."""

    target_sparsity: float | None = field(default=None, metadata={"help": "Share of the blocks' weights to prune."})
    parts: list[str] | None = field(default=None, metadata={"help": "What is pruned: heads, neurons, layers, hidden…"})

    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {
        "target_sparsity": ("pruning", "target", "sparsity"),
        "parts": ("pruning", "parts"),
    }


@dataclass
class QuantizationArguments(CompressionArguments):
    """Arguments of :class:`~lmcompress.trainers.QuantizationTrainer`."""

    weight_bits: str | None = field(default=None, metadata={"help": "Bits of weights: 8, 4, 3, 2, 1 or ternary."})
    embedding_bits: str | None = field(default=None, metadata={"help": "Bits of embeddings, likewise."})
    activation_bits: str | None = field(default=None, metadata={"help": "Bits of activations: 8 or 4."})

    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {
        "weight_bits": ("quantization", "weights", "bits"),
        "embedding_bits": ("quantization", "embeddings", "bits"),
        "activation_bits": ("quantization", "activations", "bits"),
    }


@dataclass
class SparsityArguments(CompressionArguments):
    """Arguments of :class:`~lmcompress.trainers.SparsityTrainer`."""

    target_sparsity: float | None = field(default=None, metadata={"help": "Share of the weights to prune."})

    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {"target_sparsity": ("sparsity", "sparsity")}


@dataclass
class SharingArguments(CompressionArguments):
    """Arguments of :class:`~lmcompress.trainers.SharingTrainer`."""

    clusters: int | None = field(default=None, metadata={"help": "Number of shared values of each matrix."})

    _SHORT: ClassVar[dict[str, tuple[str, ...]]] = {"clusters": ("sharing", "clusters")}


def _read(name: str, given: Any) -> dict[str, Any] | None:
    if given is None or isinstance(given, dict):
        return given
    if isinstance(given, BaseModel):
        return given.model_dump(exclude_unset=True)
    text = str(given)
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)
        else:
            found = YAML(typ="safe", pure=True).load(Path(text).read_text("utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise LmcompressError(f"{name} must be {_TAKES}, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise LmcompressError(f"{name} must be {_TAKES}, got {text!r}, which holds {type(found).__name__}")
    return found


def _put(whole: dict[str, Any], path: list[str], value: Any, option: str) -> None:
    *above, last = path
    for part in above:
        whole = whole.setdefault(part, {})
    if last in whole and whole[last] != value:
        raise LmcompressError(f"{option}={value!r} contradicts the configuration, which has {last}={whole[last]!r}")
    whole[last] = int(value) if isinstance(value, str) and value.isdigit() else value
