"""A method that no file of the package knows: one object, registered, and recipes plan it, train it and report it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from tiny_recipe import head
from transformers import AutoModelForSequenceClassification

from lmcompress.errors import LmcompressError
from lmcompress.method import SteppedMethod
from lmcompress.recipes import parse_recipe, plan, recipe_schema, register_part, run
from lmcompress.recipes.parts import PARTS
from lmcompress.recipes.parts.base import StagePart
from lmcompress.recipes.schema import unregister_part
from lmcompress.reporting import card_rows

TRAINING = "{max_steps: 3, per_device_train_batch_size: 8, learning_rate: 1e-2}"
RECIPE = f"""\
{head(layers=1)}  - {{name: dense, training: {TRAINING}}}
  - name: held
    start: dense
    clipping: {{limit: 0.01}}
    training: {TRAINING}
  - name: once
    start: dense
    clipping: {{limit: 0.02}}
    training: {{max_steps: 0}}
evaluation: {{repeats: 3, latency_batches: []}}
"""


class ClippingSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    limit: Annotated[float, Field(gt=0, description="Greatest absolute value of a weight.")]


@dataclass
class ClippingReport:
    limit: float
    clipped: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clip(model, limit) -> int:
    with torch.no_grad():
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        count = sum(int((weight.abs() > limit).sum()) for weight in weights)
        for weight in weights:
            weight.clamp_(-limit, limit)
    return count


class Clipping(SteppedMethod):
    name = "clipping"

    def __init__(self, limit: float) -> None:
        self.limit, self.clipped, self.report = limit, 0, None

    def prepare(self, trainer):
        self.model = trainer.model

    def after_optimizer_step(self):
        self.clipped += clip(self.model, self.limit)

    def finish(self):
        self.report = ClippingReport(self.limit, self.clipped)


class ClippingPart(StagePart[ClippingSpec]):
    key = "clipping"
    schema = Annotated[ClippingSpec | None, Field(description="Weights are kept within a limit.")]
    applied = "clipping"
    role = "clipped"
    verb = "clipped"

    def check(self, stage, spec):
        if stage.quantization is not None:
            raise ValueError("clipping and quantization cannot be in one stage: quantize in a stage after it")

    def plan(self, spec, work):
        if spec.limit > 1:
            raise LmcompressError(f"clipping.limit must be at most 1, got {spec.limit}")
        return spec

    def words(self, planned):
        return [f"clips weights to {planned.limit}"]

    def method(self, spec, work):
        return Clipping(spec.limit)

    def apply(self, spec, work):
        return ClippingReport(spec.limit, clip(work.model, spec.limit))

    def notes(self, report):
        return [f"weights are within {report['limit']}"]

    def columns(self, report):
        return {"limit": str(report["limit"])}


@pytest.fixture
def clipping():
    register_part(ClippingPart())
    yield
    unregister_part("clipping")


def test_a_method_of_ones_own_is_planned_trained_saved_and_reported(clipping, task_folder, tmp_path):
    recipe = parse_recipe(RECIPE.replace("DATA", str(task_folder)))
    planned = plan(recipe)
    assert [entry.role for entry in planned.stages] == ["model", "clipped", "clipped"]
    assert planned.stages[1].words == ("clips weights to 0.01",)
    result = run(recipe, tmp_path / "run", console=Console(quiet=True))
    rows = {row["name"]: row for row in result.report["rows"]}
    for name, limit in (("held", 0.01), ("once", 0.02)):
        model = AutoModelForSequenceClassification.from_pretrained(result.models[name])
        assert max(float(p.detach().abs().max()) for p in model.parameters() if p.dim() == 2) == pytest.approx(limit)
        config = json.loads((result.models[name] / "config.json").read_text())
        assert config["quantization_config"]["provenance"]["methods"] == ["clipping"]
        marker = json.loads((result.models[name] / "stage.json").read_text())
        assert marker["clipping"]["clipped"] > 0 and marker["clipping"] == rows[name]["clipping"]
        assert f"{name}: weights are within {limit}" in result.report["notes"]
    assert rows["dense"]["clipping"] is None
    assert [cells["limit"] for cells in card_rows(result.report)] == ["–", "0.01", "0.02"]
    again = run(recipe, tmp_path / "run", console=Console(quiet=True))
    assert [row["training"] for row in again.report["rows"]] == [row["training"] for row in result.report["rows"]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.held.clipping.limit=2", r"stage 'held': clipping\.limit must be at most 1"),
        ("stages.held.clipping.limt=1", r"clipping\.limt: unknown key; did you mean 'limit'"),
        ("stages.held.quantization={}", "clipping and quantization cannot be in one stage"),
    ],
)
def test_what_such_a_method_refuses_is_named_with_its_stage(clipping, task_folder, override, message):
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(RECIPE.replace("DATA", str(task_folder)), [override]))


def test_its_field_is_in_the_schema_while_it_is_registered(clipping):
    assert "clipping" in recipe_schema()["$defs"]["Stage"]["properties"]
    with pytest.raises(LmcompressError, match="a stage has a field 'clipping' already"):
        register_part(ClippingPart())
    unregister_part("clipping")
    assert "clipping" not in recipe_schema()["$defs"]["Stage"]["properties"]
    with pytest.raises(LmcompressError, match="clipping: unknown key"):
        parse_recipe(RECIPE)
    register_part(ClippingPart())


def test_every_part_says_what_it_is():
    assert len({part.key for part in PARTS}) == len({part.applied for part in PARTS}) == len(PARTS)
    properties = recipe_schema()["$defs"]["Stage"]["properties"]
    assert all(properties[part.key]["description"] and properties[part.key]["default"] is None for part in PARTS)
