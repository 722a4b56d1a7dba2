"""How a stage is trained: fields of :class:`transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator
from transformers import TrainingArguments

from lmcompress.recipes.specs import SchemaPart

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
    """How a stage is trained: the usual fields of transformers.TrainingArguments, and any of the others by its name."""

    learning_rate: Annotated[float, Field(gt=0, description="Greatest learning rate.")] = 5e-5
    num_train_epochs: Annotated[float, Field(gt=0, description="Passes over the training rows.")] = 3.0
    max_steps: Annotated[
        int,
        Field(
            ge=-1,
            description="Optimizer steps; overrides num_train_epochs if positive. 0: nothing is trained; the stage "
            "only prunes, quantizes, is made compact, cuts its student out, or takes the model as it is.",
        ),
    ] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, description="Rows of a micro-batch on each device.")] = 32
    per_device_eval_batch_size: Annotated[int, Field(ge=1, description="Rows of a batch in evaluation.")] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="Micro-batches of an optimizer step.")] = 1
    warmup_steps: Annotated[
        float, Field(ge=0, description="Steps in which the learning rate rises; below 1 a share of all steps.")
    ] = 0.1
    weight_decay: Annotated[float, Field(ge=0, description="Of AdamW.")] = 0.01
    lr_scheduler_type: Annotated[str, Field(description="linear, cosine, constant, constant_with_warmup, ...")] = (
        "linear"
    )
    max_grad_norm: Annotated[float, Field(ge=0, description="Gradients are clipped to this norm; 0: not at all.")] = 1.0
    bf16: Annotated[bool, Field(description="bfloat16 autocast.")] = False
    logging_steps: Annotated[float, Field(gt=0, description="Steps between two entries of the log.")] = 50
    save_strategy: Annotated[
        Literal["no", "steps", "epoch"], Field(description="When checkpoints to resume from are written.")
    ] = "epoch"
    save_total_limit: Annotated[int | None, Field(ge=1, description="Checkpoints kept while training.")] = 1
    train_sampling_strategy: Annotated[
        Literal["random", "sequential", "group_by_length"],
        Field(description="group_by_length saves padding: the rows of a batch are alike in length."),
    ] = "random"

    def arguments(self) -> dict[str, Any]:
        """What is passed to :class:`transformers.TrainingArguments`: our defaults and what was set."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name in self.model_fields_set or name in Training.__annotations__
        }

    @model_validator(mode="before")
    @classmethod
    def _not_ours(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if (reason := _OWNED_BY_THE_RUN.get(str(name))) is not None:
                    raise ValueError(f"{name} cannot be set in a recipe: {reason}")
        return values
