"""Gates: factors on the units of a model, applied by hooks, while its weights are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hooks import Hooked
from lmcompress.checkpoint.cutting import hidden_axes
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, is_conv1d
from lmcompress.families.norms import is_norm, normalised
from lmcompress.pruning.structured.units import PARTS, Part, Units, check_units, full, unit_shapes


class Gates(Hooked):
    """Multiplies the units of a model by values; nothing of the attention kernel is touched.

    The place of each value, and the meaning of 0, are those of a mask in
    :class:`~lmcompress.pruning.structured.units.Units`. Between 0 and 1:

    - ``heads``, ``neurons``: the input of the projection that reads them;
    - ``attention``, ``ffn``: the output of the sub-layer's last projection, bias included;
    - ``layers``: the block's output is ``v`` times its result plus ``1 - v`` times its input;
    - ``hidden``: the outputs of all modules of the stream's width: embeddings (if no norm follows them), writes into
      the stream, norms, and the dense layers of that width in the task's head. A norm averages over the dimensions
      whose value is not 0, as in CoFi's ``CoFiLayerNorm``.

    So a hidden value multiplies the same dimension repeatedly on its way through the blocks, and the slope at 1
    is that of a high power: many times the effect of its removal. Scores use another value, of
    :meth:`read_with`, which multiplies the input of each matrix once.

    Initially every value is 1, and the model's outputs are bit-exact. Gates go by block number and hold hooks
    on modules: remove them before the model is cut.

    Args:
        model: a model of a known family; hooks are put on its modules.
        parts: parts whose units get values.

    Raises:
        LmcompressError: If a part does not exist, or none is named.

    Reference:
        Xia, Zhong & Chen, *Structured Pruning Learns Compact and Accurate Models*, 2022,
        https://arxiv.org/abs/2204.00408, section 3.1. Michel, Levy & Neubig, *Are Sixteen Heads Really Better than
        One?*, 2019, https://arxiv.org/abs/1905.10650, equation 2.

    Note:
        CoFi does not prune the pooler's output. Here it follows the stream, because a stock config has
        one number for both.
    """

    def __init__(self, model: PreTrainedModel, parts: Collection[Part]) -> None:
        if not parts:
            raise LmcompressError(f"gates must be of at least one part, got none; name some of {', '.join(PARTS)}")
        super().__init__()
        self._model = model
        ones = full(model, parts, 1.0, torch.float32).map(lambda ones: ones.to(model.device))
        self._shapes = unit_shapes(structure_of(model), anatomy_of(model).hidden_size)
        self._parts: tuple[Part, ...] = ones.parts()
        self._values = ones
        # a part is unchanged, bit-exact and at no cost, until its values are set
        self._active: set[Part] = set()
        self._some_hidden_gone = False
        self._reads: Tensor | None = None
        # which sub-layer's last projection a module is
        self._sub_layers: dict[nn.Module, tuple[Part, int]] = {}
        for index, block in enumerate(anatomy_of(model).blocks):
            self._attach_block(index, block)
        if "hidden" in self._parts:
            self._attach_hidden(model)

    def set(self, values: Units) -> None:
        """Set the values of units; parts that are None in ``values`` keep theirs.

        Args:
            values: floats or bools, ``(n,)`` or, one row per example, ``(batch, n)``; with or without gradient. If a
                model has several rows per example (multiple choice), each of them gets the example's values. Tensors
                are moved to the model's device; those already there are kept, not copied.

        Raises:
            LmcompressError: If these gates do not include a part, or a shape differs.
        """
        for part in values.parts():
            if part not in self._parts:
                raise LmcompressError(
                    f"values must be of parts that the gates are of, {', '.join(self._parts)}, got {part}; "
                    "name it when the gates are created"
                )
        check_units(values, self._shapes, "values", batched=True)
        moved = values.map(lambda tensor: tensor.to(self._model.device))
        self._reads = None
        self._values = self._values.updated(**{part: getattr(moved, part) for part in moved.parts()})
        self._active |= set(moved.parts())
        if moved.hidden is not None:
            self._some_hidden_gone = bool((moved.hidden.detach() == 0).any())

    def read_with(self, values: Tensor) -> None:
        """Multiply the inputs of matrices that read the residual stream, until :meth:`set` is called.

        If all values are 1, the gradient of one of them is, to first order and with the opposite sign, the change of
        the loss if no matrix reads the dimension, which is the effect of its removal except on the means of norms.

        Args:
            values: ``(n,)`` or ``(batch, n)``, as for :meth:`set`.

        Raises:
            LmcompressError: If these gates do not include ``hidden``, or the shape differs.
        """
        if "hidden" not in self._parts:
            raise LmcompressError(
                f"values that are read must be of gates of hidden, got gates of {', '.join(self._parts)}; "
                "name it when the gates are created"
            )
        check_units(Units(hidden=values), self._shapes, "values", batched=True)
        self._reads = values.to(self._model.device)

    def values(self) -> Units:
        """The current values, on the model's device."""
        return self._values

    def ones_per_example(self, batch_size: int) -> Units:
        """Set every value to 1, separately for each example, as leaves that require gradients.

        After ``loss.backward()`` with a loss that is a sum over examples, the gradient of row ``i`` is that of example
        ``i`` alone. Those of ``hidden`` multiply the inputs read from the stream, see :meth:`read_with`.

        Args:
            batch_size: examples in the next batch.

        Returns:
            The leaves, ``(batch_size, n)`` float32.
        """
        ones = self._values.map(
            lambda tensor: torch.ones(batch_size, tensor.shape[-1], device=self._model.device, requires_grad=True)
        )
        self.set_for_scores(ones)
        return ones

    def set_for_scores(self, values: Units) -> None:
        """Set the values so that their gradients can be used as scores.

        As :meth:`set`, except for ``hidden``: its values are constant, and their gradient is that of a factor of 1 on
        the inputs read from the stream.

        Args:
            values: as for :meth:`set`; those of ``hidden`` with gradient.

        Raises:
            LmcompressError: As :meth:`set`.
        """
        if values.hidden is None:
            self.set(values)
            return
        held = values.hidden.detach()
        self.set(values.updated(hidden=held))
        # also if scores are computed without gradients; exactly 1, whatever the value
        with torch.enable_grad():
            self.read_with(1 + (values.hidden - held))

    def _attach_block(self, index: int, block: Block) -> None:
        def before(module: nn.Module, part: Part, repeats: int) -> None:
            def scale(_: nn.Module, args: tuple[Any, ...]) -> Any:
                if part not in self._active:
                    return None
                value = self._values.tensors(part)[index]
                return (_times(args[0], value.repeat_interleave(repeats, -1)), *args[1:])

            self._handles.append(module.register_forward_pre_hook(scale))

        def after(module: nn.Module, part: Part) -> None:
            self._sub_layers[module] = part, index

            def scale(_: nn.Module, args: Any, output: Tensor) -> Any:
                # with hidden gates, whose hook on the same module multiplies by both at once
                if part not in self._active or "hidden" in self._active:
                    return None
                return _times(output, self._one(part, index))

            self._handles.append(module.register_forward_hook(scale))

        def bypass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if "layers" not in self._active:
                return None
            given = args[0] if args else kwargs["hidden_states"]
            computed = output[0] if isinstance(output, tuple) else output
            value = _shaped(self._one("layers", index), computed)
            # this form is exact at 0 and at 1
            mixed = computed * value + given * (1 - value)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        if "heads" in self._parts:
            before(block.get("attention_out"), "heads", block.head_width)
        if "neurons" in self._parts:
            before(block.get("ffn_out"), "neurons", 1)
        if "attention" in self._parts:
            after(block.get("attention_out"), "attention")
        if "ffn" in self._parts:
            after(block.get("ffn_out"), "ffn")
        if "layers" in self._parts:
            # before the hooks with which transformers collects hidden states
            self._handles.append(block.module.register_forward_hook(bypass, with_kwargs=True, prepend=True))

    def _attach_hidden(self, model: PreTrainedModel) -> None:
        offset = anatomy_of(model).family.norm_offset

        def scale(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            if "hidden" not in self._active:
                return None
            value = self._values.tensors("hidden")[0]
            part, index = self._sub_layers.get(module, ("hidden", 0))
            if part != "hidden" and part in self._active:
                value = value * self._one(part, index)
            if is_norm(module) and self._some_hidden_gone:
                # what it computes of the others is multiplied by 0
                keep = _shaped(value.detach() != 0, args[0].float())
                output = normalised(args[0], module, keep, offset)
            return _times(output, value)

        def read(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return None if self._reads is None else (_times(args[0], self._reads), *args[1:])

        for module in gated_hidden(model):
            self._handles.append(module.register_forward_hook(scale))
        for module in reading_hidden(model):
            self._handles.append(module.register_forward_pre_hook(read))

    def _one(self, part: Part, index: int) -> Tensor:
        return self._values.tensors(part)[0][..., index, None]


def gated_hidden(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose outputs hidden gates multiply, each once.

    Args:
        model: a model of a known family.

    Returns:
        Norms, and projections that write, of the stream's width; embeddings where no norm follows them.
    """
    embeddings = not anatomy_of(model).embeddings_normed

    def writes(module: nn.Module, kind: str, axes: tuple[int, ...]) -> bool:
        if isinstance(module, nn.Embedding):
            return embeddings and 1 in axes
        # a bias is enough for a module without a matrix, too
        if is_norm(module) or kind == "bias":
            return 0 in axes
        return (1 if is_conv1d(module) else 0) in axes

    return _along_the_stream(model, writes)


def reading_hidden(model: PreTrainedModel) -> list[nn.Module]:
    """The modules with a matrix that reads the residual stream, each once.

    Args:
        model: a model of a known family.

    Returns:
        Projections of blocks and of the task's head whose inputs are of the stream's width.
    """

    def reads(module: nn.Module, kind: str, axes: tuple[int, ...]) -> bool:
        if kind == "bias" or isinstance(module, nn.Embedding) or is_norm(module):
            return False
        return (0 if is_conv1d(module) else 1) in axes

    return _along_the_stream(model, reads)


def _along_the_stream(
    model: PreTrainedModel, wanted: Callable[[nn.Module, str, tuple[int, ...]], bool]
) -> list[nn.Module]:
    """The modules with relevant parameters, by module, name and axes of the stream's width, each once."""
    owners = dict(model.named_modules())
    found: list[nn.Module] = []
    for name, (_, axes) in hidden_axes(model).items():
        path, _, kind = name.rpartition(".")
        module = owners[path]
        if wanted(module, kind, axes) and not any(module is other for other in found):
            found.append(module)
    return found


def _times(x: Tensor, value: Tensor) -> Tensor:
    return x * _shaped(value, x)


def _shaped(value: Tensor, x: Tensor) -> Tensor:
    """``(n,)`` or ``(batch, n)``, such that it broadcasts against ``x`` ``(batch, ..., n)``, in its dtype."""
    # a model may be spread over several devices
    value = value.to(device=x.device, dtype=x.dtype)
    if value.dim() == 1:
        return value
    rows = x.shape[0]
    # positions are embedded once for all examples
    if rows not in (1, value.shape[0]):
        if rows % value.shape[0]:
            raise LmcompressError(
                f"gates have values for {value.shape[0]} examples, the model was given {rows} rows; set values for the "
                "next batch, or use shared ones, of shape (n,), if batches differ"
            )
        value = value.repeat_interleave(rows // value.shape[0], 0)
    return value.reshape(value.shape[0], *(1,) * (x.dim() - 2), value.shape[-1])
