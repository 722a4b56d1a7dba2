"""Texts that the student writes itself, as a source of batches: its teacher judges what it really does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from lmcompress.activations.documents import documents_in
from lmcompress.activations.running import evaluating
from lmcompress.distillation.config import OnPolicy
from lmcompress.errors import LmcompressError
from lmcompress.families.positions import positions_of


class StudentTexts:
    """Replaces the batches of some optimizer steps by continuations that the student samples.

    What is drawn in a step depends on the seed and the number of the step only, so a resumed run draws the same, and
    the random state of the run is left alone.

    Args:
        config: share of the steps, and how texts are written.
        student: a causal model, not wrapped.
        seed: seed of the run, for a ``config`` without one.
        rank: number of the process: each writes its own texts, in the same steps.
        autocast: creates the mixed-precision context in which it writes.

    Raises:
        LmcompressError: If the student has no positions for a prompt and ``max_new_tokens``.

    Reference:
        Agarwal et al., *On-Policy Distillation of Language Models* (GKD), 2023, https://arxiv.org/abs/2306.13649,
        algorithm 1.
    """

    def __init__(
        self,
        config: OnPolicy,
        student: PreTrainedModel,
        seed: int,
        rank: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._room = positions_of(student.config) - config.max_new_tokens
        if self._room < 1:
            raise LmcompressError(
                f"on_policy.max_new_tokens must be less than the student's {positions_of(student.config)} positions, "
                f"got {config.max_new_tokens}: a prompt needs some"
            )
        self.config, self._student = config, student
        self._seed = seed if config.seed is None else config.seed
        self._rank, self._autocast = rank, autocast

    def chosen(self, step: int) -> bool:
        """Whether an optimizer step is on the student's own texts; the same on all processes.

        Args:
            step: number of the step.
        """
        return bool(np.random.default_rng((self._seed, step)).random() < self.config.fraction)

    def written(self, batch: Mapping[str, Any], step: int, number: int) -> dict[str, Tensor]:
        """A batch with the same prompts, continued by the student.

        Args:
            batch: a causal one, one text in each row.
            step: number of the optimizer step.
            number: number of the micro-batch in it.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, padded on the right; labels are the student's own tokens,
            up to its end of sequence, and mark what the teacher judges.

        Raises:
            LmcompressError: If documents are packed into rows, or the teacher has inputs of its own.
        """
        if documents_in(batch) is not None or "teacher_input_ids" in batch:
            raise LmcompressError(
                "on_policy needs one text in each row, and one tokenizer for student and teacher: got "
                + ("teacher_input_ids" if "teacher_input_ids" in batch else "several documents packed into a row")
            )
        prompts = [self._prompt(row) for row in _rows(batch)]
        drawn = int(np.random.SeedSequence((self._seed, step, number, self._rank)).generate_state(1)[0])
        answers = self._continued(prompts, drawn)
        labels = [torch.cat([torch.full_like(p, -100), a]) for p, a in zip(prompts, answers, strict=True)]
        ids = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def _prompt(self, row: tuple[Tensor, Tensor]) -> Tensor:
        ids, marked = row
        begins = (marked & ~torch.cat([marked.new_zeros(1), marked[:-1]])).nonzero().flatten()
        # text that is learned from its first token on has no prompt of its own
        end = int(begins[-1]) if len(begins) else 0
        prompt = ids[: end or self.config.prompt_tokens]
        return prompt[-self._room :]

    def _continued(self, prompts: list[Tensor], seed: int) -> list[Tensor]:
        device = next(self._student.parameters()).device
        longest = max(map(len, prompts))
        # on the left, so that what is written follows each prompt
        ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts]).to(device)
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
        ends = _ends_of(self._student)
        options = GenerationConfig(
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None,
            use_cache=True,
        )
        devices = [device] if device.type == "cuda" else []
        with evaluating(self._student), self._autocast(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            whole = self._student.generate(ids, attention_mask=mask.to(device), generation_config=options)
        return [_up_to_an_end(row[longest:].cpu(), ends) for row in whole]


def _rows(batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The real tokens of each row, and which of them have a label."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"].bool() if batch.get("attention_mask") is not None else torch.ones_like(ids).bool()
    labels = batch["labels"] if batch.get("labels") is not None else ids
    return [(row[real].cpu(), label[real].cpu() != -100) for row, real, label in zip(ids, mask, labels, strict=True)]


def _ends_of(model: PreTrainedModel) -> list[int]:
    stated = getattr(model.generation_config, "eos_token_id", None)
    stated = model.config.eos_token_id if stated is None else stated
    if stated is None:
        return []
    return list(stated) if isinstance(stated, (list, tuple)) else [int(stated)]


def _up_to_an_end(tokens: Tensor, ends: list[int]) -> Tensor:
    found = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).nonzero().flatten() if ends else tokens[:0]
    return tokens[: int(found[0]) + 1] if len(found) else tokens
