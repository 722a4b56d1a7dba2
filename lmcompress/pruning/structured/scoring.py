"""Scores: a model and calibration data through a criterion, one number for each unit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lmcompress.activations.running import evaluating, with_progress
from lmcompress.checkpoint.structure import hidden_axes
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import Block, anatomy_of, weight_view
from lmcompress.pruning.structured import criteria
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.groups import unit_views
from lmcompress.pruning.structured.objectives import (
    Labels,
    Objective,
    label_objective,
    model_inputs,
    own_objectives,
    rows_of,
    valid_tokens,
    without_padding_rows,
)
from lmcompress.pruning.structured.units import PARTS, Part, Units, full

Batch = Mapping[str, Any]
"""Tensors by name, as a collator makes them: ``input_ids``, ``attention_mask``, perhaps ``labels``."""

Needs = Literal["nothing", "weights", "gates", "products", "activations", "pooled", "norms", "attention", "blocks"]

# scores that differ by less, relative to the greatest, differ by rounding alone
_EQUAL = 1e-6


@dataclass(frozen=True)
class Criterion:
    """A function of :mod:`lmcompress.pruning.structured.criteria`, and what it is fed with.

    ============== =============================================================================== ==============
    needs          ``function``                                                                    then
    ============== =============================================================================== ==============
    ``nothing``    ``(units, generator) -> (units,)``
    ``weights``    ``(group (units, n)) -> (units,)``, the coupled weights
    ``gates``      ``(gradient (batch, units)) -> (batch, units)``, of gates, by each own loss     mean of examples
    ``products``   ``(list of (batch, units)) -> (batch, units)``, weights · gradients by matrix   mean of examples
    ``activations``  ``(activations (tokens, units[, size])) -> (units,)``, a mean over tokens     mean of tokens
    ``pooled``     ``(means (examples, units)) -> (units,)``, of all examples at once
    ``norms``      ``(weight (out, in), norm (in,)) -> (out, in)``, of what reads the units        sum of columns
    ``attention``  ``(probabilities, mask, causal=) -> (batch, heads + 1)``, sums and count        1 - mean
    ``blocks``     ``(before (tokens, d), after (tokens, d)) -> (tokens,)``                        mean of tokens
    ============== =============================================================================== ==============

    Attributes:
        name: for messages and configurations.
        needs: see the table.
        parts: that it has a meaning for.
        function: see the table.
        signed: whether the score is a sum of values of both signs, which has a meaning with given labels only.
        flip: whether a greater value means that a unit goes sooner; the score is then 1 minus the value.
    """

    name: str
    needs: Needs
    parts: tuple[Part, ...]
    function: Callable[..., Tensor]
    signed: bool = False
    flip: bool = False


_BOTH: tuple[Part, ...] = ("heads", "neurons")
_IN_BLOCKS: tuple[Part, ...] = ("heads", "neurons", "attention", "ffn", "layers")

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("l1", "weights", PARTS, criteria.l1_norm),
        Criterion("l2", "weights", PARTS, criteria.l2_norm),
        Criterion("taylor_weights", "products", _IN_BLOCKS, criteria.taylor_weights),
        Criterion("taylor_gates", "gates", PARTS, criteria.taylor_gates),
        Criterion("fisher", "gates", PARTS, criteria.fisher),
        Criterion("movement", "gates", PARTS, criteria.movement, signed=True),
        Criterion("apoz", "activations", ("neurons",), criteria.apoz, flip=True),
        Criterion("mean_activation", "activations", (*_BOTH, "hidden"), criteria.mean_activation),
        Criterion("activation_entropy", "pooled", _BOTH, criteria.activation_entropy),
        Criterion("attention_entropy", "attention", ("heads",), criteria.attention_entropy, flip=True),
        Criterion("wanda", "norms", _BOTH, criteria.wanda),
        Criterion("block_influence", "blocks", ("layers",), criteria.block_influence),
        Criterion("random", "nothing", PARTS, criteria.random_scores),
    )
}
"""The criteria by name. Another ``epsilon`` or number of bins: ``replace(criterion, function=partial(...))``."""


def score(
    model: PreTrainedModel,
    criterion: Criterion | str,
    parts: Collection[Part],
    batches: Iterable[Batch] | None = None,
    *,
    labels: Labels = "given",
    seed: int = 0,
    progress: bool = False,
) -> Units:
    """How important each unit of a model is.

    Absolute values and squares are taken for each example, and means over examples or valid tokens: the scores do not
    depend on how the examples are put into batches, nor on padding. The model runs in evaluation mode and is left as it
    was.

    Args:
        model: of a known family, on any device.
        criterion: one of :data:`CRITERIA` or its name, or another :class:`Criterion`.
        parts: units to score.
        batches: calibration data; not needed where the criterion looks at weights alone.
        labels: for criteria with gradients, ``given`` takes those of the batches (a causal language model without any
            takes its text), ``self`` draws them from the model's own answer, see
            :func:`~lmcompress.pruning.structured.objectives.own_objectives`; that works for regression too.
        seed: of what is drawn.
        progress: shows a bar, on a terminal, where the number of batches is known.

    Returns:
        Float32 on the CPU, in the parts asked for; greater is more important.

    Raises:
        LmcompressError: an unknown criterion or part, or one that does not go with the other; no calibration data, or
            nothing but padding; no labels; labels of its own for a criterion whose sign matters; scores that are NaN or
            infinite (the message names the block), or all equal in a part, which would prune at random.
    """
    chosen = _criterion(criterion)
    _check_request(chosen, parts, batches, labels)
    wanted: tuple[Part, ...] = tuple(part for part in PARTS if part in parts)
    if chosen.needs == "nothing":
        generator = torch.Generator().manual_seed(seed)
        # a control with equal scores would be one with no units
        return full(model, wanted, 0.0, torch.float32).map(lambda units: chosen.function(len(units), generator))
    if chosen.needs == "weights":
        scores = _from_weights(model, chosen, wanted)
    else:
        data = CalibrationData(model, batches if batches is not None else (), progress)
        with evaluating(model):
            if chosen.needs in ("gates", "products"):
                scores = _from_gradients(model, chosen, wanted, data, labels, seed)
            else:
                scores = _from_activations(model, chosen, wanted, data)
    check_scores(scores, chosen.name)
    return scores


def normalized(scores: Units) -> Units:
    """Scores of heads and neurons over their Euclidean norm in their block, as Michel et al. take them.

    Args:
        scores: of any parts; the other parts stay as they are.
    """
    changed: dict[str, tuple[Tensor, ...]] = {}
    for part in _BOTH:
        if tensors := scores.tensors(part):
            changed[part] = tuple(criteria.normalize_by_layer(tensor) for tensor in tensors)
    return scores.updated(**changed)


def check_scores(scores: Units, name: str) -> None:
    """Refuse scores that say nothing.

    Args:
        scores: of any parts.
        name: of the criterion, for the message.

    Raises:
        LmcompressError: a score is NaN or infinite, or all scores of a part are equal, zero for instance.
    """
    for part, block, tensor in scores.items():
        bad = ~tensor.isfinite()
        if bool(bad.any()):
            where = f"{part} in block {block}" if part in _BOTH else f"{part}, number {int(bad.nonzero()[0])}"
            raise LmcompressError(
                f"scores must be finite, got {float(tensor[bad][0])} from {name} for {where} ({int(bad.sum())} of "
                f"{len(tensor)}): the model overflows there; score it in float32, or look for NaN in its weights"
            )
    for part in scores.parts():
        values = torch.cat([tensor.double() for tensor in scores.tensors(part)])
        if len(values) and not bool(values.any()):
            raise LmcompressError(
                f"scores must differ, got zero from {name} for all {len(values)} {part}: they would be pruned at "
                "random. Nothing in the loss depends on them; are the labels right, or is the head detached?"
            )
        if len(values) > 1 and float(values.max() - values.min()) <= _EQUAL * float(values.abs().max()):
            raise LmcompressError(
                f"scores must differ, got {float(values[0]):.4g} from {name} for all {len(values)} {part}: they would "
                "be pruned at random; take another criterion, or more calibration data"
            )


class CalibrationData:
    """Calibration batches on a model's device, without rows of padding; refuses to have been empty.

    Args:
        model: whose device it is.
        batches: as they come.
        progress: shows a bar, on a terminal, where their number is known.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Batch], progress: bool = False) -> None:
        self.model = model
        self.batches = batches
        self.progress = progress and isinstance(batches, Sequence)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        given = real = 0
        batches = self.batches
        shown = with_progress(batches, "score", enabled=self.progress) if isinstance(batches, Sequence) else batches
        for batch in shown:
            given += 1
            kept = without_padding_rows(batch, self.model.device)
            if rows := rows_of(kept):
                real += rows
                yield kept
        if not given:
            raise LmcompressError("calibration data must have at least one batch, got none; was a generator used up?")
        if not real:
            raise LmcompressError(
                f"calibration data must have tokens, got {given} batches of padding alone; is attention_mask 1 for "
                "real tokens?"
            )


