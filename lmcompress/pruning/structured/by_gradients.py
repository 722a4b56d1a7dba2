"""Scores of units from the gradients of gates, example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lmcompress.activations.calibration import CalibrationData, rows_of
from lmcompress.activations.hooks import model_inputs
from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.objectives import Labels, Objective, label_objective, own_objectives
from lmcompress.pruning.structured.registry import Criterion
from lmcompress.pruning.structured.units import Part, Units, assembled


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients of parameters: those of gates need less memory, and no ``.grad`` changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def from_gradients(
    model: PreTrainedModel,
    criterion: Criterion,
    parts: Sequence[Part],
    data: CalibrationData,
    labels: Labels,
    seed: int,
) -> Units:
    """Scores by a criterion that needs gradients of gates, or inner products of weights and gradients.

    Args:
        model: a model of a known family, in evaluation mode.
        criterion: called with the gradients of each example's own loss.
        parts: units to score.
        data: calibration data.
        labels: given, or drawn from the model's own distribution.
        seed: seed of drawn labels.

    Raises:
        LmcompressError: If no label counts.
    """
    generator = torch.Generator().manual_seed(seed)
    by_products = criterion.needs == "products"
    gated: list[Part] = [p for p in parts if p != "layers"] if by_products else list(parts)
    if by_products and "layers" in parts:
        gated += [part for part in ("attention", "ffn") if part not in gated]
    # the matrices that feed neurons have no gates of their own
    first = by_products and any(part in parts for part in ("neurons", "ffn", "layers"))
    sums: dict[tuple[Part, int], Tensor] = {}
    examples = 0.0
    with Gates(model, gated) as gates, _frozen(model), _first_matrices(model, first) as inner:
        for batch in data:
            rows = rows_of(batch)
            leaves: dict[tuple[str, int], Tensor] = {(p, i): x for p, i, x in gates.ones_per_example(rows).items()}
            inner.fresh(rows)
            with torch.enable_grad():
                outputs = model(**model_inputs(model, batch))
                objectives = _objectives(model, outputs, batch, labels, generator)
            examples += float(sum(objective.weight.sum() for objective in objectives))
            wanted: dict[tuple[str, int], Tensor] = {("first", i): leaf for i, leaf in enumerate(inner.leaves)}
            wanted |= leaves
            for number, objective in enumerate(objectives):
                gradients = _gradients(objective, wanted, retain=number + 1 < len(objectives))
                for key, values in _by_unit(criterion, parts, gradients).items():
                    weighted = (values.double() * objective.weight[:, None].double()).sum(dim=0).cpu()
                    sums[key] = sums[key] + weighted if key in sums else weighted
    if not examples:
        raise LmcompressError(
            "calibration data must have labels that count, got only -100; criteria without gradients, or "
            'labels="self", need no labels'
        )
    return assembled(model, parts, {key: total / examples for key, total in sums.items()})


def _objectives(
    model: PreTrainedModel, outputs: Any, batch: Mapping[str, Tensor], labels: Labels, generator: torch.Generator
) -> list[Objective]:
    if labels == "self":
        return own_objectives(model, outputs, batch, generator)
    return [label_objective(model, outputs, batch)]


def _gradients(objective: Objective, leaves: Mapping[Any, Tensor], *, retain: bool) -> dict[Any, Tensor]:
    # the loss of an example without labels is 0 or NaN; its weight excludes it
    with torch.enable_grad():
        loss = objective.loss[objective.weight > 0].sum()
    if not loss.requires_grad:
        return {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain, allow_unused=True)
    return {
        key: torch.zeros_like(leaf) if gradient is None else gradient
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _by_unit(
    criterion: Criterion, parts: Sequence[Part], gradients: dict[Any, Tensor]
) -> dict[tuple[Part, int], Tensor]:
    """The criterion's value of every unit for every example, by part and, where it is per block, by block."""
    found: dict[tuple[Part, int], Tensor] = {}
    for part in parts:
        if criterion.needs == "gates":
            found |= {key: criterion.function(g) for key, g in gradients.items() if key[0] == part}
            continue
        # the gradient of a gate on a matrix's input is the inner product of that matrix's columns with their gradients
        if part in ("heads", "attention"):
            found |= {key: criterion.function([g]) for key, g in gradients.items() if key[0] == part}
            continue
        first = [g for key, g in gradients.items() if key[0] == "first"]
        if part == "neurons":
            for i, g in enumerate(first):
                found["neurons", i] = criterion.function([gradients["neurons", i], *g.unbind(1)])
            continue
        whole = torch.stack([g.sum(dim=-1) for g in first], dim=-1)
        products = [gradients["ffn", 0], *whole.unbind(1)]
        found[part, 0] = criterion.function(products if part == "ffn" else [gradients["attention", 0], *products])
    return found


class _FirstMatrices:
    """Ones on the outputs of the matrices that feed the neurons of every feed-forward network.

    Args:
        blocks: hooks are put on their matrices.
        device: that of the model.

    Attributes:
        leaves: by block ``(examples, matrices, neurons)``; a gate that is fused into the first matrix counts as one.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.leaves: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        self._device = device
        self.handles: list[RemovableHandle] = []
        for index, block in enumerate(blocks):
            feeding = [coupled for coupled in block.coupled("neurons") if coupled.side == "in"]
            matrices = 0
            for coupled in feeding:
                copies = slice(matrices, matrices + len(coupled.sections))
                hook = self._times(index, copies)
                self.handles.append(block.get(coupled.part).register_forward_hook(hook))
                matrices = copies.stop
            self._shapes.append((matrices, block.ffn_width))

    def fresh(self, rows: int) -> None:
        """Create new leaves for the examples of a batch."""
        self.leaves = [torch.ones(rows, *shape, device=self._device, requires_grad=True) for shape in self._shapes]

    def _times(self, index: int, copies: slice) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = self.leaves[index][:, copies].flatten(1)
            rows = output.shape[0] // leaf.shape[0]
            # several rows of one example, such as the choices of a question, share its leaf
            value = leaf.repeat_interleave(rows, 0).to(output.dtype)
            return output * value.reshape(len(value), *(1,) * (output.dim() - 2), -1)

        return hook


@contextmanager
def _first_matrices(model: PreTrainedModel, there: bool) -> Iterator[_FirstMatrices]:
    inner = _FirstMatrices(anatomy_of(model).blocks if there else [], model.device)
    try:
        yield inner
    finally:
        for handle in inner.handles:
            handle.remove()
