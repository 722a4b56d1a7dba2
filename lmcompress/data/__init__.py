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
from lmcompress.data.text import documents_for_two, pack_blocks, pack_documents
from lmcompress.data.tokenization import same_tokenizer, tokenize
from lmcompress.data.tokenizer_training import train_tokenizer
from lmcompress.data.windows import Windows, windows

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
    "Windows",
    "augment",
    "collator",
    "delete_tokens",
    "documents_for_two",
    "load_task",
    "long_disorder",
    "mask_tokens",
    "n_gram_sample",
    "nearest_words",
    "pack_blocks",
    "pack_documents",
    "replace_tokens",
    "same_tokenizer",
    "sampling_probabilities",
    "short_disorder",
    "tokenize",
    "train_tokenizer",
    "windows",
]
