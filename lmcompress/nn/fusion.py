"""Matmuls of packed modules that a model's forward pass lets them compute together.

Two are known. Modules that read the same input, such as the projections of queries, keys and values, are one matrix
whose rows are computed at once (:class:`Joined`); and a matmul applies the activation function that follows it
(:class:`Followed`). Both hold only where one module's output is known to go where the family's own code sends it:
within the forward pass of a whole model, in this thread, as far as nothing else looks on. Whatever calls a module
otherwise gets that module's own matmul.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from lmcompress.kernels.dispatch import settings
from lmcompress.kernels.matmul import Matmul, identity
from lmcompress.kernels.matrix import Inputs
from lmcompress.kernels.posts import Post
from lmcompress.kernels.stack import Stack
from lmcompress.numerics.graphs import recording
from lmcompress.numerics.grids import PerGroup

_HANDLES = "_fusion_handles"


class _Now(threading.local):
    """The state of this thread: at most one result is waited for at a time.

    Attributes:
        passes: forward passes of models that are running, one within the other.
        frame: the call of the outermost of them; None in a graph that is being compiled.
        joint: the pending slices of a joint matmul.
        activated: a matmul's result to which the activation function was applied.
        codes: such a result in the codes of the module that reads it, and the dtype that it would have.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.frame: FrameType | None = None
        self.joint: _Joint | None = None
        self.activated: Tensor | None = None
        self.codes: tuple[Tensor, torch.dtype] | None = None


_Joint = tuple["Joined", Tensor, tuple[Tensor, ...], tuple[int, ...]]
"""Whose result it is, the input, the slices, and the positions of those that were taken."""

_NOW = _Now()


def follow_passes(model: nn.Module) -> None:
    """Let a model state that its forward pass is running; safe to call twice.

    Args:
        model: gets hooks, which copies of it have too; it runs all the modules that are joined or followed.
    """
    if _HANDLES not in model.__dict__:
        model.__dict__[_HANDLES] = (
            model.register_forward_pre_hook(_begin),
            model.register_forward_hook(_end, always_call=True),
        )


def release_passes(model: nn.Module) -> None:
    """Remove what :func:`follow_passes` added; safe to call twice.

    Args:
        model: the model.
    """
    for handle in model.__dict__.pop(_HANDLES, ()):
        handle.remove()


