"""What a recipe is: one model, one task, a few stages; everything in it is validated before anything runs."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError
from transformers import TrainingArguments

from lmcompress.clustering.config import SharingConfig
from lmcompress.data import TaskKind
from lmcompress.distillation.config import DistillationConfig, Match, WeightSchedule
from lmcompress.errors import nearest
from lmcompress.families import FAMILIES
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.quantization.config import QuantizationConfig, WeightScheme
from lmcompress.quantization.post_training import POST_TRAINING
from lmcompress.quantization.post_training import Method as PostTraining
from lmcompress.students.config import Replacement
from lmcompress.students.depth import NAMED_SHAPES

BASE_MODEL = "model"
"""What a stage's ``start`` is called when it is the recipe's own model."""

CONTROL_SUFFIX = "-control"

_RESERVED = (BASE_MODEL, "checkpoints", "plots", "stores")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWNED_BY_THE_RUN = {
    "output_dir": "the run decides where checkpoints go: use output",
    "resume_from_checkpoint": "runs resume by themselves",
    "remove_unused_columns": "lmcompress prepares the columns",
    "label_names": "lmcompress names the labels",
    "disable_tqdm": "the run draws its own progress bar",
    "deepspeed": "not supported",
    "push_to_hub": "use lmcompress push, after the run",
}
TRAINING_FIELDS = frozenset(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name not in _OWNED_BY_THE_RUN and not field.name.startswith(("hub_", "do_", "local_rank", "save_only"))
)
"""The fields of :class:`transformers.TrainingArguments` that a recipe may set."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSpec(_Part):
    """A small tokenizer, trained on the training texts."""

    kind: Annotated[
        Literal["wordpiece", "bytelevel_bpe"],
        Field(description="wordpiece: lower-casing, as BERT's; bytelevel_bpe: as GPT-2's."),
    ]
    vocab_size: Annotated[int, Field(ge=16, le=1 << 20, description="The most entries, special tokens included.")]


class FromScratch(_Part):
    """A model with random weights, for runs that start from nothing."""

    family: Annotated[str, Field(description="Model family: bert, roberta, distilbert, electra or gpt2.")]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 16, description="Width of the hidden states.")]
    layers: Annotated[int, Field(ge=1, le=256, description="Number of Transformer blocks.")]
    num_heads: Annotated[
        int, Field(ge=1, le=256, description="Attention heads of each block; must divide hidden_size.")
    ]
    intermediate_size: Annotated[
        int | None,
        Field(ge=1, le=1 << 18, description="Width of the feed-forward networks; default: four times hidden_size."),
    ] = None
    positions: Annotated[int, Field(ge=2, le=1 << 20, description="The longest input, in tokens.")] = 512
    tokenizer: Annotated[TokenizerSpec, Field(description="The tokenizer that is trained for it.")]
    config: Annotated[
        dict[str, int | float | str | bool],
        Field(description="Further fields of the family's transformers config, such as hidden_dropout_prob."),
    ] = {}

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"no model family {family!r}{nearest(family, FAMILIES)}")
        return family

    @model_validator(mode="after")
    def _heads_divide(self) -> FromScratch:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size, got {self.num_heads} and {self.hidden_size}")
        return self


