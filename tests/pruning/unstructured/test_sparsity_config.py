"""What a configuration refuses, and what it fills in."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lmcompress.pruning.unstructured import (
    Blocks,
    Gradual,
    HardThresholding,
    NOfM,
    SparsityConfig,
    SparsityRule,
    Surgery,
)

REFUSED = {
    "nothing": ({}, "must give the share to prune, got none"),
    "all": ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
    "less": ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
    "nan": ({"sparsity": float("nan")}, "Input should be a finite number"),
    "both": ({"sparsity": 0.5, "quality": 1.0}, "either sparsity or quality"),
    "rule-all": ({"rules": [{"modules": "a", "sparsity": 1}]}, r"sparsity must be in \[0, 1\)"),
    "rule-both": ({"rules": [{"modules": "a", "sparsity": 0.5, "quality": 1}]}, "got both for 'a'"),
    "criterion": ({"sparsity": 0.5, "criterion": "magnitud"}, "'magnitud'; did you mean 'magnitude'.*module:attribute"),
    "n-of-m": ({"sparsity": 0.5, "pattern": NOfM()}, "the pattern 2:4 determines how many weights are kept"),
    "quality-criterion": ({"quality": 1.0, "criterion": "obd"}, "quality is a threshold of single magnitudes"),
    "quality-blocks": ({"quality": 1.0, "pattern": Blocks()}, "quality is a threshold of single magnitudes"),
    "quality-global": ({"quality": 1.0, "scope": "global"}, "quality is a threshold of each matrix"),
    "quality-negative": ({"quality": -1.0}, "quality must be > 0 except with the schedule surgery, got -1.0"),
    "surgery-criterion": ({"sparsity": 0.5, "schedule": Surgery(), "criterion": "obd"}, "surgery ranks by magnitude"),
    "surgery-pattern": ({"pattern": NOfM(), "schedule": Surgery()}, "surgery ranks single weights"),
    "surgery-frozen": ({"sparsity": 0.5, "schedule": Surgery(), "train_removed": False}, "could be reactivated"),
    "iht-movement": (
        {"sparsity": 0.5, "schedule": HardThresholding(), "criterion": "movement"},
        "movement is a sum over all earlier steps",
    ),
    "iht": ({"sparsity": 0.5, "schedule": HardThresholding(), "train_removed": True}, "restarts reactivated weights"),
    "tracked": ({"sparsity": 0.5, "criterion": "taylor", "train_removed": True}, "train_removed goes with magnitude"),
    "rows": ({"pattern": NOfM(), "scope": "row"}, "scope row needs single weights"),
    "compensation": ({"sparsity": 0.5, "compensation": True, "schedule": Gradual()}, "or iterative, got gradual"),
    "sparsegpt": ({"sparsity": 0.5, "criterion": "sparsegpt"}, "set compensation to true"),
    "compensated-quality": ({"quality": 1.0, "compensation": True}, "needs sparsity or a pattern"),
    "unknown": ({"sparsity": 0.5, "sparsty": 1}, "Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_together_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        SparsityConfig(**given)


def test_what_is_removed_is_trained_where_the_papers_do_so():
    assert SparsityConfig(sparsity=0.5, schedule=Surgery()).removed_is_trained
    assert SparsityConfig(sparsity=0.5, schedule=Gradual(), criterion="movement").removed_is_trained
    assert not SparsityConfig(sparsity=0.5, schedule=Gradual()).removed_is_trained
    assert not SparsityConfig(sparsity=0.5, schedule=HardThresholding()).removed_is_trained
    assert not SparsityConfig(pattern=NOfM()).trains and SparsityConfig(sparsity=0.1, schedule=Surgery()).trains


def test_a_configuration_survives_json():
    config = SparsityConfig(
        rules=(SparsityRule(modules="*", quality=0.7),), schedule=Surgery(gamma=1e-3), pattern={"kind": "unstructured"}
    )
    assert SparsityConfig.model_validate_json(config.model_dump_json()) == config
