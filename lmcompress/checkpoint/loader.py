"""The loader: an ``HfQuantizer`` called "lmcompress", through which ``AutoModel*.from_pretrained`` rebuilds models.

Transformers builds the stock skeleton on ``meta``, calls the first hook below, which gives the skeleton its shapes,
and then fills it from the files. Only the hooks that are the same in every supported version are used: before and after
weight loading, ``is_serializable``, ``is_trainable``, ``is_qat_trainable``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lmcompress.checkpoint.behaviour import behave
from lmcompress.checkpoint.config import QUANT_METHOD, CompressionConfig
from lmcompress.checkpoint.encoding import check_encoded, encode_skeleton, encoded_names, encoding_of, unpack
from lmcompress.checkpoint.files import Stored, safetensors_header
from lmcompress.checkpoint.guard import allow, open_config, open_model
from lmcompress.checkpoint.layers import finish_replaced, replace_skeleton
from lmcompress.checkpoint.streams import Place, decode_streams, name_in_model, open_streams
from lmcompress.checkpoint.structure import check_config, shape_skeleton
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.families import outline_of
from lmcompress.families.shaping import leave_out_pooler

_STORED_AS = {torch.uint8: "U8", torch.float32: "F32"}


class LmcompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Rebuilds the structure that a :class:`CompressionConfig` describes and checks the files against it."""

    requires_calibration = False
    quantization_config: CompressionConfig

    def __init__(self, quantization_config: CompressionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._streams: list[Place] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the config: takes the word from it that keeps others from building the model.

        Args:
            config: modified in place.

        Raises:
            CheckpointError: If it has implausible numbers or sizes; building the stock skeleton could take forever.
        """
        check_config(config, self.quantization_config.structure)
        return open_config(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        open_model(model)
        config = self.quantization_config
        files = [Path(file) for file in checkpoint_files or ()]
        # files of other kinds are left to Transformers
        readable = checkpoint_files is not None and all(file.suffix == ".safetensors" for file in files)
        found = {name: stored for file in files if readable for name, stored in safetensors_header(file).items()}
        if readable:
            leave_out_pooler(model, found, outline_of(model).family.pooler)
        if config.structure is not None:
            shape_skeleton(model, config.structure)
        replace_skeleton(model, config.layers)
        if config.encoding is not None:
            encode_skeleton(model, config.encoding)
        encoded = encoded_names(model)
        self._expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
        if config.storage is not None and config.storage.streams:
            _refuse_offloading(kwargs.get("device_map"))
            self._streams = open_streams(model, config.storage, files, encoded.union(_backbone_names(model)))
        if readable:
            check_tensors(model, found, encoded.union(place.name for place in self._streams))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if config.storage is not None and config.storage.streams:
            decode_streams(model, self._streams)
            # files written from memory by other libraries have no streams
            config.storage = config.storage.model_copy(update={"streams": {}})
        # transformers 5.17 replaces a parameter by one of the file's shape as soon as any quantizer is present
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape, dtype = self._expected.get(name, (tuple(tensor.shape), tensor.dtype))
            if tuple(tensor.shape) != shape:
                # other tensors were compared before loading: this one belongs to a head
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(tensor.shape)} in the checkpoint, {shape} here: "
                    f"transformers {transformers.__version__} cannot replace the head of a compressed checkpoint by "
                    "one of another width. Use a newer one, or load with AutoModel, save that and load it for the task"
                )
            # and leaves its values in the file's type
            if tensor.is_floating_point() and dtype.is_floating_point and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        # the stock loader returns the config as it was read, source numbers included
        model.config.quantization_config = config
        finish_replaced(model, config.layers)
        if config.encoding is not None:
            check_encoded(model)
            # tensors of a head that this model lacks are ignored
            config.encoding = encoding_of(model)
        # in Transformers the flag means that neither casts nor a Trainer are possible: here both are, and where codes
        # cannot be trained, packed modules say so in the first step
        model.is_quantized = False
        behave(model)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace codes by the dequantized weights, in place; ``model.dequantize()`` calls it. Pruned shapes stay.

        Args:
            model: a loaded model, packed or not.
            dtype: dtype of all parameters afterwards; default: float32, which holds the dequantized weights exactly.

        Returns:
            The same model.
        """
        return unpack(model, torch.float32 if dtype is None else dtype)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """True: a loaded model can be saved again with ``save_pretrained``.

        Args:
            safe_serialization: passed by older versions; always true here.
        """
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: a pruned one as any other, codes not at all."""
        return self.quantization_config.encoding is None

    @property
    def is_qat_trainable(self) -> bool:
        """The same: ``Trainer`` may train all weights or none."""
        return self.is_trainable


def register() -> None:
    """Register the method "lmcompress" with Transformers; safe to call twice."""
    allow()
    # a second registration raises; a self-loading checkpoint registered earlier checks less than this
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(CompressionConfig)
    register_quantizer(QUANT_METHOD)(LmcompressQuantizer)


def _refuse_offloading(device_map: Any) -> None:
    """Refuses offloading to disk: Accelerate would read streams there as tensors."""
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise LmcompressError(
            "device_map must leave nothing on disk, the tensors of this checkpoint are streams that are decoded in "
            "memory; load it without, save that with storage='plain', and load this one"
        )


def check_tensors(model: PreTrainedModel, found: Mapping[str, Stored], encoded: Iterable[str]) -> None:
    """Refuse files whose tensors do not match the model, before anything is allocated for them.

    Otherwise a missing tensor would be filled with random values and a warning. Only a head that the checkpoint never
    had may be missing: a base model's checkpoint loaded for a task.

    Args:
        model: the skeleton in its final shapes.
        found: the tensors in the safetensors files of the checkpoint.
        encoded: names of the tensors that are codes, scales or streams, which must not be cast.

    Raises:
        CheckpointError: If a tensor is missing, has another shape, or is unexpected in a block.
    """
    prefix = model.base_model_prefix + "."
    # a block described without heads whose file has some
    blocks = tuple(stack.blocks + "." for stack in outline_of(model).family.stacks)
    expected = {name.removeprefix(prefix) for name in model.state_dict()}
    found = {name_in_model(model, name).removeprefix(prefix): stored for name, stored in found.items()}
    for name in found:
        if name.startswith(blocks) and name not in expected:
            raise CheckpointError(
                f"the checkpoint has a tensor {name}, which its config excludes: config.json and the weights do not "
                "belong together; fetch or copy both again"
            )
    same_class = (model.config.architectures or [""])[0] == type(model).__name__
    tied = set(model.all_tied_weights_keys)
    must = {name.removeprefix(prefix) for name in _backbone_names(model)}
    encoded = {name.removeprefix(prefix) for name in encoded}
    for full_name, tensor in model.state_dict().items():
        name = full_name.removeprefix(prefix)
        if full_name in tied:
            continue
        if name not in found:
            if same_class or name in must | encoded:
                raise CheckpointError(
                    f"tensor {full_name} is missing from the checkpoint: it is cut off or was changed; "
                    "fetch or copy it again"
                )
        # a head of another width is the user's to replace (ignore_mismatched_sizes), unless it is encoded
        elif found[name].shape != tuple(tensor.shape) and name in must | encoded:
            raise CheckpointError(_shape_message(full_name, found[name].shape, tuple(tensor.shape)))
        # a cast would change codes or scales without changing their shape
        elif name in encoded and found[name].dtype != (kind := _STORED_AS[tensor.dtype]):
            raise CheckpointError(
                f"tensor {full_name} is stored as {found[name].dtype}, its config says {kind}: config.json and the "
                "weights do not belong together; fetch or copy both again"
            )


def _backbone_names(model: PreTrainedModel) -> list[str]:
    """Names in the state dict of what every checkpoint of the family has: blocks and embeddings, no pooler or head."""
    anatomy = outline_of(model)
    parts: list[nn.Module] = [anatomy.block_list]
    parts += [m for p in ("word_embeddings", "position_embeddings") for m in anatomy.embeddings(p)]
    # kept alive so that no other tensor takes over its id
    wanted = [tensor for part in parts for tensor in part.state_dict(keep_vars=True).values()]
    ids = {id(tensor) for tensor in wanted}
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ids]


def _shape_message(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"tensor {name} has shape {found} in the checkpoint, its config says {expected}: config.json and the "
        "weights do not belong together; fetch or copy both again"
    )