class TaskSpec(_Part):
    """What the models are trained for, and where the rows are."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            description="glue/<task>, embedded/<name>, a folder or file, a Hub data set (owner/name:configuration), "
            "or, with data, a name of your own.",
        ),
    ]
    data: Annotated[
        str | None, Field(description="Folder or file with the rows; for GLUE the folder that holds glue/<task>/.")
    ] = None
    text_columns: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, max_length=2, description="One column or two; default: the usual names."),
    ] = None
    label_column: Annotated[str | None, Field(description="Default: the usual names are looked for.")] = None
    kind: Annotated[TaskKind | None, Field(description="Default: the labels' type tells.")] = None
    splits: Annotated[
        dict[str, str] | None, Field(description="train, validation, test: what the source calls them.")
    ] = None
    max_length: Annotated[
        int, Field(ge=2, description="Tokens of a row; longer texts are cut. For causal_lm the size of a packed block.")
    ] = 128
    limit: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of rows of each split, to try things out; for causal_lm, of packed blocks.",
        ),
    ] = None


class Shape(_Part):
    """Sizes of a student; what is left out stays as in the model it is made from."""

    layers: Annotated[
        int | tuple[int, ...] | None, Field(description="Number of Transformer blocks, or which (counted from 0).")
    ] = None
    hidden_size: Annotated[int | None, Field(ge=1, le=1 << 16, description="Width of the hidden states.")] = None
    intermediate_size: Annotated[
        int | None, Field(ge=1, le=1 << 18, description="Width of the feed-forward networks.")
    ] = None
    num_heads: Annotated[int | None, Field(ge=1, le=256, description="Attention heads of each block.")] = None


class StudentSpec(_Part):
    """How the student is made from the model that the stage starts from; exactly one of its first four fields."""

    layers: Annotated[
        int | tuple[int, ...] | None,
        Field(description="Keep so many blocks, or these (counted from 0), with their weights."),
    ] = None
    shape: Annotated[Shape | None, Field(description="Any sizes that a stock config can say.")] = None
    named: Annotated[str | None, Field(description="A shape by its name: T3, T4-tiny, DistilBERT, DistilGPT2, ...")] = (
        None
    )
    width: Annotated[
        float | None,
        Field(gt=0, le=1, description="Multiplier of all widths; heads keep their size, so it is rounded to heads."),
    ] = None
    choose: Annotated[
        Literal["uniform", "first", "last", "skip"],
        Field(description="With a number of layers: which are kept. skip: the last one of each group."),
    ] = "uniform"
    initialise: Annotated[
        Literal["slice", "random"],
        Field(description="shape, named and width: cut the weights out of the start's, or draw them."),
    ] = "slice"

    @model_validator(mode="after")
    def _exactly_one(self) -> StudentSpec:
        given = [name for name in ("layers", "shape", "named", "width") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of layers, shape, named and width must be given, got {' and '.join(given) or 'none'}"
            )
        if self.named is not None and self.named not in NAMED_SHAPES:
            raise ValueError(f"no shape is called {self.named!r}{nearest(self.named, NAMED_SHAPES)}")
        if self.initialise == "random" and self.layers is not None:
            raise ValueError("layers keeps weights; for random weights give shape: {layers: ...}")
        return self


class LayerLoss(_Part):
    """A match that is repeated for every pair of a layer map."""

    loss: Annotated[str, Field(description="Name of the match: hidden_mse, nst, attention_mse, ...")]
    weight: Annotated[float, Field(ge=0, description="Weight of each of the terms.")] = 1.0
    weight_schedule: WeightSchedule = "constant"
    projection: Annotated[
        Literal["none", "auto", "linear", "relu", "tanh"], Field(description="On the student's side; see matches.")
    ] = "auto"
    projection_learning_rate: Annotated[float | None, Field(gt=0, description="Default: that of the model.")] = None
    on: Annotated[
        Literal["scores", "probabilities"] | None,
        Field(description="Attention matches only: before or after the softmax."),
    ] = None
    which: Annotated[int, Field(ge=0, description="Number of the teacher, where there are several.")] = 0
    options: Annotated[dict[str, Any], Field(description="Further arguments of the match.")] = {}


class StoreSpec(_Part):
    """The teacher's answers are computed once and kept on disk."""

    top_k: Annotated[
        int | None,
        Field(ge=1, description="Keep only so many of the greatest logits of each row or token; default: all."),
    ] = None
    folder: Annotated[str | None, Field(description="Where; default: in the stage's folder.")] = None


