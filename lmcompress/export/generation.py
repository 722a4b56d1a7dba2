"""An exported causal model that generates text as a model of Transformers does: by Transformers' own ``generate``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lmcompress.errors import LmcompressError
from lmcompress.export.causal import PAST, PRESENT
from lmcompress.export.runtime import Exported, check_ids
from lmcompress.export.sessions import Session, StatefulSession, one_error
from lmcompress.export.stateful import BEAM_INDEX


class ExportedLanguageModel(Exported, GenerationMixin):  # type: ignore[misc]
    """An exported causal model in its runtime.

    ``generate`` is Transformers' own, with all of its arguments: greedy, sampling, beams, with an assistant.

    Args:
        session: the loaded graph.
        config: the model's config.
        generation_config: what ``generate`` does unless told otherwise; default: what the config says.

    Attributes:
        generation_config: what ``generate`` does unless told otherwise.
        with_past: whether keys and values of earlier tokens are kept; without, every token is computed from the whole
            text.
    """

    # read by GenerationMixin
    base_model_prefix = ""
    input_modalities = ("text",)
    _is_stateful = False

    def __init__(
        self, session: Session, config: PretrainedConfig, generation_config: GenerationConfig | None = None
    ) -> None:
        super().__init__(session, config)
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self._past = [name for name in session.inputs if name.startswith(f"{PAST}.")]
        self.with_past = bool(self._past)

    def can_generate(self) -> bool:
        """Whether the model generates text."""
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text; see ``transformers.GenerationMixin.generate``.

        Args:
            *args: as there.
            **kwargs: as there.

        Returns:
            As there: the token ids, ``(batch, length)``, unless more is asked for.
        """
        if not self.with_past:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The logits of the next tokens.

        Args:
            input_ids: ``(batch, length)`` int64, the tokens after those of the cache.
            attention_mask: ``(batch, tokens of the cache + length)``; default: all ones. Positions follow from it.
            token_type_ids: ignored: all of a text is of the first type.
            past_key_values: the cache of an earlier call, or an empty one; default: there are no earlier tokens.
            use_cache: whether to return a cache; default: yes, if the graph has keys and values.
            **kwargs: ignored, except ``position_ids``, which are refused.

        Returns:
            ``logits (batch, length, tokens)`` float32, and ``past_key_values``.

        Raises:
            LmcompressError: If the cache is of another kind or model, positions are given, or ids or mask are not those
                of :func:`~lmcompress.export.runtime.check_ids`.
        """
        if kwargs.get("position_ids") is not None:
            raise LmcompressError(
                "positions of an exported model follow from its attention_mask: leave out position_ids"
            )
        if past_key_values is not None and not self.with_past and past_key_values.get_seq_length():
            raise LmcompressError(
                "this model was exported without past keys and values, and reads the whole text at every call: leave "
                "out past_key_values, or export it for text_generation_with_past"
            )
        keep = self.with_past and use_cache is not False
        cache: Any = self._states(past_key_values) if self._stateful else self._tensors(past_key_values)
        before = cache.get_seq_length()
        check_ids(input_ids, attention_mask, self.config, before)
        rows, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + length, dtype=torch.int64)
        given = {"input_ids": _array(input_ids), "attention_mask": _array(attention_mask)}
        logits = torch.empty(rows, length, cast(int, self.session.shapes["logits"][-1]))
        if self._stateful:
            cache.infer(given, logits.numpy())
        else:
            self._run(given, cache, logits, keep=keep)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if keep else None)

    def _run(self, given: dict[str, Any], cache: DynamicCache, logits: Tensor, *, keep: bool) -> None:
        """Run the graph of keys and values as inputs and outputs; the cache then holds the outputs."""
        before = cache.get_seq_length()
        rows, length = given["input_ids"].shape
        outputs, kept = {"logits": logits.numpy()}, []
        for number, name in enumerate(self._past):
            heads, size = cast(tuple[int, int], self.session.shapes[name][1::2])
            layer: Any = cache.layers[number // 2]
            past = (layer.keys, layer.values)[number % 2] if before else torch.empty(rows, heads, 0, size)
            given[name] = past.contiguous().numpy()
            if keep:
                kept.append(torch.empty(rows, heads, before + length, size))
                outputs[name.replace(PAST, PRESENT, 1)] = kept[-1].numpy()
        self.session.run_into(given, outputs)
        for keys, values, layer in zip(kept[::2], kept[1::2], cache.layers, strict=False):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    @property
    def _stateful(self) -> bool:
        return isinstance(self.session, StatefulSession)

    def _tensors(self, cache: Cache | None) -> DynamicCache:
        """The cache whose first layers are those of the graph, in order."""
        cache = DynamicCache() if cache is None else cache
        _refuse_unless_dynamic(cache)
        while len(cache.layers) < len(self._past) // 2:
            cache.layers.append(DynamicLayer())
        for name, layer in zip(self._past[::2], cache.layers, strict=False):
            heads = self.session.shapes[name][1]
            if cache.get_seq_length() and (layer.keys is None or layer.keys.shape[1] != heads):
                raise LmcompressError("past_key_values must come from a call of this model, they are of another one")
        return cache

    def _states(self, cache: Cache | None) -> StateCache:
        if isinstance(cache, StateCache):
            return cache
        if cache is not None:
            _refuse_unless_dynamic(cache)
        if cache is not None and cache.get_seq_length():
            raise LmcompressError(
                f"this model keeps keys and values in OpenVINO, not in a {type(cache).__name__}: leave out "
                "past_key_values, or export it with stateful=False"
            )
        return StateCache(cast(StatefulSession, self.session))

    def is_remote_code(self) -> bool:
        """Whether the model's class comes from a model repository."""
        return False

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        # chooses how experts are computed, by modules that are not here
        return nullcontext()


