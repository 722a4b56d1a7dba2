"""PruningConfig: what it refuses, and that it survives JSON."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.targets import Target
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot

HALF = Target(sparsity=0.5)
SCHEDULES = [OneShot(), Iterative(), Gradual(), HardThresholding(), HardConcrete(), Movement(), GroupLasso()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_a_configuration_survives_json(schedule):
    config = PruningConfig(target=HALF, schedule=schedule, keep_at_least={"heads": 2})
    again = PruningConfig.model_validate_json(config.model_dump_json(exclude_none=True))
    assert again == config and type(again.schedule) is type(schedule)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(parts=()), "at least 1 item"),
        (dict(parts=("heads", "heads")), "named once each"),
        (dict(parts=("head",)), "Input should be 'heads'"),
        (dict(schedule={"kind": "cubic"}), "does not match any of the expected tags"),
        (dict(schedule={"kind": "iterative", "begin": 0.6, "end": 0.5}), "end must not come before begin"),
        (dict(schedule={"kind": "iterative", "rounds": 0}), "greater than or equal to 1"),
        (dict(schedule={"kind": "one_shot", "end": 0.5}), "Extra inputs are not permitted"),
        (
            dict(criterion="tailor"),
            "unknown criterion 'tailor'.*taylor_gates.*module:attribute",
        ),
        (dict(schedule=Movement(), criterion="l1"), "movement has its own scores: leave criterion out"),
        (dict(schedule=HardConcrete(), scores="training"), "leave scores out"),
        (dict(schedule=GroupLasso(), parts=("heads", "layers")), "groups of weights of heads and neurons only"),
        (dict(schedule=HardThresholding(), parts=("hidden",)), "groups of weights of heads and neurons only"),
        (
            dict(scores="training", criterion="l1"),
            "scores: training needs a criterion of .* such as taylor_gates, fisher, movement, got 'l1'",
        ),
        (dict(scores="training"), "must see some steps before the first pruning, got begin: 0"),
        (dict(criterion="apoz"), "apoz does not score heads; criteria for all of heads, neurons are .*l1"),
        (dict(criterion="movement", labels="self"), "movement needs the labels that are given"),
        (dict(criterion="movement", ranking="relative"), "those of movement have both signs: use another ranking"),
        (dict(repair="bias", parts=("layers",)), "repair re-fits what reads heads and neurons"),
        (dict(repair="bias", schedule=HardConcrete()), "hard_concrete has soft gates"),
        (dict(multiple_of=0), "greater than or equal to 1"),
        (dict(score_memory=0.0), "greater than 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        PruningConfig(target=HALF, **wrong)


def test_a_target_is_needed():
    with pytest.raises(ValidationError, match="target"):
        PruningConfig()


def test_schedules_that_need_no_training_are_known():
    assert [s.kind for s in SCHEDULES if not PruningConfig(target=HALF, schedule=s).trains] == ["one_shot", "iterative"]