class StageDistillation(DistillationConfig):
    """How the stage's student is fitted to its teachers."""

    teachers: Annotated[
        tuple[str, ...], Field(min_length=1, description="Names of earlier stages, paths, or names on the Hub.")
    ]
    teacher_precision: Annotated[
        Literal["float32", "bfloat16", "float16", "8bit", "4bit"] | None,
        Field(description="How teachers are loaded; 8bit and 4bit need pip install lmcompress[bnb] and a GPU."),
    ] = None
    store: Annotated[
        StoreSpec | None, Field(description="Keep the teacher's answers on disk instead of asking it each time.")
    ] = None
    layer_map: Annotated[
        Literal["uniform", "skip", "last"] | tuple[tuple[int, int], ...] | None,
        Field(
            description="Which block of the student learns from which of the teacher, for losses; or pairs of your own."
        ),
    ] = None
    losses: Annotated[
        tuple[str | LayerLoss, ...],
        Field(description="Matches to repeat for every pair of layer_map, as names or in full."),
    ] = ()

    @model_validator(mode="after")
    def _something_to_do(self) -> StageDistillation:
        if bool(self.losses) != (self.layer_map is not None):
            raise ValueError("layer_map and losses go together: one says which layers, the other what is compared")
        plain = self.model_dump(exclude={"teachers", "teacher_precision", "store", "layer_map", "losses"})
        if self.losses:
            # any match will do: whether there is something to train on is all that is asked
            plain["matches"] = (*plain["matches"], Match(loss="hidden_mse", student=-1, teacher=-1))
        DistillationConfig.model_validate(plain)
        if self.teacher_weights is not None and len(self.teacher_weights) != len(self.teachers):
            raise ValueError(f"{len(self.teachers)} teachers have {len(self.teacher_weights)} teacher_weights")
        return self


if TYPE_CHECKING:

    class _TransformersFields(_Part):
        """Fields of :class:`transformers.TrainingArguments` that :class:`Training` does not describe itself."""