class StateCache(Cache):  # type: ignore[misc]
    """Keys and values in a request of OpenVINO; tells it which row goes on from which.

    Args:
        session: the loaded graph.
    """

    def __init__(self, session: StatefulSession) -> None:
        super().__init__(layers=[])
        self._session, self._request = session, session.request()
        self._length = 0
        # of the rows of the last call, those that the rows of the next one go on from
        self._rows: Tensor | None = None

    def infer(self, given: dict[str, Any], logits: np.ndarray[Any, Any]) -> None:
        """Read new tokens.

        Args:
            given: ``input_ids`` and ``attention_mask``.
            logits: the logits are written into it.
        """
        rows, length = given["input_ids"].shape
        order = torch.arange(rows) if self._rows is None else self._rows
        arrays = given | {BEAM_INDEX: order.numpy().astype(np.int32)}
        with one_error(self._session, arrays):
            self._request.infer(arrays)
        logits[...] = self._request.get_tensor("logits").data
        self._length, self._rows = self._length + length, torch.arange(rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens read.

        Args:
            layer_idx: ignored: all layers have read the same.
        """
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows go on from others, as beam search does.

        Args:
            beam_idx: ``(rows,)``, the numbers of these rows.
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows.

        Args:
            indices: their numbers.
        """
        if self._rows is not None:
            self._rows = self._rows[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Args:
            repeats: how often.
        """
        if self._rows is not None:
            self._rows = self._rows.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: their number, negative, as in Transformers.

        Raises:
            ValueError: If it is positive, which earlier releases of Transformers read as the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative, got {tokens_to_remove}")
        kept = self._length - abs(tokens_to_remove)
        for state in self._request.query_state():
            state.state = type(state.state)(np.ascontiguousarray(state.state.data[:, :, :kept]))
        self._length = kept


def _refuse_unless_dynamic(cache: Cache) -> None:
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise LmcompressError(
            f"an exported model keeps keys and values in a DynamicCache, got a {type(cache).__name__}: leave out "
            "cache_implementation and past_key_values"
        )


def _array(ids: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(ids.cpu().numpy(), dtype=np.int64)
