"""The forms of a compressed model that clients meet: in memory, and in folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from families import cut_unevenly, make, sparse
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress import CompressedModel
from lmcompress.data.tokenizer_training import train_tokenizer
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.quantization.ptq import POST_TRAINING, quantize

FORMS = {
    "dense": "dense",
    "pruned": "pruned: blocks, heads and neurons, unevenly",
    "int8": "packed: 8-bit weights and inputs",
    "int4": "packed: 4-bit weights in groups",
    "streams": "pruned, entropy-coded streams",
    "self-loading": "pruned, self-loading, without lmcompress",
    "self-loading int8": "packed, self-loading, without lmcompress",
}
"""Name and description, in the order of the table's columns."""

_TEXTS = [
    "the cat sat on the mat and the dog ran to the sun",
    "a bird and a hat in the rain; no one saw it, but the dog did",
    "when it rains, the cat sits in the house and looks at the bird",
]
_INT4 = QuantizationConfig(
    weights=WeightScheme(quantizer="minmax", bits=4, granularity=16),
    embeddings=WeightScheme(quantizer="minmax", granularity="row"),
    activations=None,
    attention=False,
)


@dataclass(frozen=True)
class Form:
    """A compressed model.

    Attributes:
        name: key of :data:`FORMS`.
        classifier: BERT with a head for classes, in memory.
        decoder: GPT-2 with its language head, in memory.
        folders: where the classifier and the decoder were saved, with tokenizers.
    """

    name: str
    classifier: PreTrainedModel
    decoder: PreTrainedModel
    folders: tuple[str, str]

    @property
    def elsewhere(self) -> bool:
        """Whether clients of this form run where lmcompress is not installed."""
        return self.name.startswith("self-loading")

    @property
    def options(self) -> dict[str, Any]:
        """What a client passes when it loads the form."""
        return {"trust_remote_code": True} if self.elsewhere else {}


@cache
def tokenizers() -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Tokenizers of the classifier and the decoder, of the same texts."""
    words = train_tokenizer(_TEXTS, kind="wordpiece", vocab_size=120)
    pieces = train_tokenizer(_TEXTS, kind="bytelevel_bpe", vocab_size=300)
    pieces.pad_token = pieces.eos_token
    pieces.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    for tokenizer in (words, pieces):
        tokenizer.model_max_length = 64
    return words, pieces


def _models() -> tuple[PreTrainedModel, PreTrainedModel]:
    words, pieces = tokenizers()
    classifier = make(
        "bert", hidden_size=32, intermediate_size=64, vocab_size=len(words), max_position_embeddings=64, pad_token_id=0
    )
    sizes = dict(n_embd=32, n_inner=64, n_positions=64, vocab_size=len(pieces))
    ids = dict(bos_token_id=pieces.bos_token_id, eos_token_id=pieces.eos_token_id, pad_token_id=pieces.pad_token_id)
    decoder = make("gpt2", "language", **sizes, **ids)
    return classifier, decoder


def make_form(name: str, folder: Path) -> Form:
    """Compress both models and save them."""
    models = _models()
    for model in models:
        if name in ("pruned", "streams", "self-loading"):
            cut_unevenly(model)
        if name == "streams":
            sparse(model)
        if name in ("int8", "int4", "self-loading int8"):
            quantize(model, _INT4 if name == "int4" else POST_TRAINING, progress=False)
    folders = [folder / "classifier", folder / "decoder"]
    for model, tokenizer, target in zip(models, tokenizers(), folders, strict=True):
        CompressedModel(model).save_pretrained(
            target,
            format="self_loading" if name.startswith("self-loading") else "native",
            storage="zstd" if name == "streams" else "plain",
            tokenizer=tokenizer,
        )
    return Form(name, *models, (str(folders[0]), str(folders[1])))