else:
    _TransformersFields = create_model(
        "_TransformersFields",
        __base__=_Part,
        **{
            name: (
                bool | int | float | str | list[Any] | dict[str, Any] | None,
                Field(None, description="As in transformers."),
            )
            for name in sorted(TRAINING_FIELDS)
        },
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


class LatencySpec(_Part):
    """What a latency target is about, and where its table of measured times is kept."""

    batch_size: Annotated[int, Field(ge=1, description="Rows of the batch whose time counts.")] = 32
    length: Annotated[
        int | None, Field(ge=1, description="Tokens of a row; default: the task's max_length, at most 128.")
    ] = None
    table: Annotated[
        str | None,
        Field(
            description="JSON file of measured times; default: latency.json in the run's folder. What it does not have "
            "is measured before anything is trained, and put into it."
        ),
    ] = None


class StagePruning(PruningConfig):
    """What the stage takes out of its model, how much, and when."""

    latency: Annotated[LatencySpec | None, Field(description="For targets latency_share and latency_ms.")] = None

    @model_validator(mode="after")
    def _latency_of_a_latency_target(self) -> StagePruning:
        if self.latency is not None and not self.target.kind.startswith("latency"):
            raise ValueError(f"latency is for targets latency_share and latency_ms, got target: {self.target.kind}")
        return self

    def config(self, seed: int) -> PruningConfig:
        """The configuration of the method, without what only recipes have.

        Args:
            seed: the recipe's, unless the stage has its own.
        """
        own = {name: getattr(self, name) for name in PruningConfig.model_fields if name in self.model_fields_set}
        return PruningConfig(**{"seed": seed} | own)


class StageQuantization(QuantizationConfig):
    """What the stage's weights and activations are quantized to: while it is trained, or after that."""

    method: Annotated[
        PostTraining | None,
        Field(
            description="Of stages with max_steps: 0. rtn rounds to nearest, gptq lets weights make rounding good, awq "
            "gives inputs that matter finer steps; default: rtn. Stages that train learn instead."
        ),
    ] = None

    def config(self, seed: int, *, trains: bool) -> QuantizationConfig:
        """The configuration of the method, without what only recipes have.

        Args:
            seed: the recipe's, unless the stage has its own.
            trains: whether the stage takes steps; if not, what is left out is as nothing has to be learned for.
        """
        own = {name: getattr(self, name) for name in QuantizationConfig.model_fields if name in self.model_fields_set}
        if trains:
            return QuantizationConfig(**{"seed": seed} | own)
        given = {name: getattr(POST_TRAINING, name) for name in ("weights", "embeddings", "attention")}
        for name in ("weights", "embeddings"):
            scheme, default = own.get(name), given[name]
            if isinstance(scheme, WeightScheme) and default is not None:
                own[name] = WeightScheme(**default.model_dump() | scheme.model_dump(exclude_unset=True))
        return QuantizationConfig(**{"seed": seed} | given | own)


class VocabularySpec(_Part):
    """Rows of the embeddings that the task never reads go, and the tokenizer is rewritten to match."""

    min_count: Annotated[int, Field(ge=1, description="A token stays if the texts have it so often.")] = 1
    max_size: Annotated[int | None, Field(ge=1, description="The most tokens that stay, the most frequent ones.")] = (
        None
    )
    keep: Annotated[
        tuple[str, ...], Field(description="Tokens that stay in any case, in the tokenizer's spelling: ##ing, Ġcat.")
    ] = ()
    keep_characters: Annotated[
        bool, Field(description="Keep all single characters, so that words the texts do not have can be spelled.")
    ] = True
    splits: Annotated[
        tuple[str, ...], Field(min_length=1, description="Splits of the task whose texts are counted.")
    ] = ("train",)


class Augmentation(_Part):
    """New training texts made from the old ones; the teacher says what they mean."""

    operations: Annotated[
        tuple[Literal["mask", "delete", "replace", "n_gram", "short_disorder", "long_disorder"], ...],
        Field(
            min_length=1,
            description="One is drawn for each new text. replace: by words that the first teacher's embeddings have "
            "near, so it needs distillation.",
        ),
    ]
    copies: Annotated[int, Field(ge=1, le=100, description="New rows for each row.")] = 1
    probability: Annotated[
        float | None, Field(ge=0, le=1, description="Of each word to be changed; default: that of the operation.")
    ] = None

    @property
    def replaces(self) -> bool:
        """Whether words give way to near ones."""
        return "replace" in self.operations


class Stage(_Part):
    """One training run: what it starts from, what it becomes, what it learns from."""

    name: Annotated[str, Field(description="Also the name of its folder: letters, digits, . _ -")]
    start: Annotated[str, Field(description="Name of an earlier stage, or model: the recipe's own.")] = BASE_MODEL
    student: Annotated[StudentSpec | None, Field(description="How the start is made smaller; default: it is not.")] = (
        None
    )
    distillation: Annotated[
        StageDistillation | None, Field(description="Left out: plain fine-tuning, which is how teachers are made.")
    ] = None
    compact: Annotated[
        tuple[Replacement, ...] | None,
        Field(
            min_length=1,
            description="Layers that compute with fewer numbers, put in the place of the student's before it is "
            "trained, one replacement after the other.",
        ),
    ] = None
    pruning: Annotated[
        StagePruning | None,
        Field(description="What is cut out of the model, while it is trained or, with max_steps: 0, without training."),
    ] = None
    quantization: Annotated[
        StageQuantization | None,
        Field(
            description="What weights and activations are quantized to, while the model is trained or, with "
            "max_steps: 0, without training; what is pruned in the same stage is cut first."
        ),
    ] = None
    sparsity: Annotated[
        SparsityConfig | None,
        Field(
            description="Which single weights become zero, while the model is trained or, with max_steps: 0, without "
            "training; storage makes the file smaller by it."
        ),
    ] = None
    sharing: Annotated[
        SharingConfig | None,
        Field(
            description="How many values weights share, which are trained or, with max_steps: 0, only found; zeros "
            "stay. storage makes the file smaller by it."
        ),
    ] = None
    vocabulary: Annotated[
        VocabularySpec | None,
        Field(description="Prune the vocabulary first: for this stage and for those that start from it."),
    ] = None
    training: Annotated[
        Training, Field(description="Fields of transformers.TrainingArguments; max_steps: 0 trains nothing.")
    ] = Training()
    augmentation: Annotated[Augmentation | None, Field(description="More training texts.")] = None
    save: Annotated[
        Literal["native", "vanilla", "self_loading"],
        Field(
            description="native: import lmcompress to load it; vanilla: stock Transformers loads it; "
            "self_loading: trust_remote_code."
        ),
    ] = "native"
    storage: Annotated[
        Literal["plain", "auto", "zstd", "huffman"],
        Field(
            description="auto, zstd and huffman store the weights as entropy-coded streams, to the bit; smaller where "
            "they are pruned, shared or quantized."
        ),
    ] = "plain"
    control: Annotated[
        bool,
        Field(
            description="Also train the same student without a teacher, from the same start, for as many steps, and "
            "made compact, pruned and quantized in the same way."
        ),
    ] = False

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith(CONTROL_SUFFIX):
            raise ValueError(
                f"must be letters, digits, '.', '_' and '-', not one of {', '.join(_RESERVED)}, and not end in "
                f"{CONTROL_SUFFIX!r}, got {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _control_of_a_student(self) -> Stage:
        if self.control and self.distillation is None:
            raise ValueError("control: true needs distillation: it trains the same student without it")
        return self

    @model_validator(mode="after")
    def _replaces_by_a_teacher(self) -> Stage:
        if self.augmentation is not None and self.augmentation.replaces and self.distillation is None:
            raise ValueError(
                "augmentation by replace needs distillation: the words come from the first teacher's embeddings; leave "
                "replace out, or name a teacher"
            )
        return self

    @model_validator(mode="after")
    def _can_do_without_training(self) -> Stage:
        if self.trains:
            return self
        if self.distillation is not None:
            raise ValueError(
                "max_steps: 0 trains nothing, so there is nothing to distil; leave distillation out or train some steps"
            )
        if self.augmentation is not None:
            raise ValueError("max_steps: 0 trains nothing, so augmentation has no use; leave it out")
        for method in (self.pruning, self.sparsity):
            if method is not None and method.trains:
                raise ValueError(
                    f"the schedule {method.schedule.kind} needs training, got max_steps: 0; choose one_shot or "
                    "iterative, or train some steps"
                )
        return self

    @model_validator(mode="after")
    def _keeps_the_last_checkpoint(self) -> Stage:
        if not getattr(self.training, "load_best_model_at_end", None):
            return self
        for name, what in (
            ("pruning", "the final mask"),
            ("sparsity", "the final mask"),
            ("sharing", "the final codebooks"),
            ("quantization", "the last scales"),
        ):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"load_best_model_at_end must be false with {name}: the weights of an earlier checkpoint do not "
                    f"fit {what}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _compact_in_a_stage_of_its_own(self) -> Stage:
        if self.compact is None:
            return self
        for name, way_out in (
            ("pruning", "a compact model cannot be cut; prune in a stage before"),
            ("quantization", "a compact model cannot be quantized; leave one of them out"),
            ("sparsity", "make single weights zero in a stage after it"),
            ("sharing", "let single weights share values in a stage after it"),
        ):
            if getattr(self, name) is not None:
                raise ValueError(f"compact and {name} cannot be in one stage: {way_out}")
        if self.save != "native":
            raise ValueError(f"save: {self.save} is not possible with compact: compact layers need lmcompress")
        return self

    @model_validator(mode="after")
    def _shares_what_stays(self) -> Stage:
        for name in ("pruning", "sparsity"):
            if self.trains and self.sharing is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"sharing and {name} cannot be in one stage that trains: {name} changes weights that share their "
                    "values already; give sharing a stage of its own after it"
                )
        return self

    @model_validator(mode="after")
    def _shares_or_quantizes(self) -> Stage:
        if self.sharing is not None and self.quantization is not None:
            raise ValueError(
                "sharing and quantization both say which values weights have: choose one, or share in one stage and "
                "quantize in a later one"
            )
        return self

    @model_validator(mode="after")
    def _quantizes_as_it_trains(self) -> Stage:
        if self.quantization is None:
            return self
        if self.trains and self.quantization.method is not None:
            raise ValueError(
                f"quantization.method {self.quantization.method} is for stages without training; set max_steps: 0, or "
                "leave it out: while a stage trains, its weights learn to be codes"
            )
        if self.save != "native":
            raise ValueError(f"save: {self.save} is not possible with quantization: packed weights need lmcompress")
        if self.trains and self.pruning is not None and self.pruning.schedule.kind == "hard_concrete":
            raise ValueError(
                "the schedule hard_concrete multiplies weights by gates in the end, by which they are no codes any "
                "more: prune in a stage before the one that quantizes, or choose another schedule"
            )
        return self

    @model_validator(mode="after")
    def _streams_are_native(self) -> Stage:
        if self.storage != "plain" and self.save != "native":
            raise ValueError(f"save: {self.save} is not possible with storage: {self.storage}; streams need lmcompress")
        return self

    @property
    def trains(self) -> bool:
        """Whether the stage takes optimizer steps."""
        return self.training.max_steps != 0


class EvaluationSpec(_Part):
    """What is measured at the end, for all stages alike."""

    splits: Annotated[
        tuple[str, ...], Field(min_length=1, description="Splits that quality is measured on, the main one first.")
    ] = ("validation",)
    metrics: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, description="Metrics of quality, the main one first; default: those of the task."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="Rows of a batch when quality is measured.")] = 64
    latency_batches: Annotated[
        tuple[int, ...], Field(description="Batch sizes that latency is measured at; empty: it is not measured.")
    ] = (1, 32)
    sequence_length: Annotated[
        int | None,
        Field(
            ge=1, description="Tokens of a row when latency is measured; default: the task's max_length, at most 128."
        ),
    ] = None
    repeats: Annotated[int, Field(ge=3, description="Timed calls of each model.")] = 20
    stride: Annotated[
        int | None, Field(ge=1, description="Perplexity: tokens between windows; default: windows do not overlap.")
    ] = None


