"""The tokenizer in a GGUF file: byte-level BPE as llama.cpp knows it."""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

# types of tokens in GGUF
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def add_tokenizer(
    gguf: Any, writer: Any, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig
) -> list[str]:
    """Write the vocabulary and the merges of a byte-level BPE.

    Args:
        gguf: the package.
        writer: its writer.
        tokenizer: the model's, or None.
        config: gives the number of tokens, and the family.

    Returns:
        A sentence if no tokenizer is in the file, or what it is not known to do.
    """
    if tokenizer is None:
        return ["The file has no tokenizer: none was given, and llama.cpp needs one."]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    if described.get("model", {}).get("type") != "BPE" or '"ByteLevel"' not in json.dumps(described):
        return ["The file has no tokenizer: only byte-level BPE is written; its own files are beside it."]
    size = int(config.vocab_size)
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = [_NORMAL if index in known else _UNUSED for index in range(size)]
    for index, token in added.items():
        if index < size:
            types[index] = _CONTROL if token.special else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre := _pre(described, config))
    writer.add_token_list([known.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(types)
    pairs = described["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)
    return [f"llama.cpp splits words in its way {pre!r}: compare its tokens with the tokenizer's."]


def _pre(described: dict[str, Any], config: PretrainedConfig) -> str:
    """The name in llama.cpp of the rule by which words are split before merging."""
    if config.model_type in ("qwen2", "qwen3"):
        return "qwen2"
    text = json.dumps(described.get("pre_tokenizer"))
    return "smollm" if '"individual_digits": true' in text else "llama-bpe" if "{1,3}" in text else "default"
