"""What a graph computes, as modules from tensors to tensors, by the names that Optimum and transformers.js use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.pooling import pooled
from lmcompress.export.config import ExportConfig
from lmcompress.families import anatomy_of, input_names
from lmcompress.families.positions import positions_of

BATCH, LENGTH = "batch_size", "sequence_length"


class Head(nn.Module):
    """A model as exporters take it: positional tensors in, a tuple of tensors out.

    Args:
        model: packed for the expected outputs, with twins for the graph.
        config: the settings of the export.

    Attributes:
        task: name of the task.
        outputs: names of the outputs, in order; the first is compared in the round-trip check.
        answers: whether the first output's largest entry along the last axis is an answer.
        has_rows: whether every output has a row for each of the inputs'.
    """

    task: ClassVar[str]
    outputs: tuple[str, ...] = ("logits",)
    answers: bool = True
    has_rows: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, config: ExportConfig) -> None:
        super().__init__()
        self.model = model
        names = ["input_ids", "attention_mask"]
        if anatomy_of(model).family.token_type_embeddings and "token_type_ids" in input_names(model):
            names.append("token_type_ids")
        self.inputs: tuple[str, ...] = tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of :attr:`outputs`.

        Args:
            *tensors: in the order of :attr:`inputs`, ``(batch, length)`` int64.
        """
        answer = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.options())
        return tuple(answer[name] for name in self.outputs)

    def options(self) -> dict[str, Any]:
        """Arguments of the model that are no inputs of the graph."""
        return {"use_cache": False} if "use_cache" in input_names(self.model) else {}

    def arguments(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of a batch in the order of :attr:`inputs`; those it lacks have their usual values.

        Args:
            batch: ``input_ids``, ``(batch, length)``, and other inputs of the model.
        """
        ids = batch["input_ids"]
        usual = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return tuple(batch[name] if name in batch else usual[name] for name in self.inputs)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: more than one row, and a length that no width equals."""
        length = max(2, min(11, positions_of(self.model.config) - 1))
        ids = torch.randint(2, self.model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        return self.arguments({"input_ids": ids})

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The axes of each input that may have any size."""
        batch = torch.export.Dim(BATCH)
        length = torch.export.Dim(LENGTH, max=max(2, positions_of(self.model.config)))
        return tuple({0: batch, 1: length} for _ in self.inputs)


class SequenceClassification(Head):
    """``logits (batch, labels)``."""

    task = "sequence_classification"


class TokenClassification(Head):
    """``logits (batch, length, labels)``."""

    task = "token_classification"


class QuestionAnswering(Head):
    """``start_logits`` and ``end_logits``, ``(batch, length)`` each."""

    task = "question_answering"
    outputs = ("start_logits", "end_logits")


class MaskedLanguageModel(Head):
    """``logits (batch, length, tokens)``."""

    task = "masked_lm"


class Embeddings(Head):
    """``last_hidden_state (batch, length, width)``, and with a pooling ``sentence_embedding (batch, width)``."""

    task = "embeddings"
    answers = False

    def __init__(self, model: PreTrainedModel, config: ExportConfig) -> None:
        super().__init__(model.base_model, config)
        self.pooling, self.normalize = config.pooling, config.normalize
        self.outputs = ("last_hidden_state",) + (("sentence_embedding",) if config.pooling else ())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The vectors of tokens, and of sentences where there is a pooling.

        Args:
            *tensors: in the order of :attr:`inputs`, ``(batch, length)`` int64.
        """
        given = dict(zip(self.inputs, tensors, strict=True))
        hidden = self.model(**given, **self.options())["last_hidden_state"]
        if self.pooling is None:
            return (hidden,)
        sentences = pooled(hidden, given["attention_mask"], self.pooling)
        return hidden, nn.functional.normalize(sentences, dim=-1) if self.normalize else sentences