class Recipe(_Part):
    """A model, a task, a few stages, and what is measured in the end."""

    name: Annotated[str, Field(description="For reports; also the default folder, runs/<name>.")]
    description: Annotated[str, Field(description="What it does, in a sentence or two.")] = ""
    paper: Annotated[str | None, Field(description="Where the method comes from: authors, year, link.")] = None
    model: Annotated[
        str | FromScratch,
        Field(description="Path or name on the Hub of a pretrained model, or sizes of one with random weights."),
    ]
    task: Annotated[TaskSpec, Field(description="What the models are trained for.")]
    stages: Annotated[
        tuple[Stage, ...], Field(min_length=1, max_length=64, description="In the order in which they run.")
    ]
    evaluation: Annotated[EvaluationSpec, Field(description="What is measured at the end.")] = EvaluationSpec()
    seed: Annotated[int, Field(ge=0, description="Of weights, order of rows and dropout, in every stage.")] = 0
    output: Annotated[str | None, Field(description="Folder of the run; default: runs/<name>.")] = None

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"must be letters, digits, '.', '_' and '-', got {name!r}")
        return name

    @model_validator(mode="after")
    def _stages_refer_to_earlier_ones(self) -> Recipe:
        earlier: list[str] = []
        later = {stage.name for stage in self.stages}
        for number, stage in enumerate(self.stages):
            at: tuple[str | int, ...] = ("stages", number)
            if stage.name in earlier:
                raise _misreference(f"two stages are called {stage.name!r}", *at, "name")
            if stage.start not in (BASE_MODEL, *earlier):
                raise _misreference(
                    f"{stage.start!r} is no earlier stage{nearest(stage.start, [BASE_MODEL, *earlier])}", *at, "start"
                )
            for index, teacher in enumerate(stage.distillation.teachers if stage.distillation else ()):
                if teacher in later:
                    message = f"{teacher!r} is no earlier stage: a teacher must be trained before its student"
                    raise _misreference(message, *at, "distillation", "teachers", index)
            earlier.append(stage.name)
            later.discard(stage.name)
        return self


def _misreference(message: str, *path: str | int) -> PydanticCustomError:
    return PydanticCustomError("reference", "{message}", {"message": message, "path": path})


def with_controls(recipe: Recipe) -> list[tuple[Stage, Stage | None]]:
    """The stages that are run: the recipe's, each that asks for a control followed by it.

    Args:
        recipe: as it was written.

    Returns:
        pairs of a stage and, for a control, the stage that it is the control of.
    """
    stages: list[tuple[Stage, Stage | None]] = []
    for stage in recipe.stages:
        stages.append((stage, None))
        if stage.control:
            # the suffix is reserved, so the name is free; model_copy does not validate again
            update = {"name": stage.name + CONTROL_SUFFIX, "distillation": None, "control": False}
            stages.append((stage.model_copy(update=update), stage))
    return stages
