"""compact.grouping: groups hold what least squares can hold, and shuffles fold away without a trace."""

import copy

import pytest
import torch
from compacting import batches
from families import make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress import LmcompressError
from lmcompress.checkpoint.cutting import keep_neurons
from lmcompress.families import anatomy_of, weight_view
from lmcompress.nn.grouped import GroupedLinear
from lmcompress.students import factorize, fold_shuffles, group, share_layers
from lmcompress.students.grouped import assign_channels, fit_groups


def orders(model):
    return [
        (name, side)
        for name, module in model.named_modules()
        if isinstance(module, GroupedLinear)
        for side in ("input_order", "output_order")
        if getattr(module, side) is not None
    ]


@given(seed=st.integers(0, 200), groups=st.sampled_from([2, 3, 4]), rows=st.integers(1, 3), columns=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_assigned_channels_are_permutations_that_hold_no_less_than_the_order_there_was(seed, groups, rows, columns):
    energy = torch.rand(groups * rows, groups * columns, generator=torch.Generator().manual_seed(seed))
    of_rows, of_columns = assign_channels(energy, groups)
    assert torch.equal(of_rows.sort().values, torch.arange(groups * rows))
    assert torch.equal(of_columns.sort().values, torch.arange(groups * columns))

    def held(matrix):
        blocks = matrix.reshape(groups, rows, groups, columns)
        return float(sum(blocks[j, :, j].sum() for j in range(groups)))

    assert held(energy[of_rows][:, of_columns]) >= held(energy) - 1e-5


def test_channels_that_belong_together_are_found():
    torch.manual_seed(0)
    blocks = torch.block_diag(*torch.rand(4, 6, 4).add(0.5)) + 0.01
    hidden = blocks[torch.randperm(24)][:, torch.randperm(16)]
    rows, columns = assign_channels(hidden, 4)
    inside = torch.block_diag(*torch.ones(4, 6, 4)).bool()
    assert hidden[rows][:, columns][inside].sum() > 0.6 * hidden.sum()


def test_the_fit_on_data_is_least_squares():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 8).double() @ torch.randn(8, 8).double(), torch.randn(6, 8).double()
    fitted = fit_groups(weight, torch.arange(6), torch.arange(8), 2, x.t() @ x / 300)
    for j in range(2):
        own = torch.linalg.lstsq(x[:, 4 * j : 4 * j + 4], x @ weight[3 * j : 3 * j + 3].t()).solution.t()
        torch.testing.assert_close(fitted[j], own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shuffle", ["none", "channel", "fitted"])
def test_every_family_has_a_quarter_of_its_matrices_left(family, shuffle):
    model = make(family)
    dense = {i: weight_view(b.get("ffn_out")).detach().clone() for i, b in enumerate(anatomy_of(model).blocks)}
    matrices = sum(
        p.numel() for n, p in anatomy_of(model).block_list.named_parameters() if p.dim() == 2 and "orm" not in n
    )
    report = group(model, 4, shuffle=shuffle)
    assert report.parameters[0] - report.parameters[1] == matrices * 3 // 4 and report.left == {}
    for i, block in enumerate(anatomy_of(model).blocks):
        got = block.get("ffn_out").matrix().detach()
        # what it keeps of the matrix, it keeps exactly
        assert ((got == 0) | (got == dense[i])).all() and (got != 0).float().mean() == 0.25
    assert outputs(model).isfinite().all()


def test_a_shuffle_that_is_fitted_loses_less_than_one_that_is_not():
    errors = {}
    for shuffle in ("none", "channel", "fitted"):
        report = group(make("bert"), 4, shuffle=shuffle, parts=["ffn_in", "ffn_out"])
        errors[shuffle] = sum(report.errors.values())
    assert errors["fitted"] < min(errors["none"], errors["channel"])


def test_data_gives_less_error_on_the_data():
    data = batches(make("bert"))
    model, other = make("bert"), make("bert")
    target = outputs(model)
    group(model, 2, shuffle="none", activations=data, parts=["ffn_in", "ffn_out"])
    group(other, 2, shuffle="none", parts=["ffn_in", "ffn_out"])
    assert (outputs(model) - target).norm() < (outputs(other) - target).norm()


def test_query_key_and_value_of_gpt2_are_grouped_one_by_one():
    model = make("gpt2")
    dense = weight_view(anatomy_of(model).blocks[0].get("qkv")).detach().clone()
    group(model, 4, shuffle="none", parts=["qkv"])
    got = anatomy_of(model).blocks[0].get("qkv").matrix()
    inside = torch.block_diag(*torch.ones(4, 4, 4)).repeat(3, 1).bool()
    assert torch.equal(got, torch.where(inside, dense, torch.zeros(())))


def test_of_a_channel_shuffle_only_those_matrices_have_one_that_write_the_stream(family):
    model = make(family)
    group(model, 4, shuffle="channel")
    fused = {"h.0.attn.c_attn", "h.1.attn.c_attn", "h.2.attn.c_attn"}
    assert len([one for one in orders(model) if one[1] == "input_order"]) == 6
    assert {name.partition("transformer.")[2] for name, side in orders(model) if side == "output_order"} <= fused


@pytest.mark.parametrize("parts", [["ffn_in"], ["ffn_out"], ["ffn_in", "ffn_out"]], ids="+".join)
def test_folding_changes_nothing_and_leaves_fewer_orders(family, parts):
    model = make(family).double()
    group(model, 2, parts=parts)
    before, there = outputs(model), len(orders(model))
    report = fold_shuffles(model)
    assert len(orders(model)) < there and set(report.changed.values()) == {"folded"}
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-9)
    assert report.parameters[0] == report.parameters[1]