def _criterion(criterion: Criterion | str) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise LmcompressError(f"unknown criterion {criterion!r}{nearest(criterion, CRITERIA)}")
    return CRITERIA[criterion]


def _check_request(criterion: Criterion, parts: Collection[Part], batches: Iterable[Batch] | None, labels: str) -> None:
    if not parts:
        raise LmcompressError(f"parts must name at least one of {', '.join(PARTS)}, got none")
    for part in parts:
        if part not in PARTS:
            raise LmcompressError(f"unknown part {part!r}{nearest(part, PARTS)}")
        if part not in criterion.parts:
            fitting = [name for name, other in CRITERIA.items() if part in other.parts]
            raise LmcompressError(
                f"{criterion.name} must be asked about {', '.join(criterion.parts)}, got {part}; criteria for {part} "
                f"are {', '.join(fitting)}"
            )
    if labels not in get_args(Labels):
        raise LmcompressError(f"labels must be given or self, got {labels!r}{nearest(labels, get_args(Labels))}")
    if criterion.needs not in ("nothing", "weights") and batches is None:
        raise LmcompressError(f"{criterion.name} must have calibration data, got batches=None; l1 and l2 need none")
    if criterion.signed and labels == "self":
        raise LmcompressError(
            f"{criterion.name} must have given labels, got labels='self': it adds gradients with their signs, and over "
            "labels that the model draws itself these cancel; use taylor_gates or fisher"
        )


