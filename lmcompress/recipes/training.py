"""The training of a stage: fields of :class:`transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, create_model, model_validator
from transformers import TrainingArguments

from lmcompress.errors import LmcompressError
from lmcompress.recipes.lookup import first_line
from lmcompress.recipes.specs import SchemaPart
from lmcompress.trainers.precision import bfloat16_is_fast

_OWNED_BY_THE_RUN = {
    "output_dir": "the run decides where checkpoints go: use output",
    "resume_from_checkpoint": "runs resume by themselves",
    "remove_unused_columns": "lmcompress prepares the columns",
    "label_names": "lmcompress names the labels",
    "disable_tqdm": "the run draws its own progress bar",
    "deepspeed": "not supported",
    "label_smoothing_factor": "smooth the teacher's temperature instead",
    "push_to_hub": "use lmcompress push, after the run",
}

TRAINING_FIELDS = frozenset(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name not in _OWNED_BY_THE_RUN and not field.name.startswith(("hub_", "do_", "local_rank", "save_only"))
)

"""The fields of :class:`transformers.TrainingArguments` that a recipe may set."""


if TYPE_CHECKING:

    class _TransformersFields(SchemaPart):
        """Fields of :class:`transformers.TrainingArguments` that :class:`Training` does not describe itself."""

else:
    _HINTS = typing.get_type_hints(TrainingArguments)

    def _type_of(name: str) -> Any:
        """The type that Transformers declares where it is a plain one; else any."""
        hint = _HINTS[name]
        plain = set(typing.get_args(hint) or (hint,)) <= {bool, int, float, str, type(None)}
        return hint | None if plain else bool | int | float | str | list[Any] | dict[str, Any] | None

    _TransformersFields = create_model(
        "_TransformersFields",
        __base__=SchemaPart,
        **{name: (_type_of(name), Field(None, description="As in transformers.")) for name in sorted(TRAINING_FIELDS)},
    )


class Training(_TransformersFields):
    """The training of a stage: the usual fields of transformers.TrainingArguments, and any other by name."""

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 5e-5
    num_train_epochs: Annotated[float, Field(gt=0, description="Number of passes over the training rows.")] = 3.0
    max_steps: Annotated[
        int,
        Field(
            ge=-1,
            description="Number of optimizer steps; overrides num_train_epochs if positive. 0: no training; the stage "
            "only prunes, quantizes, replaces layers, extracts its student, or uses the model as it is.",
        ),
    ] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, description="Size of a micro-batch per device.")] = 32
    per_device_eval_batch_size: Annotated[int, Field(ge=1, description="Batch size in evaluation, per device.")] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="Micro-batches per optimizer step.")] = 1
    warmup_steps: Annotated[
        float, Field(ge=0, description="Steps in which the learning rate rises; below 1 a share of all steps.")
    ] = 0.1
    weight_decay: Annotated[float, Field(ge=0, description="Weight decay of AdamW.")] = 0.01
    lr_scheduler_type: Annotated[str, Field(description="Schedule: linear, cosine, constant_with_warmup, ...")] = (
        "linear"
    )
    max_grad_norm: Annotated[float, Field(ge=0, description="Gradient norm to clip to; 0: no clipping.")] = 1.0
    bf16: Annotated[
        bool | Literal["auto"],
        Field(
            description="Whether to compute in bfloat16 (autocast; weights, scales and losses stay in float32); auto: "
            "where the machine has instructions for it."
        ),
    ] = False
    logging_steps: Annotated[float, Field(gt=0, description="Number of steps between log entries.")] = 50
    save_strategy: Annotated[
        Literal["no", "steps", "epoch"], Field(description="When checkpoints to resume from are written.")
    ] = "epoch"
    save_total_limit: Annotated[int | None, Field(ge=1, description="Number of training checkpoints to keep.")] = 1
    train_sampling_strategy: Annotated[
        Literal["random", "sequential", "group_by_length"],
        Field(description="Sampling of rows; group_by_length puts rows of similar length in a batch, saving padding."),
    ] = "random"

    def arguments(self) -> dict[str, Any]:
        """The arguments of :class:`transformers.TrainingArguments`: our defaults and the given values."""
        values = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name in self.model_fields_set or name in Training.__annotations__
        }
        values["bf16"] = self.computes_in_bfloat16()
        if values["bf16"] and not torch.cuda.is_available() and not torch.backends.mps.is_available():
            # Transformers refuses bf16 on a CPU that it was not told to use
            values.setdefault("use_cpu", True)
        return values

    def computes_in_bfloat16(self) -> bool:
        """``bf16``, with ``auto`` decided for this machine."""
        if self.bf16 != "auto":
            return self.bf16
        return bfloat16_is_fast(use_cpu=bool(getattr(self, "use_cpu", None)))

    def trainer_arguments(self, output: str, **defaults: Any) -> TrainingArguments:
        """The arguments of the trainer.

        Args:
            output: folder of its checkpoints.
            **defaults: for what was not set here.

        Raises:
            LmcompressError: If Transformers refuses them.
        """
        try:
            return TrainingArguments(output, **{"report_to": "none"} | defaults | self.arguments())
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise LmcompressError(first_line(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _not_ours(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if (reason := _OWNED_BY_THE_RUN.get(str(name))) is not None:
                    raise ValueError(f"{name} cannot be set in a recipe: {reason}")
        return values