def test_folding_reaches_into_factors(family):
    model = make(family).double()
    group(model, 2, parts=["ffn_in"], blocks=[0])
    group(model, 2, parts=["ffn_out"], blocks=[1])
    factorize(model, rank=3, parts=["ffn_out"], blocks=[0])
    factorize(model, rank=3, parts=["ffn_in"], blocks=[1])
    before = outputs(model)
    assert len(fold_shuffles(model).changed) == 2
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-9)


def test_values_fold_only_where_channels_stay_in_their_heads():
    model = make("bert").double()
    group(model, 2, parts=["attention_out"], blocks=[0])
    group(model, 2, parts=["attention_out"], blocks=[1])
    blocks = anatomy_of(model).blocks
    with torch.no_grad():
        within = torch.cat([head * 4 + torch.randperm(4) for head in range(4)])
        blocks[0].get("attention_out").input_order.copy_(within)
        blocks[1].get("attention_out").input_order.copy_(torch.arange(16).roll(2))
    before = outputs(model)
    report = fold_shuffles(model)
    assert "encoder.layer.0.attention.output.dense.input_order" in report.changed
    assert report.left["encoder.layer.1.attention.output.dense.input_order"] == "it takes channels out of their heads"
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-9)


def test_a_shuffle_that_two_grouped_matrices_need_stays():
    model = make("bert")
    group(model, 4, shuffle="channel", parts=["ffn_in", "ffn_out"])
    again = copy.deepcopy(model)
    with pytest.raises(LmcompressError, match="an order of channels that can be folded.*both matrices are grouped"):
        fold_shuffles(again)
    assert orders(again) == orders(model)


def test_there_must_be_something_to_fold():
    with pytest.raises(LmcompressError, match="got none; no matrix is shuffled"):
        fold_shuffles(make("bert"))
    model = make("bert")
    group(model, 2)
    share_layers(model)
    with pytest.raises(LmcompressError, match="blocks share their parameters: fold before sharing"):
        fold_shuffles(model)


def test_bad_input_is_refused():
    model = make("bert")
    with pytest.raises(LmcompressError, match="query: groups must divide the widths 16 and 16, got 3; these do: 2, 4"):
        group(model, 3)
    with pytest.raises(LmcompressError, match="groups must be at least 2, got 1"):
        group(model, 1)
    with pytest.raises(LmcompressError, match="unknown shuffle 'chanel'; did you mean 'channel'"):
        group(model, 2, shuffle="chanel")
    keep_neurons(anatomy_of(model).blocks[1], range(5))
    with pytest.raises(LmcompressError, match="1.intermediate.dense: groups must divide the widths 16 and 5, got 2"):
        group(model, 2)
    assert not any(isinstance(module, GroupedLinear) for module in model.modules())
    with pytest.raises(LmcompressError, match="c_attn: groups must divide the widths 16 and 16, got 6"):
        group(make("gpt2"), 6, parts=["qkv"])


def test_weights_that_are_not_finite_leave_the_model_as_it_was():
    model = make("bert")
    with torch.no_grad():
        weight_view(anatomy_of(model).blocks[1].get("ffn_out"))[0, 0] = float("nan")
    with pytest.raises(LmcompressError, match=r"layer\.1\.output\.dense must be finite to be grouped"):
        group(model, 2)
    assert not any(isinstance(module, GroupedLinear) for module in model.modules())
