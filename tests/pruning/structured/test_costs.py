"""Costs: analytic ones against models that were really cut, measured ones against themselves."""

import json

import pytest
import torch
from families import FFN, HEADS, HIDDEN, LAYERS, inputs, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.pruning.structured.costs import EnergyCost, FlopCost, ModelSizes, ParameterCost
from lmcompress.pruning.structured.latency import LatencyTable, measure_latency
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.units import PARTS, full, masked_structure


def some_mask(model, parts, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    mask = full(model, parts).map(lambda t: torch.rand(len(t), generator=generator) > share)
    for part in ("layers", "hidden"):
        for tensor in mask.tensors(part):
            tensor[0] = True
    return mask


def table(**changes):
    values = dict(
        machine="here", dtype="float32", batch_size=1, length=8, model_type="bert", hidden=16, head_size=4,
        heads=((0, 0.0), (2, 1.0), (4, 1.5)), ffn=((0, 0.0), (24, 2.4)), block_ms=0.1, base_ms=3.0,
    )  # fmt: skip
    return LatencyTable(**{**values, **changes})


@pytest.mark.parametrize("head", ["base", "classification", "tokens", "language"])
@pytest.mark.parametrize("parts", [(part,) for part in PARTS] + [PARTS], ids="+".join)
def test_parameters_are_those_of_the_model_that_was_cut(family, head, parts):
    model = make(family, head)
    sizes, mask = ModelSizes.of(model), some_mask(model, parts)
    predicted = masked_structure(sizes.structure, mask)
    assert ParameterCost(sizes, "whole").cost(sizes.structure) == sum(p.numel() for p in model.parameters())
    cut(model, mask)
    blocks = sum(p.numel() for p in anatomy_of(model).block_list.parameters())
    assert ParameterCost(sizes).cost(predicted) == blocks
    assert ParameterCost(sizes, "whole").cost(predicted) == sum(p.numel() for p in model.parameters())


def test_sizes_of_a_model_that_was_cut_are_its_own(family):
    model = make(family)
    cut(model, some_mask(model, PARTS))
    sizes = ModelSizes.of(model)
    assert ParameterCost(sizes, "whole").cost(structure_of(model)) == sum(p.numel() for p in model.parameters())


def test_flops_are_those_that_torch_counts(family):
    model = make(family, "base", attn_implementation="eager")
    sizes = ModelSizes.of(model)
    batch = {"input_ids": inputs(model, rows=2, length=7)["input_ids"]}

    def counted():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        return counter.get_total_flops()

    dense = counted()
    cut(model, some_mask(model, ("heads", "neurons")))
    predicted = [FlopCost(sizes, 2, 7).cost(s) for s in (sizes.structure, structure_of(model))]
    # what lies outside the blocks (a pooler, a projection of embeddings) is the same in both
    assert dense - counted() == predicted[0] - predicted[1]
    assert 0 <= dense - predicted[0] <= 0.2 * dense


@given(heads=st.integers(0, HEADS - 1), ffn=st.integers(0, FFN - 1))
@settings(deadline=None, max_examples=20)
def test_more_units_never_cost_less(heads, ffn):
    sizes = ModelSizes.of(make("bert"))

    def shape(heads, ffn):
        return Structure(head_size=4, blocks=(BlockShape(heads=heads, ffn=ffn),) * 2)

    for cost in (ParameterCost(sizes), FlopCost(sizes, 1, 8), EnergyCost(sizes, 1, 8), table()):
        assert cost.cost(shape(heads, ffn)) <= min(cost.cost(shape(heads + 1, ffn)), cost.cost(shape(heads, ffn + 1)))


def test_energy_of_few_tokens_is_that_of_reading_weights():
    sizes = ModelSizes.of(make("bert"))
    dense, halved = (
        Structure(head_size=4, blocks=(BlockShape(heads=HEADS, ffn=ffn),) * LAYERS) for ffn in (FFN, FFN // 2)
    )
    saved = [EnergyCost(sizes, rows, 8).cost(dense) - EnergyCost(sizes, rows, 8).cost(halved) for rows in (1, 1000)]
    weights = LAYERS * HIDDEN * FFN * (200 + 6)
    # one row: most of what is saved is DRAM traffic; a thousand: it is arithmetic
    assert weights / saved[0] > 0.7 > 0.1 > weights / saved[1]


def test_a_table_interpolates_between_what_was_measured():
    blocks = (BlockShape(heads=3, ffn=12), BlockShape(heads=0, ffn=0))
    assert table().cost(Structure(head_size=4, blocks=blocks)) == pytest.approx(3.0 + 2 * 0.1 + 1.25 + 1.2)


def test_a_table_refuses_other_widths():
    blocks = (BlockShape(heads=3, ffn=12),)
    with pytest.raises(LmcompressError, match="of hidden size 16 with heads of 4, got 12 with 4.*flops_share"):
        table().cost(Structure(head_size=4, blocks=blocks, hidden=12))
    with pytest.raises(LmcompressError, match="goes up to 4 heads, got 5"):
        table().cost(Structure(head_size=4, blocks=(BlockShape(heads=5, ffn=1),)))


@pytest.mark.parametrize("changes", [{"heads": ((0, 0.0), (2, 1.0), (4, 0.5))}, {"ffn": ((1, 0.0), (4, 0.5))}])
def test_a_table_must_ascend(changes):
    with pytest.raises(ValueError, match="counts must ascend from 0, and times never fall"):
        table(**changes)


@pytest.mark.parametrize("of", ["bert", "distilbert", "gpt2"])
def test_a_measured_table_gives_the_dense_time_and_comes_back_from_its_file(of, tmp_path):
    model = make(of)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measured = measure_latency(model, batch_size=2, length=8, points=2, copies=2, repeats=3, warmup=1)
    structure = structure_of(model)
    assert [h for h, _ in measured.heads] == [0, 1, HEADS] and [f for f, _ in measured.ffn] == [0, 1, FFN]
    assert measured.cost(structure) > 0 and model.config.num_hidden_layers == LAYERS
    assert len(anatomy_of(model).blocks) == LAYERS
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    file = tmp_path / "tables" / "latency.json"
    measured.save(file)
    table().save(file)
    assert LatencyTable.load(file, model, batch_size=2, length=8) == measured
    assert len(json.loads(file.read_text())["tables"]) == 2
    with pytest.raises(LmcompressError, match=r"must have a latency table for .*4x8.*it has: .*measure_latency"):
        LatencyTable.load(file, model, batch_size=4, length=8)


def test_measuring_refuses_a_model_that_was_cut():
    model = make("bert")
    cut(model, some_mask(model, ("neurons",)))
    with pytest.raises(LmcompressError, match="a model with equal blocks, got heads .4. and FFN widths"):
        measure_latency(model, length=8)
    with pytest.raises(LmcompressError, match="points must be >= 2 and copies >= 1, got 1 and 4"):
        measure_latency(make("bert"), length=8, points=1)


@pytest.mark.parametrize(
    "content, message",
    [
        ("nonsense", "must be a file of latency tables, it is not"),
        ('{"tables": {}}', "it is not: KeyError"),
        ('{"format_version": 7, "tables": {}}', "must have format version 1, got 7"),
        ('{"format_version": 1, "tables": {"a": {}}}', "has a damaged latency table: Field required"),
    ],
)
def test_a_file_that_is_not_one_of_tables_is_refused(tmp_path, content, message):
    file = tmp_path / "latency.json"
    file.write_text(content)
    with pytest.raises(LmcompressError, match=message):
        LatencyTable.load(file, make("bert"), batch_size=1, length=8)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="No such file"):
        LatencyTable.load(tmp_path / "none.json", make("bert"), batch_size=1, length=8)
