"""Tasks and their rows: loading, checking, tokenising, augmenting, batching."""

from lmcompress.data.augmentation import (
    Operation,
    augment,
    delete_tokens,
    long_disorder,
    mask_tokens,
    n_gram_sample,
    nearest_words,
    replace_tokens,
    short_disorder,
)
from lmcompress.data.collators import Collator, collator
from lmcompress.data.embedded import EMBEDDED_SETS
from lmcompress.data.glue import GLUE_TASKS
from lmcompress.data.loading import load_task
from lmcompress.data.multitask import (
    MultiTaskCollator,
    MultiTaskDataset,
    TaskSampledBatches,
    sampling_probabilities,
)
from lmcompress.data.tasks import Task, TaskData, TaskKind
from lmcompress.data.text import pack_blocks
from lmcompress.data.tokenization import same_tokenizer, tokenize
from lmcompress.data.tokenizer_training import train_tokenizer

__all__ = [
    "EMBEDDED_SETS",
    "GLUE_TASKS",
    "Collator",
    "MultiTaskCollator",
    "MultiTaskDataset",
    "Operation",
    "Task",
    "TaskData",
    "TaskKind",
    "TaskSampledBatches",
    "augment",
    "collator",
    "delete_tokens",
    "load_task",
    "long_disorder",
    "mask_tokens",
    "n_gram_sample",
    "nearest_words",
    "pack_blocks",
    "replace_tokens",
    "same_tokenizer",
    "sampling_probabilities",
    "short_disorder",
    "tokenize",
    "train_tokenizer",
]
