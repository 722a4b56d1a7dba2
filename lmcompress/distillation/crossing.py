"""Student and teacher with different tokenizers: which tokens they share, and which of their positions are compared."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lmcompress.errors import LmcompressError

_SPACE = "▁"
"""A space in the tokens of SentencePiece."""

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}

Token = bytes | tuple[str]
"""The text of a token in UTF-8, or the role of a special one."""


@dataclass(frozen=True)
class SharedTokens:
    """Tokens that two vocabularies share.

    Attributes:
        student: ``(shared,)`` int64, ids of the student.
        teacher: ``(shared,)`` int64, the teacher's ids of the same tokens.
    """

    student: Tensor
    teacher: Tensor

    def to(self, device: torch.device) -> SharedTokens:
        """The same on another device.

        Args:
            device: any device.
        """
        return SharedTokens(self.student.to(device), self.teacher.to(device))


def shared_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedTokens:
    """The tokens that stand for the same text in two vocabularies, matched by their strings.

    A space is written in other ways by byte-level tokenizers and by SentencePiece, so the text that a token stands for
    is compared. Of the special tokens the end of a sequence is shared.

    Args:
        student: a fast tokenizer.
        teacher: another one.

    Returns:
        The pairs, in the order of the student's ids.

    Raises:
        LmcompressError: If fewer than two tokens are shared.
    """
    mine, theirs = _ids_by_token(student), _ids_by_token(teacher)
    pairs = sorted((number, theirs[token]) for token, number in mine.items() if token in theirs)
    if len(pairs) < 2:
        raise LmcompressError(
            f"the vocabularies of student ({len(student)}) and teacher ({len(teacher)}) must share tokens to be "
            f"compared by them, got {len(pairs)} in common; use loss='uld', which needs none"
        )
    ids = torch.tensor(pairs)
    return SharedTokens(ids[:, 0].contiguous(), ids[:, 1].contiguous())


def _ids_by_token(tokenizer: PreTrainedTokenizerBase) -> dict[Token, int]:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    special = set(tokenizer.all_special_ids)
    found: dict[Token, int] = {}
    for text, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number not in special:
            found.setdefault(_bytes_of(text, byte_level), number)
    if tokenizer.eos_token_id is not None:
        found["eos",] = tokenizer.eos_token_id
    return found


def _bytes_of(token: str, byte_level: bool) -> bytes:
    if byte_level and all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        # byte fallback
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's position for each of the student's: the n-th token of the same answer.

    An answer is a run of marked positions; the longer one of the two is truncated.

    Args:
        student: ``(batch, length)`` bool, positions whose next token counts.
        teacher: ``(batch, other length)`` bool, the same of the teacher's tokens.

    Returns:
        ``(marked,)`` int64, numbers into the teacher's flattened positions, in the order of the student's marked
        positions; and ``(marked,)`` bool, false where the teacher's answer has ended, whose number is 0.
    """
    rows, _, runs, places = _runs(student)
    their_rows, their_positions, their_runs, their_places = _runs(teacher)
    most = 1 + int(torch.cat([runs, their_runs, runs.new_zeros(1)]).max())
    begins = torch.zeros(len(teacher), most, dtype=torch.long, device=teacher.device)
    lengths = torch.zeros_like(begins)
    first = their_places == 0
    begins[their_rows[first], their_runs[first]] = their_positions[first]
    lengths.index_put_((their_rows, their_runs), torch.ones_like(their_rows), accumulate=True)
    counted = places < lengths[rows, runs]
    numbers = rows * teacher.shape[1] + begins[rows, runs] + places
    return numbers.masked_fill(~counted, 0), counted


def _runs(marked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, position, number of the run in its row, and place in that run, of each marked position."""
    begins = marked & ~F.pad(marked[:, :-1], (1, 0), value=False)
    positions = torch.arange(marked.shape[1], device=marked.device).expand_as(marked)
    places = positions - torch.where(begins, positions, 0).cummax(1).values
    rows, columns = marked.nonzero(as_tuple=True)
    return rows, columns, (begins.long().cumsum(1) - 1)[marked], places[marked]