def _from_weights(model: PreTrainedModel, criterion: Criterion, parts: Sequence[Part]) -> Units:
    return _assembled(
        model,
        parts,
        {(part, index): criterion.function(group) for part in parts for index, group in _groups(model, part)},
    )


def _groups(model: PreTrainedModel, part: Part) -> Iterator[tuple[int, Tensor]]:
    """The coupled weights of a part's units as ``(units, weights)``; for sub-layers and blocks one row at a time."""
    blocks = anatomy_of(model).blocks
    if part == "hidden":
        pieces, seen = [], set()
        for parameter, axes in hidden_axes(model).values():
            if id(parameter) not in seen:
                pieces += [parameter.detach().movedim(axis, 0).reshape(parameter.shape[axis], -1) for axis in axes]
            seen.add(id(parameter))
        yield 0, torch.cat(pieces, dim=1)
        return
    for index, block in enumerate(blocks):
        if part == "heads" or part == "neurons":
            if block.num_heads if part == "heads" else block.ffn_width:
                views = unit_views(block, part)
                yield index, torch.cat([view.reshape(len(view), -1) for view in views], dim=1)
            continue
        parameters = [p.detach().flatten() for module in _modules(block, part) for p in module.parameters()]
        yield index, torch.cat(parameters)[None]


def _modules(block: Block, part: Part) -> list[nn.Module]:
    if part == "layers":
        return [block.module]
    if part == "ffn":
        return [block.get("ffn_in"), block.get("ffn_out")]
    return [
        block.get(name) for name in ("qkv", "query", "key", "value", "attention_out") if getattr(block.family, name)
    ]


def _assembled(model: PreTrainedModel, parts: Sequence[Part], values: Mapping[tuple[Part, int], Tensor]) -> Units:
    """Units of the model's shapes from values by part and block; a block that has none has no units."""
    blocks = len(anatomy_of(model).blocks)
    made: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for part in parts:
        if part == "hidden":
            made[part] = values[part, 0].float().cpu()
            continue
        tensors = [values.get((part, i), torch.zeros(0)).float().cpu() for i in range(blocks)]
        made[part] = tuple(tensors) if part in _BOTH else torch.cat(tensors)
    return Units().updated(**made)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients of parameters: those of gates need less memory, and nobody's ``.grad`` changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _from_gradients(
    model: PreTrainedModel,
    criterion: Criterion,
    parts: Sequence[Part],
    data: CalibrationData,
    labels: Labels,
    seed: int,
) -> Units:
    generator = torch.Generator().manual_seed(seed)
    by_products = criterion.needs == "products"
    gated: list[Part] = [p for p in parts if p != "layers"] if by_products else list(parts)
    if by_products and "layers" in parts:
        gated += [part for part in ("attention", "ffn") if part not in gated]
    # the first matrix of the feed-forward network has no gate of its own
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
            "calibration data must have labels that count, got none but -100; criteria without gradients, or "
            'labels="self", need no labels'
        )
    return _assembled(model, parts, {key: total / examples for key, total in sums.items()})


def _objectives(
    model: PreTrainedModel, outputs: Any, batch: Mapping[str, Tensor], labels: Labels, generator: torch.Generator
) -> list[Objective]:
    if labels == "self":
        return own_objectives(model, outputs, batch, generator)
    return [label_objective(model, outputs, batch)]