def _begin(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and not _running():
        _NOW.passes, _NOW.frame = 0, sys._getframe(1)
    _NOW.passes += 1


def _end(module: nn.Module, args: Any, output: Any) -> None:
    # also called where another hook's exception came before _begin
    _NOW.passes = max(_NOW.passes - 1, 0)
    if _NOW.passes == 0:
        _NOW.frame = None
    # left behind by an exception
    _NOW.joint = _NOW.activated = _NOW.codes = None


def _running() -> bool:
    """Whether a forward pass is running; one that was interrupted from the keyboard had no hooks called at its end."""
    if _NOW.passes == 0:
        return False
    if torch.compiler.is_compiling() or _NOW.frame is None:
        return True
    try:
        # refused for a frame that is running
        _NOW.frame.clear()
    except RuntimeError:
        return True
    _NOW.passes, _NOW.frame = 0, None
    _NOW.joint = _NOW.activated = _NOW.codes = None
    return False


def fusing(x: Tensor) -> bool:
    """Whether matmuls of an input may be computed together now.

    Args:
        x: the input.

    Returns:
        False outside of a forward pass, where gradients are asked for, and where a graph is recorded: it leaves with
        every matmul by itself. So does the reference, which others are compared with: in half precision the result
        of each module is rounded.
    """
    if settings.kernel == "reference" or recording():
        return False
    return _running() and not (torch.is_grad_enabled() and x.requires_grad)


class _Place:
    """A part of a module that its children know without owning it.

    Copies made along with the module belong to its copy; a child that is copied alone belongs nowhere.

    Args:
        parent: the module.
    """

    def __init__(self, parent: nn.Module | None) -> None:
        self._parent = None if parent is None else weakref.ref(parent)

    @property
    def parent(self) -> nn.Module | None:
        """The module, while it exists."""
        return None if self._parent is None else self._parent()


class Joined(_Place):
    """Packed modules of one parent that read the same input: one matmul with the rows of all of them.

    The first that is called in a forward pass computes the rows of all, the others take their columns of the result if
    they are called with the very same tensor. It is exact: codes, scales and biases are those of the modules, which
    stay as they are. The joint matrix is prepacked in place of theirs.

    Args:
        parent: the module that calls them; None for a copy of a module without its parent, which joins nothing.
        names: their names in it.
    """

    def __init__(self, parent: nn.Module | None, names: Sequence[str]) -> None:
        super().__init__(parent)
        self.names = tuple(names)
        self._matmul = Matmul()
        # static ranges, in which modules may differ: key and whether they are equal, and what the key is of
        self._compared: tuple[Any, bool, list[Tensor]] | None = None
        # the descriptions that were found alike, or not
        self._alike, self._said = False, list[Any]()

    def __deepcopy__(self, memo: dict[int, Any]) -> Joined:
        new = Joined(memo.get(id(self.parent)), self.names)
        # the ranges are copied as they are
        new._compared = self._compared and (None, self._compared[1], [])
        return new

    def __reduce__(self) -> tuple[type[Joined], tuple[Any, ...]]:
        return Joined, (self.parent, self.names)

    @property
    def kernel(self) -> str:
        """The name of the kernel used last; empty before the first joint matmul."""
        return self._matmul.kernel

    def reset(self, *, ranges: bool = False) -> None:
        """Free the prepacked memory: tensors have changed.

        Args:
            ranges: whether static ranges may have, so that a graph must not rely on what was found of them.
        """
        self._matmul.reset()
        self._said = []
        if ranges:
            self._compared = None

    def pending(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """A module's part of a joint matmul that a sibling has computed.

        Args:
            module: one of the modules.
            x: its input.

        Returns:
            ``(..., out)``, a view; None if there is none for this very tensor, or the module has taken it.
        """
        joint = _NOW.joint
        if joint is None or joint[0] is not self or joint[1] is not x or not _running():
            return None
        index = self._index(module)
        if index is None or index in joint[3]:
            return None
        taken = (*joint[3], index)
        _NOW.joint = None if len(taken) == len(self.names) else (*joint[:3], taken)
        return joint[2][index]

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """A module's part of the joint matmul, which its siblings are to take theirs of.

        Args:
            module: one of the modules.
            x: its input, ``(..., in)``.

        Returns:
            ``(..., out)``, a view; None if the modules cannot be joined, and each computes by itself.
        """
        modules, index = self.modules(), self._index(module)
        if index is None or not self.fit(modules):
            return None
        slices = self._slices(modules, x)
        _NOW.joint = self, x, slices, (index,)
        return slices[index]

    def modules(self) -> list[Any]:
        """The modules; none if one of them is no longer the parent's or something else wants to see its input."""
        parent = self.parent
        if parent is None:
            return []
        found = [parent._modules.get(name) for name in self.names]
        return found if all(_alone(one) and getattr(one, "joined", None) is self for one in found) else []

    def fit(self, modules: Sequence[Any]) -> bool:
        """Whether matrices can be joined, and inputs are quantized alike.

        Args:
            modules: the modules.
        """
        # unpacked by blocks, matrices have nothing to share
        if not modules or settings.memory == "low":
            return False
        said = [part for m in modules for part in (m.layout, m.inputs, m.bias is None)]
        if len(said) != len(self._said) or any(one is not other for one, other in zip(said, self._said, strict=True)):
            self._alike, self._said = self._are_alike(modules), said
        return self._alike and (modules[0].inputs.range != "static" or self._equal_ranges(modules))

    def _are_alike(self, modules: Sequence[Any]) -> bool:
        """What does not depend on values."""
        matrices, inputs = [m.matrix() for m in modules], [m.inputs for m in modules]
        # floats are summed in another order if there are more rows
        if any(one is None for one in inputs) or isinstance(matrices[0].granularity, PerGroup):
            return False
        if len({m.bias is None for m in modules}) > 1 or not all(m.shape[0] for m in matrices):
            return False
        return all(one == inputs[0] for one in inputs) and Stack.fits(matrices)

    def _equal_ranges(self, modules: Sequence[Any]) -> bool:
        """Whether static ranges are the same; a graph that is being compiled holds what was found before."""
        if torch.compiler.is_compiling():
            return self._compared is not None and self._compared[1]
        names = ("input_scale", "input_zero_point")
        tensors = [t for m in modules for t in map(m._buffers.get, names) if t is not None]
        key = tuple(map(identity, tensors))
        compared = self._compared
        if compared is None or compared[0] != key:
            each = len(tensors) // len(modules)
            equal = all(torch.equal(tensors[i], tensors[i % each]) for i in range(each, len(tensors)))
            self._compared = compared = key, equal, tensors
        return compared[1]

    def _slices(self, modules: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
        biases = tuple(m.bias for m in modules if m.bias is not None)
        y = self._matmul(x, Stack(tuple(m.matrix() for m in modules), biases), None, modules[0].matmul_inputs())
        if not torch.compiler.is_compiling():
            for module in modules:
                module.release()
        return torch.split(y, [m.out_features for m in modules], dim=-1)

    def _index(self, module: Any) -> int | None:
        parent = self.parent
        if parent is None:
            return None
        return next((i for i, name in enumerate(self.names) if parent._modules.get(name) is module), None)


class Followed(_Place):
    """A packed module whose output goes to an activation function and nowhere else: its matmul applies it.

    Where the function's result goes to another packed module alone, and that quantizes it over a static range, the
    matmul writes the codes as well.

    Args:
        parent: the module that calls all three; None for a copy of one of them without it.
        paths: the paths in it of the packed module, of the activation function and of the module that reads its result.
        post: the function.
    """

    def __init__(self, parent: nn.Module | None, paths: tuple[str, str, str], post: Post) -> None:
        super().__init__(parent)
        self.paths, self.post = paths, post
        self._names = tuple(tuple(path.split(".")) for path in paths)

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        return Followed(memo.get(id(self.parent)), self.paths, self.post)

    def __reduce__(self) -> tuple[type[Followed], tuple[Any, ...]]:
        return Followed, (self.parent, self.paths, self.post)

    def next_is_known(self, module: nn.Module) -> bool:
        """Whether the activation function is in its place, asks :func:`is_activated`, and nothing looks on.

        Args:
            module: the packed module.
        """
        (*_, own), (*_, function) = self._down(0), self._down(1)
        return own is module and _alone(own) and _alone(function) and isinstance(function, Asking)

    def reader(self) -> Inputs | None:
        """The quantization by the module that reads the function's result, if it is static and nothing else reads it.

        Returns:
            None also where a graph is compiled, whose compiler joins the quantizer with what is before it.
        """
        (*before, _), (*after, reader) = self._down(0), self._down(2)
        # the parents in between are given the result, or give it
        between = [parent for parent in (*before, *after) if not (parent in before and parent in after)]
        if torch.compiler.is_compiling() or not all(map(_alone, (*between, reader))):
            return None
        asked = getattr(reader, "reads_codes", None)
        return None if asked is None else asked()

    def _down(self, which: int) -> list[nn.Module | None]:
        """The modules on a path, without the parent; the last one is None if the path has an end before."""
        module, found = self.parent, []
        for name in self._names[which]:
            module = None if module is None else module._modules.get(name)
            found.append(module)
        return found


class Asking:
    """A mark of activation functions that ask :func:`is_activated` about their input."""


def activated(y: Tensor) -> Tensor:
    """State that a tensor is the result of the activation function to which it will be given.

    Args:
        y: the tensor.

    Returns:
        The same.
    """
    _NOW.activated = y
    return y


def coded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """State that a tensor is the result of an activation function in the codes of the module that reads it.

    Args:
        codes: the tensor.
        dtype: what its dtype would be.

    Returns:
        The same tensor.
    """
    _NOW.codes = codes, dtype
    return activated(codes)


def dtype_of_codes(x: Tensor) -> torch.dtype | None:
    """The dtype of what a tensor holds the codes of, or None if it holds numbers; asked once of each tensor.

    Args:
        x: the input of a packed module.
    """
    codes = _NOW.codes
    if codes is None or codes[0] is not x:
        return None
    _NOW.codes = None
    return codes[1]


def is_activated(x: Tensor) -> bool:
    """Whether the activation function was already applied to its input; true once for each result.

    Args:
        x: the input.
    """
    if _NOW.activated is not x:
        return False
    _NOW.activated = None
    return True


def _alone(module: nn.Module | None) -> bool:
    """Whether a module runs its own forward pass, and no hook sees what comes in or out."""
    return (
        module is not None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
        and "forward" not in module.__dict__
    )
