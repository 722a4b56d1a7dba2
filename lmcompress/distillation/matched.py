"""Matches prepared before training: layers, shapes and options checked, projections created."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.capture import Feature, Features, resolve, shape_of, stack_of
from lmcompress.distillation.config import Match
from lmcompress.distillation.layer_maps import nearest_in_order
from lmcompress.distillation.matches import MATCHES, MatchLoss, match_for
from lmcompress.distillation.matches.features import hidden_mse
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.step import Matched
from lmcompress.distillation.teachers import Answers, Teacher
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step


def matched(match: Match, number: int, student: PreTrainedModel, teacher: Teacher) -> Matched:
    """A match with its layers, projection and options resolved.

    Args:
        match: the configuration.
        number: number of the match: its term is named by the loss and this.
        student: not wrapped.
        teacher: the teacher that ``match.which`` names.

    Raises:
        LmcompressError: If a layer or an option does not exist, or the features of the two models cannot be compared.
    """
    loss = match_for(match.loss, match.on)
    name = f"{match.loss if match.loss in MATCHES else loss.name}_{number}"
    nearest = match.student == "nearest"
    if nearest and (loss.feature != "hidden" or loss.layers != 1):
        raise LmcompressError(
            f"student: nearest is for hidden states, one layer of each model; the match {loss.name!r} compares "
            f"{loss.layers} layer(s) of {loss.feature}: name its student layers"
        )
    # "nearest" stands for the first block until the first step chooses one
    wanted = (1,) if nearest else _layers(match.student), _layers(match.teacher)
    if {len(side) for side in wanted} != {loss.layers}:
        raise LmcompressError(
            f"the match {loss.name!r} takes {loss.layers} layer(s) of each model, got student {match.student} and "
            f"teacher {match.teacher}"
        )
    if loss.feature is None:
        raise LmcompressError(f"the match {loss.name!r} must say what it compares: on: scores or probabilities")
    mine = [resolve(student, loss.feature, layer) for layer in wanted[0]]
    theirs = [teacher.resolve(loss.feature, layer) for layer in wanted[1]]
    _check_stacks(student, teacher, mine, theirs, match, nearest=nearest)
    causal = _causal(student, mine[0])
    attention = loss.feature in ("scores", "probabilities")
    if attention and teacher.model is not None and _causal(teacher.model, theirs[0]) != causal:
        raise LmcompressError(
            f"the match {loss.name!r} compares attention, of which one looks ahead and the other does not: student and "
            "teacher must both be causal or neither; compare hidden states, queries, keys or values"
        )
    shapes = [shape_of(student, feature) for feature in mine], [teacher.shape_of(feature) for feature in theirs]
    blocks = range(1, len(anatomy_of(student).block_list) + 1)
    made = Matched(
        match,
        loss,
        name,
        (mine, theirs),
        causal=causal,
        projection=_projection(match, loss, shapes[0][0][-1], shapes[1][0][-1], number),
        nearest=[("hidden", layer) for layer in blocks] if nearest else (),
    )
    _try(made, *shapes)
    return made


def _causal(model: PreTrainedModel, feature: Feature) -> bool:
    """Whether attention of a layer looks at earlier tokens only."""
    return anatomy_of(model).causal or stack_of(model, feature[1]) > 0


def _check_stacks(
    student: PreTrainedModel,
    teacher: Teacher,
    mine: Sequence[Feature],
    theirs: Sequence[Feature],
    match: Match,
    *,
    nearest: bool,
) -> None:
    """Refuse to compare an encoder with a decoder."""
    stacks = {stack_of(student, layer) for _, layer in mine}
    if teacher.model is not None:
        stacks |= {stack_of(teacher.model, layer) for _, layer in theirs}
    if len(stacks) > 1 or (nearest and anatomy_of(student).reads_encoder):
        raise LmcompressError(
            f"a match must compare layers of two encoders, or of two decoders, got student {match.student} and teacher "
            f"{match.teacher}: name them encoder.i or decoder.i"
        )


def nearest_chooser(matches: Sequence[Matched]) -> Callable[[Step, Features, Sequence[Answers], Tensor], None] | None:
    """The function that chooses the layers of matches with ``student: nearest``, once per optimizer step.

    Args:
        matches: all matches of a method.

    Returns:
        A function to call with every micro-batch, or None if no match needs it.
    """
    choosing = [one for one in matches if one.nearest]
    chosen_at: float | None = None

    def choose(step: Step, student: Features, answers: Sequence[Answers], mask: Tensor) -> None:
        nonlocal chosen_at
        if chosen_at == step.progress:
            return
        chosen_at = step.progress
        # a method that has pruned blocks provides the remaining ones
        layers = list(step.shared.get("surviving_layers") or [layer for _, layer in choosing[0].nearest])
        for which in sorted({one.which for one in choosing}):
            group = [one for one in choosing if one.which == which]
            # of several matches with the same teacher layer the first decides for all
            first = {one.teacher[0]: one for one in reversed(group)}
            wanted = sorted(first)
            with torch.no_grad():
                distances = torch.stack(
                    [
                        _distances(first[feature], student, layers, answers[which].features[feature], mask)
                        for feature in wanted
                    ]
                )
            pairs = nearest_in_order(distances, layers, [layer for _, layer in wanted])
            chosen = {theirs: mine for mine, theirs in pairs}
            for one in group:
                one.student = [("hidden", chosen[one.teacher[0][1]])]

    return choose if choosing else None


def _distances(one: Matched, student: Features, layers: Sequence[int], teacher: Tensor, mask: Tensor) -> Tensor:
    """``(layers,)``: distance of the teacher's layer from each of the student's."""
    states = [student["hidden", layer] for layer in layers]
    if one.projection is not None:
        states = [one.projection(state) for state in states]
    return torch.stack([hidden_mse(state, teacher, mask).sum() for state in states])


def _layers(value: int | str | tuple[int | str, ...]) -> tuple[int | str, ...]:
    return value if isinstance(value, tuple) else (value,)


def _projection(match: Match, loss: MatchLoss, width: int, target: int, number: int) -> Projection | None:
    asked = match.projection not in ("none", "auto")
    if match.projection == "none" or not (loss.projectable or (loss.may_project and asked)):
        if asked:
            raise LmcompressError(f"the match {loss.name!r} takes no projection; leave it out")
        return None
    if match.projection == "auto":
        return Projection(width, target, "linear", seed=number) if width != target else None
    if match.student == "nearest" and width == target:
        # CoFi's: a random map would make the first choices of the nearest layer random
        return Projection(width, target, match.projection, initialisation="identity")
    return Projection(width, target, match.projection, seed=number)


def _try(one: Matched, mine: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> None:
    """Compare zeros of the right shapes, so that mismatched heads, widths and options show before training."""
    length = 2
    student, teacher = (
        {
            feature: torch.zeros(1, *(size or length for size in shape))
            for feature, shape in zip(side, shapes, strict=True)
        }
        for side, shapes in ((one.student, mine), (one.teacher, theirs))
    )
    layers = f"student layer {one.match.student}, teacher layer {one.match.teacher}"
    built_in = one.match.loss in MATCHES
    try:
        with torch.no_grad():
            sums = one.compare(student, teacher, torch.ones(1, length, dtype=torch.long))
    except Exception as error:
        if built_in and not isinstance(error, (LmcompressError, TypeError)):
            raise
        raise LmcompressError(f"the match {one.name} ({layers}) does not fit: {error}") from error
    if not isinstance(sums, Tensor) or sums.shape != (1,):
        got = tuple(sums.shape) if isinstance(sums, Tensor) else type(sums).__name__
        raise LmcompressError(
            f"the match {one.name} ({layers}) must give the sum of each example, shape (1,) for one, got {got}"
        )
