"""Tiny language models with tokenizers of their own."""

from __future__ import annotations

import json

import torch
from families import make
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmcompress.data import train_tokenizer

TEXTS = [
    "the cat sat on the mat", "a good film, really good", "what a bad and boring play", "dogs chase cats up the tree",
    "the play was good", "no film is that bad", "she sat in the tree", "he said nothing at all",
]  # fmt: skip

CHAT = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a chat template.

    Args:
        vocab_size: number of its tokens, from 258 on.
    """
    tokenizer = train_tokenizer(TEXTS, kind="bytelevel_bpe", vocab_size=vocab_size)
    tokenizer.pad_token, tokenizer.chat_template, tokenizer.model_max_length = tokenizer.eos_token, CHAT, 64
    return tokenizer


def language_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A random GPT-2 of 64 positions without dropout.

    Args:
        tokenizer: determines its vocabulary and its end of a sequence.
        seed: of its weights.
    """
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    return make("gpt2", "language", seed, vocab_size=len(tokenizer), n_positions=64, **off, **ids)


def renumbered(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The same tokenizer and model with the ids of all tokens permuted.

    Args:
        tokenizer: left unchanged.
        model: its embeddings are permuted in place.
    """
    new = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0)).tolist()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"] = {token: new[number] for token, number in described["model"]["vocab"].items()}
    described["added_tokens"] = [token | {"id": new[token["id"]]} for token in described["added_tokens"]]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token, unk_token=tokenizer.unk_token, pad_token=tokenizer.pad_token,
    )  # fmt: skip
    other.chat_template, other.model_max_length = tokenizer.chat_template, tokenizer.model_max_length
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        permuted = torch.empty_like(table)
        permuted[torch.tensor(new)] = table
        table.copy_(permuted)
    return other, model
