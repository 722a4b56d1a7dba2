"""Uniform pruning: every block as many units, each its own best ones, in a shape that stock Transformers loads."""

from __future__ import annotations

import pytest
import torch
from decoders import MODERN
from families import FFN, make
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from training import tiny_arguments
from transformers import AutoModelForCausalLM

from lmcompress import CompressedModel, LmcompressError
from lmcompress.checkpoint.saving import outputs_of
from lmcompress.checkpoint.structure import structure_of, why_not_vanilla
from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.costs import ModelSizes
from lmcompress.pruning.structured.goals import feasible
from lmcompress.pruning.structured.order import RANKINGS
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.ranking import select
from lmcompress.pruning.structured.targets import Shape, Target
from lmcompress.pruning.structured.units import full, masked_structure
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot
from lmcompress.trainers import PruningTrainer

MODELS = {"llama": MODERN["llama"](), "bert": make("bert"), "gpt2": make("gpt2", "language")}
SIZES = {name: ModelSizes.of(model) for name, model in MODELS.items()}
PARTS = {
    "llama": [("heads", "neurons"), ("neurons", "layers"), ("heads", "neurons", "layers", "hidden")],
    "bert": [("neurons",), ("neurons", "layers"), ("heads", "neurons", "hidden")],
    "gpt2": [("neurons", "layers"), ("heads", "neurons", "layers", "hidden")],
}


def scores_of(name, parts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units = full(MODELS[name], parts, 0.0, torch.float32)
    return units.map(lambda tensor: torch.rand(len(tensor), generator=generator) + 0.01)


@given(
    case=st.sampled_from([(name, parts) for name, choices in PARTS.items() for parts in choices]),
    wanted=st.floats(0.02, 0.2),
    ranking=st.sampled_from(RANKINGS),
    multiple_of=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_a_stock_config_expresses_the_shape_and_the_target_is_met(case, wanted, ranking, multiple_of, seed):
    name, parts = case
    sizes, scores = SIZES[name], scores_of(name, parts, seed)
    target = Target(sparsity=wanted)
    mask = select(scores, sizes, target, ranking=ranking, multiple_of=multiple_of, uniform=True)
    structure = masked_structure(sizes.structure, mask)
    assert why_not_vanilla(structure, sizes.config) is None
    parameters = [
        sum(sizes.block_parameters(b, sizes.width(s)) for b in s.blocks) for s in (sizes.structure, structure)
    ]
    assert parameters[1] <= (1 - wanted) * parameters[0] * (1 + 1e-9)
    assert {block.ffn % multiple_of for block in structure.blocks} == {0}
    assert sizes.width(structure) % multiple_of == 0
    # each block keeps its own best
    for (part, _, kept), (_, _, tensor) in zip(mask.items(), scores.items(), strict=True):
        if part == "neurons" and not bool(kept.all()) and multiple_of == 1:
            assert float(tensor[kept].min()) >= float(tensor[~kept].max())


def test_blocks_choose_different_units():
    scores = scores_of("llama", ("neurons",))
    mask = select(scores, SIZES["llama"], Target(sparsity=0.2), uniform=True)
    assert len({tuple(kept.tolist()) for kept in mask.neurons}) > 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_the_cut_model_is_saved_as_vanilla_and_computes_the_same_in_stock_transformers(name, tmp_path):
    model = MODERN[name]().eval()
    ids = {"input_ids": torch.arange(12).view(2, 6) + 2}
    config = PruningConfig(
        target=Target(sparsity=0.3), parts=("heads", "neurons", "layers"), criterion="l1", schedule=Iterative(rounds=2),
        uniform=True, round_to=8,
    )  # fmt: skip
    report = prune(model, config)
    assert report.stock == {"loads": True, "reason": None, "nearest": report.stock["nearest"]}
    compressed = CompressedModel(model)
    assert compressed.why_not_vanilla() is None
    compressed.save_pretrained(tmp_path / "small", format="vanilla")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(stock) is type(model) and "quantization_config" not in (tmp_path / "small/config.json").read_text()
    assert torch.equal(*(outputs_of(one, [ids])[0] for one in (stock, model)))


@pytest.mark.parametrize(
    "schedule",
    [
        OneShot(begin=0.25), Gradual(every=2), HardThresholding(begin=0.1, end=0.7, cycles=2),
        HardConcrete(learning_rate=0.3, multiplier_learning_rate=0.3), Movement(learning_rate=0.3),
        GroupLasso(penalty=20.0),
    ],
    ids=lambda schedule: schedule.kind,
)  # fmt: skip
def test_every_schedule_ends_in_a_stock_shape(schedule, tmp_path):
    rows = [{"input_ids": torch.arange(8) + 2 + n % 5, "labels": torch.arange(8) + 2 + n % 5} for n in range(16)]
    student = MODERN["llama"]()
    config = PruningConfig(target=Target(sparsity=0.4), schedule=schedule, uniform=True, calibration_rows=8)
    trainer = PruningTrainer(student, tiny_arguments(tmp_path, max_steps=8), pruning=config, train_dataset=rows)
    trainer.train()
    trainer.finish()
    assert why_not_vanilla(structure_of(student), student.config) is None
    assert trainer.report.removed >= 0.4 - 1e-6


def test_round_to_is_another_name_of_multiple_of():
    config = PruningConfig(target=Target(sparsity=0.3), round_to=8)
    assert config.multiple_of == 8
    with pytest.raises(ValidationError, match="round_to is another name of multiple_of, got both"):
        PruningConfig(target=Target(sparsity=0.3), round_to=8, multiple_of=8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": ("neurons", "ffn")}, "uniform blocks have both sub-layers, got parts with ffn"),
        ({"order": "cost"}, "uniform cuts all blocks at once, got order: cost"),
    ],
)
def test_a_config_that_cannot_be_uniform_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        PruningConfig(target=Target(sparsity=0.3), uniform=True, criterion="l1", **settings)


def test_what_no_stock_config_expresses_is_refused_before_training():
    heads = PruningConfig(target=Target(sparsity=0.1), parts=("heads",), uniform=True)
    with pytest.raises(LmcompressError, match="uniform shape that meets the target has a stock config: bert derives"):
        feasible(heads, SIZES["bert"])
    uneven = Target(shape=Shape(ffn=(FFN, FFN - 8, FFN)))
    with pytest.raises(LmcompressError, match="needs a target that a stock config can express: a stock llama has one"):
        feasible(PruningConfig(target=uneven, parts=("neurons",), uniform=True), SIZES["llama"])


def test_blocks_that_differ_already_are_refused():
    model = MODERN["llama"]()
    prune(model, PruningConfig(target=Target(shape=Shape(ffn=(24, 16, 24))), parts=("neurons",), criterion="l1"))
    with pytest.raises(LmcompressError, match="uniform needs blocks that are alike to begin with"):
        prune(model, PruningConfig(target=Target(sparsity=0.3), criterion="l1", uniform=True))
