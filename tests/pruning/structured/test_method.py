"""Pruning without training, goals, and the coupled groups; the method's training runs are in test_pruning_trainer."""

from __future__ import annotations

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, FFN, HEADS, LAYERS, make, outputs
from families import inputs as model_inputs
from rich.console import Console

from lmcompress import CompressedModel, LmcompressError, anatomy_of
from lmcompress.checkpoint.structure import structure_of
from lmcompress.families import weight_view
from lmcompress.method import Step
from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, PruningConfig
from lmcompress.pruning.structured.costs import FlopCost, ModelSizes, ParameterCost, secant_costs
from lmcompress.pruning.structured.goals import (
    along_chains,
    choose,
    expected_costs,
    feasible,
    goal_of,
    partial_target,
)
from lmcompress.pruning.structured.groups import shrink_, silence_, unit_norms, unit_views
from lmcompress.pruning.structured.latency import LatencyTable
from lmcompress.pruning.structured.learned import expected_cost
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.order import RANKINGS
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.schedules.group_lasso import without_dead
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.targets import Shape, Target
from lmcompress.pruning.structured.units import Units, full, masked_structure
from lmcompress.schedules import Gradual, HardThresholding, Iterative, OneShot


def labelled(model, count=3):
    batches = []
    for seed in range(count):
        batch = model_inputs(model, rows=4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        batch["labels"] = torch.randint(0, 3, (4,), generator=generator)
        batches.append(batch)
    return batches


def block_parameters(model) -> int:
    return sum(p.numel() for p in anatomy_of(model).block_list.parameters())


TABLE = LatencyTable(
    machine="m",
    dtype="float32",
    batch_size=1,
    length=8,
    model_type="bert",
    hidden=16,
    head_size=4,
    heads=((0, 0.0), (1, 1.0), (2, 2.0), (3, 2.5), (4, 3.0)),
    ffn=((0, 0.0), (12, 1.0), (24, 3.0)),
    block_ms=0.5,
    base_ms=1.0,
)


# pruning without training


@pytest.mark.parametrize("criterion", ["taylor_gates", "l1", "random"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_one_shot_meets_the_target_and_the_cut_model_is_the_masked_one(family, criterion):
    model = make(family)
    dense = block_parameters(model)
    config = PruningConfig(target=Target(sparsity=0.5), criterion=criterion)
    report = prune(model, config, labelled(model))
    removed = 1 - block_parameters(model) / dense
    assert 0.5 <= removed < 0.53
    assert report.removed == pytest.approx(removed, abs=1e-6) and report.asked == 0.5
    assert report.masked_error < 1e-5
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize("repair", ["bias", "least_squares", "least_squares_in_order"])
def test_iterating_scores_anew_and_repairs_in_the_end(repair):
    model = make("bert")
    config = PruningConfig(target=Target(sparsity=0.4), schedule=Iterative(rounds=4), repair=repair)
    report = prune(model, config, labelled(model))
    assert 0.4 <= report.removed < 0.43
    assert report.repaired and all(one["error_after"] <= one["error_before"] + 1e-9 for one in report.repaired)
    json.dumps(report.to_dict())


def test_one_round_of_iterating_is_one_shot():
    models = [make("gpt2"), make("gpt2")]
    for model, schedule in zip(models, [OneShot(), Iterative(rounds=1)], strict=True):
        prune(model, PruningConfig(target=Target(sparsity=0.3), schedule=schedule), labelled(model))
    assert structure_of(models[0]) == structure_of(models[1])
    torch.testing.assert_close(outputs(models[0]), outputs(models[1]), rtol=0, atol=0)


def test_what_went_in_an_early_round_does_not_come_back():
    model = make("bert")
    sizes = ModelSizes.of(model)
    torch.manual_seed(0)
    gone = full(model, ["heads", "neurons"]).map(lambda mask: torch.rand(len(mask)) > 0.3)
    config = PruningConfig(target=Target(sparsity=0.6))
    scores = gone.map(lambda mask: torch.where(mask, torch.rand(len(mask)), torch.rand(len(mask)) + 5))
    for ranking in RANKINGS:
        mask = choose(config.model_copy(update={"ranking": ranking}), scores, sizes, config.target, gone=gone)
        for (_, _, new), (_, _, old) in zip(mask.items(), gone.items(), strict=True):
            # keep_at_least may hold one of a block that had lost everything
            assert int((new & ~old).sum()) <= int(not old.any())


def test_all_parts_at_once_and_a_shape():
    model = make("electra-projected")
    config = PruningConfig(
        target=Target(shape=Shape(layers=2, heads=2, ffn=8, hidden=12)),
        parts=("heads", "neurons", "layers", "hidden"),
        criterion="l2",
    )
    report = prune(model, config)
    structure = structure_of(model)
    assert [(b.heads, b.ffn) for b in structure.blocks] == [(2, 8), (2, 8)]
    assert report.coverage["unchanged"] is False and len(report.after.blocks) == 2


def test_a_shape_that_names_some_parts_leaves_the_others():
    model = make("bert")
    prune(model, PruningConfig(target=Target(shape=Shape(ffn=8)), criterion="l1"))
    assert {(b.heads, b.ffn) for b in structure_of(model).blocks} == {(HEADS, 8)}


def test_a_latency_target_is_met_by_its_table():
    model = make("bert")
    dense = TABLE.cost(structure_of(model))
    config = PruningConfig(target=Target(latency_share=0.6), criterion="l1")
    report = prune(model, config, cost=TABLE)
    assert TABLE.cost(structure_of(model)) <= 0.6 * dense
    assert report.unit == "ms"
    with pytest.raises(LmcompressError, match="latency_share must come with cost=.*got none"):
        prune(make("bert"), config)


def test_self_drawn_labels_need_none():
    model = make("bert", num_labels=1)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in labelled(model)]
    report = prune(model, PruningConfig(target=Target(sparsity=0.3), labels="self"), batches)
    assert report.removed >= 0.3


@pytest.mark.parametrize(
    "config, message",
    [
        (PruningConfig(target=Target(sparsity=0.5), schedule=Gradual()), "gradual needs training: use PruningTrainer"),
        (PruningConfig(target=Target(sparsity=0.99)), "no shape meets the target sparsity=0.99: the least"),
        (PruningConfig(target=Target(parameters=10**9)), "already meets the target parameters=1000000000"),
        (PruningConfig(target=Target(shape=Shape(heads=HEADS))), "already has the target shape"),
        (PruningConfig(target=Target(sparsity=0.5)), "must have at least one batch, got none"),
        (
            PruningConfig(target=Target(sparsity=0.5), criterion="l1", repair="bias"),
            "repair: bias needs calibration batches, got none",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model_as_it_was(config, message):
    model = make("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LmcompressError, match=message):
        prune(model, config)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_equal_scores_are_refused():
    model = make("bert")
    sizes = ModelSizes.of(model)
    equal = full(model, ["heads"], 0.5, torch.float32)
    with pytest.raises(LmcompressError, match="scores of heads must differ, all 12 are 0.5"):
        choose(PruningConfig(target=Target(sparsity=0.1), parts=("heads",)), equal, sizes, Target(sparsity=0.1))


def test_the_report_is_json_and_a_table(tmp_path):
    model = CompressedModel(make("bert"))
    report = prune(model, PruningConfig(target=Target(sparsity=0.5), criterion="l2", multiple_of=4))
    assert json.loads(json.dumps(report.to_dict()))["method"]["criterion"] == "l2"
    console = Console(width=100, record=True)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    assert "block 2" in text and "needs lmcompress to load" in text
    assert all(block.ffn % 4 == 0 for block in structure_of(model.model).blocks)
    model.save_pretrained(tmp_path / "saved")
    again = CompressedModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(outputs(again.model.eval()), outputs(model.model))


# goals


@pytest.mark.parametrize(
    "target",
    [
        Target(sparsity=0.6),
        Target(parameters=6000),
        Target(flops_share=0.4),
        Target(latency_share=0.5),
        Target(latency_ms=12.0),
        Target(shape=Shape(heads=2, ffn=9)),
        Target(shape=Shape(heads=(1, 2, 3), ffn=(4, 24, 9))),
    ],
    ids=lambda target: target.kind,
)
def test_the_way_to_a_target_is_cut_into_equal_pieces(target):
    model = make("bert")
    sizes = ModelSizes.of(model)
    cost = TABLE if "latency" in target.kind else None
    goal = goal_of(target, sizes, cost)
    config = PruningConfig(target=target)
    scores = full(model, ["heads", "neurons"], 1.0).map(lambda t: torch.rand(len(t)))
    assert partial_target(target, 1.0, sizes, goal) is target
    removed = []
    for share in (0.25, 0.5, 0.75, 1.0):
        part = partial_target(target, share, sizes, goal)
        mask = choose(config, scores, sizes, part, cost=cost)
        removed.append(goal.share_removed(masked_structure(sizes.structure, mask)) / goal.removed)
    assert removed == sorted(removed)
    for share, value in zip((0.25, 0.5, 0.75, 1.0), removed, strict=True):
        assert share - 0.15 <= value <= share + 0.2
    with pytest.raises(LmcompressError, match=r"must be in \(0, 1\], got 0"):
        partial_target(target, 0.0, sizes, goal)


def test_a_shape_with_layers_comes_last_in_one_piece():
    sizes = ModelSizes.of(make("bert"))
    target = Target(shape=Shape(layers=2, heads=(1, 2)))
    assert partial_target(target, 0.5, sizes, goal_of(target, sizes)) is None
    both = Target(shape=Shape(layers=2, ffn=12))
    assert partial_target(both, 0.5, sizes, goal_of(both, sizes)) == Target(shape=Shape(ffn=(18, 18, 18)))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_expected_costs_of_hard_gates_are_the_parameters_of_the_cut_blocks(family):
    model = make(family)
    sizes = ModelSizes.of(model)
    torch.manual_seed(1)
    mask = full(model, ["heads", "neurons", "attention", "ffn", "layers", "hidden"]).map(
        lambda tensor: torch.rand(len(tensor)) > 0.3
    )
    mask = mask.updated(layers=torch.tensor([True, False, True]))
    costs = expected_costs(sizes, ParameterCost(sizes))
    found = expected_cost(mask.map(lambda tensor: tensor.float()), costs, [HEADS] * LAYERS, [FFN] * LAYERS)
    cut(model, mask)
    assert float(found) == pytest.approx(block_parameters(model), rel=1e-6)


def test_slopes_of_other_costs_add_up_to_the_whole():
    sizes = ModelSizes.of(make("bert"))
    for cost in (FlopCost(sizes), TABLE):
        costs = expected_costs(sizes, cost)
        everything = float(expected_cost(Units(), costs, [HEADS] * LAYERS, [FFN] * LAYERS))
        outside = cost.cost(sizes.structure) - everything
        assert outside == pytest.approx(TABLE.base_ms if cost is TABLE else 0.0, abs=1e-3 * everything)
    slopes = secant_costs(sizes, TABLE, ("heads", "ffn", "layers"))
    assert slopes.heads[0].tolist() == pytest.approx([0.75] * 4)
    assert slopes.ffn.tolist() == pytest.approx([3.0] * 3)
    assert slopes.layers.tolist() == pytest.approx([6.5] * 3)


def test_probabilities_are_ranked_as_they_are_and_not_by_cost():
    model = make("bert")
    sizes = ModelSizes.of(model)
    scores = full(model, ["heads", "neurons"], 0.9, torch.float32)
    # heads cost much more than neurons; open ones must stay all the same
    scores = Units(
        heads=tuple(t - 0.001 * torch.arange(len(t)) for t in scores.heads),
        neurons=tuple(torch.where(torch.arange(FFN) < 12, 0.1, 0.99) + 0.0001 * torch.arange(FFN) for _ in range(3)),
    )
    half_of_neurons = 12 * 3 * (2 * 16 + 1) / block_parameters(model)
    mask = choose(
        PruningConfig(target=Target(sparsity=0.5)), scores, sizes, Target(sparsity=half_of_neurons - 1e-4),
        per_cost=False,
    )  # fmt: skip
    assert all(bool(t.all()) for t in mask.heads)
    assert all(t.tolist() == [False] * 12 + [True] * 12 for t in mask.neurons)


def test_units_count_with_what_they_lie_in():
    units = Units(
        heads=(torch.tensor([0.5, 1.0]),),
        neurons=(torch.tensor([0.5]),),
        attention=torch.tensor([0.5]),
        ffn=torch.tensor([0.2]),
        layers=torch.tensor([0.1]),
    )
    chained = along_chains(units)
    torch.testing.assert_close(chained.heads[0], torch.tensor([0.025, 0.05]))
    torch.testing.assert_close(chained.neurons[0], torch.tensor([0.01]))
    torch.testing.assert_close(chained.attention, torch.tensor([0.05]))
    torch.testing.assert_close(chained.ffn, torch.tensor([0.02]))


def test_the_shape_is_known_before_training():
    sizes = ModelSizes.of(make("bert"))
    planned = feasible(PruningConfig(target=Target(shape=Shape(ffn=8))), sizes)
    assert {block.ffn for block in planned.blocks} == {8}


# the plan of a run


def test_plans_end_at_the_target_and_in_order():
    for schedule in (
        OneShot(begin=0.2),
        Iterative(rounds=5),
        Gradual(every=7),
        HardThresholding(cycles=3),
        HardConcrete(),
    ):
        events = schedule.events(100)
        assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
        assert events[-1].share == 1.0
        steps = [event.step for event in events]
        assert steps == sorted(steps)
        shares = [event.share for event in events if event.share is not None]
        assert shares == sorted(shares)
    events = HardThresholding(begin=0.1, end=0.7, cycles=3).events(100)
    assert [event.share for event in events] == [1.0, None] * 3 + [1.0]


def test_a_run_too_short_for_its_schedule_is_refused():
    with pytest.raises(LmcompressError, match="8 rounds need at least 7 optimizer steps"):
        Iterative().events(6)
    with pytest.raises(LmcompressError, match="hard_concrete must have optimizer steps between begin and end, got 0"):
        HardConcrete(begin=0.5, end=0.5).events(10)


# coupled groups


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_silenced_units_are_those_that_a_cut_would_take(family, part):
    model = make(family)
    mask = full(model, [part]).map(lambda tensor: torch.arange(len(tensor)) % 3 != 1)
    silent = copy.deepcopy(model)
    silence_(silent, mask)
    cut(model, mask)
    torch.testing.assert_close(outputs(silent), outputs(model), rtol=1e-4, atol=1e-5)
    norms = unit_norms(silent, [part])
    for (_, _, kept), (_, _, norm) in zip(mask.items(), norms.items(), strict=True):
        assert torch.equal(norm > 0, kept)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_views_reach_every_weight_of_a_unit_once(family):
    model = make(family)
    for block in anatomy_of(model).blocks:
        for part, count, inner in (("heads", HEADS, 4), ("neurons", FFN, 1)):
            views = unit_views(block, part)
            assert {len(view) for view in views} == {count}
            width = weight_view(block.get("ffn_out")).shape[0]
            weights = (4 if part == "heads" else 2) * inner * width + (3 if part == "heads" else 1) * inner
            assert sum(view[0].numel() for view in views) == weights
    with pytest.raises(LmcompressError, match="must be of heads or neurons, got 'hidden'"):
        unit_views(block, "hidden")


def test_a_silenced_unit_stays_at_zero_through_momentum_and_weight_decay():
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    batch = labelled(model, 1)[0]

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step()
    mask = full(model, ["heads", "neurons"]).map(lambda tensor: torch.arange(len(tensor)) % 2 == 0)
    silence_(model, mask, optimizer=optimizer)
    for _ in range(3):
        step()
    for (_, _, kept), (_, _, norm) in zip(mask.items(), unit_norms(model, ["heads", "neurons"]).items(), strict=True):
        assert torch.equal(norm > 0, kept)


def test_a_unit_whose_readers_alone_are_silenced_comes_back():
    model = make("bert")
    mask = full(model, ["heads", "neurons"]).map(lambda tensor: torch.arange(len(tensor)) % 2 == 0)
    silence_(model, mask, ("out",))
    model(**labelled(model, 1)[0]).loss.backward()
    block = anatomy_of(model).blocks[0]
    gradient = weight_view(block.get("ffn_out")).grad_fn, block.get("ffn_out").weight.grad
    assert (gradient[1][:, 1].abs() > 0).any()


def test_shrinking_is_the_proximal_operator_on_every_group():
    model = make("distilbert")
    block = anatomy_of(model).blocks[1]
    before = [view.clone() for view in unit_views(block, "neurons")]
    norms = unit_norms(model, ["neurons"]).neurons[1]
    size = 2 * 16 + 1
    step = float(norms.median()) / size**0.5
    shrink_(model, ["neurons"], step)
    expected = (1 - step * size**0.5 / norms).clamp(min=0)
    for old, new in zip(before, unit_views(block, "neurons"), strict=True):
        torch.testing.assert_close(new, old * expected.reshape(-1, *(1,) * (old.dim() - 1)))
    after = unit_norms(model, ["neurons"]).neurons[1]
    assert 0 < int((after == 0).sum()) < FFN


def quantized_elsewhere():
    model = make("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return model


def test_a_model_quantized_by_another_library_is_refused_before_anything_is_scored():
    def batches():
        raise AssertionError("read")
        yield

    with pytest.raises(LmcompressError, match="quantized by another library"):
        prune(quantized_elsewhere(), PruningConfig(target=Target(sparsity=0.5)), batches())
    with pytest.raises(LmcompressError, match="quantized by another library"):
        StructuredPruning(PruningConfig(target=Target(sparsity=0.5))).attach(quantized_elsewhere(), torch.device("cpu"))


def test_a_latency_target_with_another_cost_is_refused():
    sizes = ModelSizes.of(make("bert"))
    with pytest.raises(LmcompressError, match="a LatencyTable measured on this machine, got FlopCost"):
        goal_of(Target(latency_ms=3.0), sizes, FlopCost(sizes))


def test_expected_parameters_outside_the_blocks_follow_the_stream():
    cost = ParameterCost(ModelSizes.of(make("bert")), "whole")
    narrow = make("bert")
    cut(narrow, full(narrow, ("hidden",)).map(lambda mask: torch.arange(len(mask)) < 11))
    blocks = sum(p.numel() for p in narrow.base_model.encoder.layer.parameters())
    assert float(cost.outside(torch.tensor(11.0))) == sum(p.numel() for p in narrow.parameters()) - blocks
    assert ParameterCost(cost.sizes).outside(11.0) == 0


def test_dead_groups_go_too_but_not_below_what_must_stay():
    mask = Units(neurons=(torch.tensor([True, True, True, False]),) * 2)
    alive = Units(neurons=(torch.tensor([True, True, False, True]), torch.tensor([True, False, False, True])))
    config = PruningConfig(target=Target(sparsity=0.5), schedule=GroupLasso(), keep_at_least={"neurons": 2})
    first, second = without_dead(mask, alive, config).neurons
    assert first.tolist() == [True, True, False, False] and torch.equal(second, mask.neurons[1])


@pytest.mark.parametrize("criterion", ["taylor_gates", "fisher"])
def test_running_scores_are_without_the_scale_of_float16_and_without_steps_that_overflow(criterion):
    config = PruningConfig(
        target=Target(sparsity=0.5), schedule=Iterative(begin=0.5), criterion=criterion, scores="training"
    )
    method = StructuredPruning(config)
    model = make("bert")
    method.attach(model, torch.device("cpu"))
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    accelerator = SimpleNamespace(scaler=scaler)
    method.run.trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(world_size=1))
    batch = model_inputs(model)
    step = Step(model, batch, batch, 0.0)
    scores = []
    for scale in (1.0, 1024.0, float("inf")):
        scaler.get_scale = partial(float, scale)
        method.before_forward(step)
        (model(**batch).logits.square().sum() * scale).backward()
        method.before_optimizer_step()
        scores.append(method.run.state.scores.clone())
    torch.testing.assert_close(scores[1], scores[0] * (1 + config.score_memory), rtol=1e-4, atol=1e-7)
    assert scores[0].any() and torch.equal(scores[2], scores[1])
