"""A sentence encoder: an encoder without a head, a pooling, and what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.hooks import model_inputs
from lmcompress.activations.pooling import pooled
from lmcompress.activations.running import batches_by_length, evaluating
from lmcompress.checkpoint.saving import Batch, Equivalence
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.families.positions import positions_of
from lmcompress.model import CompressedModel
from lmcompress.sentences.folder import Parts, is_sentence_encoder, read_parts, write_parts


class SentenceEncoder:
    """A model of sentence-transformers, whose Transformer is compressed as any other encoder.

    ``model`` is what ``prune``, ``quantize``, ``by_layers`` and the trainers take; set it to a student to save that one
    with the same pooling. The folders it writes load in ``SentenceTransformer``, where lmcompress is installed.

    Args:
        model: encoder without a head.
        tokenizer: its tokenizer.
        parts: what comes after it, from :func:`~lmcompress.sentences.folder.read_parts`.

    Attributes:
        model: encoder without a head.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: Parts) -> None:
        self.model, self.tokenizer, self._parts = model, tokenizer, parts

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> SentenceEncoder:
        """Load a folder, compressed by lmcompress or not.

        Args:
            folder: a local folder of sentence-transformers.
            **kwargs: passed to ``AutoModel.from_pretrained``.

        Returns:
            The encoder, in evaluation mode.

        Raises:
            LmcompressError: If it is none, has modules that are not supported, or the tokenizer of another model.
        """
        if not is_sentence_encoder(folder):
            raise LmcompressError(
                f"{folder} is no folder of sentence-transformers, which has a modules.json; an encoder by itself is "
                "loaded with AutoModel"
            )
        parts = read_parts(folder)
        model = AutoModel.from_pretrained(parts.transformer, **kwargs).eval()
        tokenizer = AutoTokenizer.from_pretrained(parts.transformer)
        if len(tokenizer) > model.config.vocab_size:
            raise LmcompressError(
                f"{folder} has embeddings of {model.config.vocab_size} tokens and a tokenizer of {len(tokenizer)}: the "
                "tokenizer is another model's"
            )
        return cls(model, tokenizer, parts)

    @property
    def pooling(self) -> str:
        """``mean``, ``cls`` or ``max``: the option of the matches of embeddings."""
        return self._parts.pooling

    @property
    def normalize(self) -> bool:
        """Whether embeddings have length 1."""
        return self._parts.normalize

    @property
    def max_length(self) -> int:
        """Longest sentence in tokens; longer ones are truncated."""
        given = (self._parts.max_length, self.tokenizer.model_max_length, positions_of(self.model.config))
        return min(int(length) for length in given if length is not None)

    def tokenize(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """One padded batch of model inputs.

        Args:
            sentences: at least one.
        """
        # as sentence-transformers does
        texts = [text.strip().lower() if self._parts.lower else text.strip() for text in sentences]
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return dict(found)

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of a batch, with gradient.

        Args:
            batch: model inputs, on the model's device.

        Returns:
            ``(batch, width)``.
        """
        states = self.model(**model_inputs(self.model, batch))[0]
        vectors = pooled(states, batch["attention_mask"], self.pooling)
        for layer in self._parts.dense:
            vectors = F.linear(vectors, *(p.to(vectors) for p in layer.parameters()))
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def encode(self, sentences: Sequence[str], batch_size: int = 32) -> Tensor:
        """Embeddings of sentences, in order; sentences of similar length share a batch. No prompt is put before them.

        Args:
            sentences: at least one.
            batch_size: sentences per forward pass.

        Returns:
            ``(sentences, width)`` float32 on the CPU.

        Raises:
            LmcompressError: If there are no sentences, or one is no string, or ``batch_size`` is less than 1.
        """
        if not sentences or not all(isinstance(text, str) for text in sentences):
            raise LmcompressError("sentences must be a list of strings, at least one")
        batches = batches_by_length([len(text) for text in sentences], batch_size)
        found: list[Tensor] = []
        with evaluating(self.model):
            for indices in batches:
                batch = self.tokenize([sentences[i] for i in indices])
                moved = {name: value.to(self.model.device) for name, value in batch.items()}
                found.append(self.embed(moved).float().cpu())
        order = torch.tensor([index for indices in batches for index in indices])
        return torch.cat(found)[order.argsort()]

    def save_pretrained(
        self, folder: str | Path, *, batches: Sequence[Batch] | None = None, **options: Any
    ) -> Equivalence:
        """Save a folder that ``SentenceTransformer`` loads, after the round-trip check of the Transformer.

        Args:
            folder: replaced as a whole if it exists.
            batches: inputs to compare on; default: random ids.
            **options: as for :meth:`lmcompress.model.CompressedModel.save_pretrained`, such as ``format`` and
                ``storage``.

        Returns:
            The measured differences.

        Raises:
            LmcompressError: If hidden dimensions were pruned and a Dense follows, or the folder cannot be written.
        """
        width = anatomy_of(self.model).hidden_size
        if self._parts.dense and width != self._parts.dense[0].in_features:
            raise LmcompressError(
                f"the model has vectors of {width} numbers, but the Dense after its pooling takes "
                f"{self._parts.dense[0].in_features}: keep the hidden size"
            )
        return CompressedModel.wrap(self.model).save_pretrained(
            folder,
            tokenizer=self.tokenizer,
            batches=batches,
            write_more=lambda temporary: write_parts(self._parts, temporary, width),
            **options,
        )
