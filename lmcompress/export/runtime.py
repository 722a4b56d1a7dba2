"""An exported model, called like the model that it was made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from lmcompress.errors import LmcompressError
from lmcompress.export.sessions import Session
from lmcompress.families.positions import positions_of


class Exported(nn.Module):
    """An exported model in its runtime: tensors in, a ``ModelOutput`` of tensors out, always on the CPU.

    It has no parameters, is always in evaluation mode, and cannot be trained.

    Args:
        session: the loaded graph.
        config: the model's config.

    Attributes:
        config: the model's config.
        session: the loaded graph.
    """

    main_input_name = "input_ids"

    def __init__(self, session: Session, config: PretrainedConfig) -> None:
        super().__init__()
        self.session, self.config = session, config
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the outputs."""
        return torch.float32

    def can_generate(self) -> bool:
        """Whether the model generates text."""
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The outputs of the graph.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``; default: all ones.
            token_type_ids: ``(batch, length)``; default: zeros. Models that take none ignore them.
            **kwargs: further inputs of the graph, by name; others, and None, are ignored.

        Returns:
            The outputs by name, float32.

        Raises:
            LmcompressError: If an input of the graph is missing, the mask has another shape than the ids, ids are not
                those of tokens, or there are more tokens than the model has positions.
        """
        check_ids(input_ids, attention_mask, self.config)
        given: dict[str, Any] = {
            "attention_mask": torch.ones_like(input_ids),
            "token_type_ids": torch.zeros_like(input_ids),
        }
        named = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, **kwargs}
        given |= {name: value for name, value in named.items() if value is not None}
        given["input_ids"] = input_ids
        missing = [name for name in self.session.inputs if name not in given]
        if missing:
            raise LmcompressError(
                f"this model reads {', '.join(self.session.inputs)}; {', '.join(missing)} must be given"
            )
        found = self.session.run({name: array(given[name]) for name in self.session.inputs})
        return ModelOutput({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()})


def check_ids(ids: Tensor, mask: Tensor | None, config: PretrainedConfig, past: int | None = None) -> None:
    """Refuse what a runtime might compute nonsense from: OpenVINO reads zeros beyond the end of a table.

    Args:
        ids: ``(batch, length)``.
        mask: ``(batch, past + length)``, or None.
        config: the model's config.
        past: number of tokens read before, by a model whose positions follow from the mask; None: by no such model.

    Raises:
        LmcompressError: If shapes differ, ids are not those of tokens, or there are more tokens than positions.
    """
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise LmcompressError(
            f"input_ids must be integers of shape (batch, length), at least one, got {ids.dtype} {tuple(ids.shape)}"
        )
    rows, tokens = ids.shape[0], ids.shape[1] + (past or 0)
    if mask is not None and tuple(mask.shape) != (rows, tokens):
        raise LmcompressError(f"attention_mask must have shape {(rows, tokens)}, got {tuple(mask.shape)}")
    if mask is not None and past is not None:
        # padding takes none
        tokens = int((mask != 0).sum(dim=1).max())
    if tokens > (most := positions_of(config)):
        raise LmcompressError(f"the model has {most} positions, got {tokens} tokens: truncate the text")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise LmcompressError(
            f"input_ids must be from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}: is the tokenizer "
            "that of the model?"
        )


def array(value: Any) -> Any:
    """A tensor as runtimes take it: integers as int64.

    Args:
        value: a tensor, or what numpy makes an array of.
    """
    found = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return found.astype(np.int64, copy=False) if found.dtype.kind in "iub" else found.astype(np.float32, copy=False)
