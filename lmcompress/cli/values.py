"""Command-line strings as validated values, whose errors name the option."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmcompress.errors import LmcompressError, arguments_called, nearest

if TYPE_CHECKING:
    from lmcompress.pruning.structured.targets import Shape
    from lmcompress.recipes.specs import EvaluationSpec, TaskSpec

T = TypeVar("T", bound=BaseModel)

OPTIONS = {
    "text_columns": "--text-column",
    "label_column": "--label-column",
    "data": "--data",
    "limit": "--limit",
    "kind": "a recipe's task.kind",
    "splits": "a recipe's task.splits",
    "max_length": "--max-length",
    "evaluation.splits": "--split",
    "evaluation.metrics": "--metric",
    "save": "--format",
    "storage": "--storage",
    "batch_sizes": "--batch",
    "sequence_length": "--length",
    "repeats": "--repeats",
    "threads": "--threads",
    "stride": "--stride",
    "evaluation.stride": "--stride",
    "steps": "--steps",
    "shares": "--share",
    "task": "--task",
    "batches": "--data",
}
"""Names of a verb's inputs in messages."""

RECIPE_KEYS = {
    name: f"task.{name}"
    for name in ("text_columns", "label_column", "data", "limit", "kind", "splits", "chat", "packing")
} | {name: name for name in ("evaluation.splits", "evaluation.metrics", "save", "storage")}
"""Names of a recipe's entries in messages."""

_OPTION_OF = {
    "text_columns": "--text-column",
    "name": "--task",
    "splits": "--split",
    "metrics": "--metric",
    "latency_batches": "--batch",
    "calibration_rows": "--rows",
    "min_count": "--vocabulary",
    "schedule": "--iterations",
    "weights.granularity": "--granularity",
    "weights.quantizer": "--quantizer",
    "weights": "--bits",
    "embeddings": "--embedding-bits",
    "rules": "--leave",
}


@contextmanager
def messages_name_options() -> Iterator[None]:
    """Within the block, messages name the options of the command line, and what pydantic refuses is such a message."""
    with arguments_called(OPTIONS):
        try:
            yield
        except ValidationError as error:
            raise LmcompressError(_refusal(error)) from error


def validated(kind: type[T], values: dict[str, Any], option: str | None = None) -> T:
    """A pydantic model of values from the command line.

    Args:
        kind: the model.
        values: by the names of its fields.
        option: that they all come from; None: one for each field.

    Raises:
        LmcompressError: If a value is not valid; the message names the option.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise LmcompressError(_refusal(error, kind, option)) from error


def _refusal(error: ValidationError, kind: type[BaseModel] | None = None, option: str | None = None) -> str:
    first, *others = error.errors(include_url=False)
    message = first["msg"].removeprefix("Value error, ")
    # the other branches of a union
    also = [other["msg"] for other in others if other["loc"][1:-1] and other["loc"][:-1] == first["loc"][:-1]]
    message = " or ".join([message, *(text.removeprefix("Input should be ") for text in also)])
    if first["type"] == "extra_forbidden" and kind is not None:
        message = f"unknown{nearest(str(first['loc'][-1]), kind.model_fields)}"
    elif first["type"] != "value_error" and not isinstance(first["input"], dict | BaseModel):
        message = f"{message}, got {first['input']!r}"
    message = f"{message[:1].lower()}{message[1:]}"
    if option is not None:
        return ": ".join([option, *map(str, first["loc"]), message])
    return f"{_option(first['loc'])}: {message}" if first["loc"] else message


def _option(location: Sequence[str | int]) -> str:
    keys = [str(key) for key in location]
    for dotted in (".".join(keys[:2]), keys[0]):
        if dotted in _OPTION_OF:
            return _OPTION_OF[dotted]
    return "--" + keys[0].replace("_", "-")


def task_spec(
    task: str,
    data: str | None,
    text_column: Sequence[str] | None,
    label_column: str | None,
    limit: int | None,
    max_length: int | None = None,
) -> TaskSpec:
    """The task that the options of a verb describe."""
    from lmcompress.recipes.specs import TaskSpec

    values = {
        "name": task,
        "data": data,
        "text_columns": tuple(text_column) if text_column else None,
        "label_column": label_column,
        "limit": limit,
        "max_length": max_length,
    }
    return validated(TaskSpec, {name: value for name, value in values.items() if value is not None})


def evaluation_spec(
    split: str, metric: Sequence[str] | None, batch: Sequence[int] | None = None, **others: Any
) -> EvaluationSpec:
    """What is measured, as the options of a verb say it."""
    from lmcompress.recipes.specs import EvaluationSpec

    values = {
        "splits": (split,),
        "metrics": tuple(metric) if metric else None,
        "latency_batches": tuple(batch or (1, 32)),
    }
    return validated(EvaluationSpec, values | others)


def parts_of(text: str) -> tuple[str, ...]:
    """``"heads,neurons"`` as names."""
    return tuple(part for part in text.replace(" ", ",").split(",") if part)


def shape_of(text: str) -> Shape:
    """``"layers=6,heads=8/4/0"`` as a shape."""
    from lmcompress.pruning.structured.targets import Shape

    sizes: dict[str, Any] = {}
    for piece in parts_of(text):
        name, equals, value = piece.partition("=")
        counts = value.split("/")
        if not equals or not all(count.isdecimal() for count in counts):
            raise LmcompressError(f"--shape must look like layers=6,heads=8,ffn=1024 or heads=8/4/0, got {piece!r}")
        if name in sizes:
            raise LmcompressError(f"--shape: {name} is given twice")
        sizes[name] = int(value) if len(counts) == 1 else tuple(map(int, counts))
    return validated(Shape, sizes, "--shape")


def number_or_word(text: str) -> int | str:
    """``"4"`` as 4; any other word as it is."""
    return int(text) if text.isdecimal() else text


def pruning_values(parts: str, iterations: int, repair: str) -> dict[str, Any]:
    """Parts, schedule and repair as a :class:`~lmcompress.pruning.structured.config.PruningConfig` has them."""
    names = parts_of(parts)
    return {
        "parts": names,
        "schedule": {"kind": "one_shot"} if iterations == 1 else {"kind": "iterative", "rounds": iterations},
        # only these two have something behind them that can be fitted again
        "repair": repair if {"heads", "neurons"} & set(names) else "none",
    }