def _gradients(objective: Objective, leaves: Mapping[Any, Tensor], *, retain: bool) -> dict[Any, Tensor]:
    # an example without a label has a loss that is 0 or NaN by itself; its weight keeps it out
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
        # the gradient of a gate on what a matrix reads is the product of that matrix's columns with their gradients
        if part in ("heads", "attention"):
            found |= {key: criterion.function([g]) for key, g in gradients.items() if key[0] == part}
            continue
        first = [g for key, g in gradients.items() if key[0] == "first"]
        if part == "neurons":
            found |= {("neurons", i): criterion.function([gradients["neurons", i], g]) for i, g in enumerate(first)}
            continue
        whole = torch.stack([g.sum(dim=-1) for g in first], dim=-1)
        products = [gradients["ffn", 0], whole]
        found[part, 0] = criterion.function(products if part == "ffn" else [gradients["attention", 0], *products])
    return found


class _FirstMatrices:
    """Ones on the output of the first matrix of every feed-forward network, apart for each example."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.leaves: list[Tensor] = []
        self._widths = [weight_view(module).shape[0] for module in modules]
        self._device = device
        self.handles = [module.register_forward_hook(self._times(index)) for index, module in enumerate(modules)]

    def fresh(self, rows: int) -> None:
        """New leaves for a batch of so many examples."""
        self.leaves = [torch.ones(rows, width, device=self._device, requires_grad=True) for width in self._widths]

    def _times(self, index: int) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = self.leaves[index]
            rows = output.shape[0] // leaf.shape[0]
            # distinct rows of one example, such as the choices of a question, share its leaf
            value = leaf.repeat_interleave(rows, 0).to(output.dtype)
            return output * value.reshape(len(value), *(1,) * (output.dim() - 2), -1)

        return hook


@contextmanager
def _first_matrices(model: PreTrainedModel, there: bool) -> Iterator[_FirstMatrices]:
    modules = [block.get("ffn_in") for block in anatomy_of(model).blocks] if there else []
    inner = _FirstMatrices(modules, model.device)
    try:
        yield inner
    finally:
        for handle in inner.handles:
            handle.remove()


class Taps:
    """Hooks that hand what flows through a model to functions, padding taken out.

    Args:
        model: whose modules are listened to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._handles: list[RemovableHandle] = []
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self.model = model

    def on_input(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Hand over what a module is called with.

        Args:
            module: called with one tensor ``(rows, length, width)``.
            take: gets it.
        """
        self._handles.append(module.register_forward_pre_hook(lambda _, args: take(args[0])))

    def on_output(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Hand over what a module answers.

        Args:
            module: answers with one tensor.
            take: gets it.
        """
        self._handles.append(module.register_forward_hook(lambda _, args, output: take(output)))

    def on_block(self, module: nn.Module, take: Callable[[Tensor, Tensor], None]) -> None:
        """Hand over what goes into a block and what comes out.

        Args:
            module: a block.
            take: gets both.
        """

        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            take(args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def tokens(self, tensor: Tensor) -> Tensor:
        """``(rows, length, ...)`` as ``(valid tokens, ...)``."""
        return tensor[self.mask]

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """One forward pass, without gradient.

        Args:
            batch: on the model's device.
        """
        self.mask = valid_tokens(batch)
        with torch.no_grad():
            self.model(**model_inputs(self.model, batch))

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Means:
    """Sums in float64 by key, and how much they are of."""

    def __init__(self) -> None:
        self.sums: dict[tuple[Part, int], Tensor] = {}
        self.counts: dict[tuple[Part, int], float] = {}

    def add(self, key: tuple[Part, int], total: Tensor, count: float) -> None:
        value = total.detach().double().cpu()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0.0) + count

    def means(self) -> dict[tuple[Part, int], Tensor]:
        return {key: total / max(self.counts[key], 1e-300) for key, total in self.sums.items()}


def _from_activations(
    model: PreTrainedModel, criterion: Criterion, parts: Sequence[Part], data: CalibrationData
) -> Units:
    means = _Means()
    pooled: dict[tuple[Part, int], list[Tensor]] = {}
    with Taps(model) as taps:
        for part in parts:
            if criterion.needs == "attention":
                _tap_attention(taps, criterion, means)
            elif criterion.needs == "blocks":
                _tap_blocks(taps, criterion, means)
            else:
                _tap_activations(taps, part, _feed(taps, criterion, means, pooled))
        for batch in data:
            taps.run(batch)
    values = means.means()
    if criterion.needs == "pooled":
        values = {key: criterion.function(torch.cat(rows)) for key, rows in pooled.items()}
    if criterion.needs == "norms":
        values = {key: _summed_columns(model, criterion, key, squares.sqrt()) for key, squares in values.items()}
    if criterion.flip:
        values = {key: 1 - value for key, value in values.items()}
    return _assembled(model, parts, values)


Feed = Callable[[tuple[Part, int], Tensor], None]
"""``(key, activations (rows, length, units[, size]))``."""


def _feed(taps: Taps, criterion: Criterion, means: _Means, pooled: dict[tuple[Part, int], list[Tensor]]) -> Feed:
    def tokenwise(key: tuple[Part, int], values: Tensor) -> None:
        tokens = taps.tokens(values)
        means.add(key, criterion.function(tokens).double() * len(tokens), len(tokens))

    def by_example(key: tuple[Part, int], values: Tensor) -> None:
        sizes = values.float() if values.dim() == 3 else values.float().square().sum(dim=-1).sqrt()
        mask = taps.mask[..., None]
        pool = torch.where(mask, sizes, 0).sum(dim=1) / mask.sum(dim=1)
        pooled.setdefault(key, []).append(pool.cpu())

    def squares(key: tuple[Part, int], values: Tensor) -> None:
        tokens = taps.tokens(values).double().flatten(1)
        means.add(key, tokens.square().sum(dim=0), len(tokens))

    feeds: dict[str, Feed] = {"activations": tokenwise, "pooled": by_example, "norms": squares}
    return feeds[criterion.needs]


def _tap_activations(taps: Taps, part: Part, feed: Feed) -> None:
    def vectors(index: int, size: int, x: Tensor) -> None:
        feed(("heads", index), x.unflatten(-1, (-1, size)))

    for index, block in enumerate(anatomy_of(taps.model).blocks):
        if part == "neurons" and block.ffn_width:
            taps.on_input(block.get("ffn_out"), partial(feed, ("neurons", index)))
        elif part == "heads" and block.num_heads:
            taps.on_input(block.get("attention_out"), partial(vectors, index, block.head_size))
        elif part == "hidden":
            # what the matrices of a block read, which in every family is normalised
            reader = block.get("qkv" if block.family.qkv else "query")
            for module in (reader, block.get("ffn_in")):
                taps.on_input(module, partial(feed, ("hidden", 0)))


def _tap_blocks(taps: Taps, criterion: Criterion, means: _Means) -> None:
    def take(index: int, before: Tensor, after: Tensor) -> None:
        values = criterion.function(taps.tokens(before), taps.tokens(after))
        means.add(("layers", index), values.double().sum()[None], len(values))

    for index, module in enumerate(anatomy_of(taps.model).block_list):
        taps.on_block(module, partial(take, index))


def _tap_attention(taps: Taps, criterion: Criterion, means: _Means) -> None:
    causal = anatomy_of(taps.model).family.causal
    queries: dict[int, Tensor] = {}

    def keep(index: int, query: Tensor) -> None:
        queries[index] = query

    def finish(index: int, block: Block, key: Tensor) -> None:
        query, key = (t.unflatten(-1, (-1, block.head_size)).transpose(1, 2).float() for t in (queries.pop(index), key))
        scores = query @ key.transpose(-1, -2) * block.scaling
        allowed = taps.mask[:, None, None, :].expand(scores.shape)
        if causal:
            allowed = allowed.tril()
        # a query of padding may see nothing at all; it is not counted
        probabilities = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        summed = criterion.function(probabilities, taps.mask, causal=causal)
        means.add(("heads", index), summed[:, :-1].sum(dim=0), float(summed[:, -1].sum()))

    def fused(index: int, block: Block, output: Tensor) -> None:
        query, key, _ = output.chunk(3, dim=-1)
        keep(index, query)
        finish(index, block, key)

    for index, block in enumerate(anatomy_of(taps.model).blocks):
        if not block.num_heads:
            continue
        if block.family.qkv:
            taps.on_output(block.get("qkv"), partial(fused, index, block))
        else:
            taps.on_output(block.get("query"), partial(keep, index))
            taps.on_output(block.get("key"), partial(finish, index, block))


def _summed_columns(model: PreTrainedModel, criterion: Criterion, key: tuple[Part, int], norm: Tensor) -> Tensor:
    part, index = key
    block = anatomy_of(model).blocks[index]
    module = block.get("attention_out" if part == "heads" else "ffn_out")
    columns = criterion.function(weight_view(module).detach().cpu(), norm).double().sum(dim=0)
    return columns.unflatten(0, (-1, block.head_size)).sum(dim=-1) if part == "heads" else columns
