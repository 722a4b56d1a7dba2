"""layers: each module computes what the matrix that it stands for computes, and costs what the papers say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmcompress import CheckpointError, LmcompressError
from lmcompress.nn.embedding import FactorizedEmbedding, FactorizedHead
from lmcompress.nn.grouped import GroupedLinear, channel_shuffle
from lmcompress.nn.low_rank import LowRankLinear
from lmcompress.nn.separable import SeparableMixing


def shuffled(groups=4, into=8, out=12, **options):
    module = GroupedLinear(into, out, groups, input_order=True, output_order=True, **options)
    module.input_order.copy_(torch.randperm(into))
    module.output_order.copy_(torch.randperm(out))
    return module


def mixing(kernel=3, causal=False, into=6, channels=8):
    module = SeparableMixing(nn.Linear(into, channels), into, channels, kernel, causal)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("make", [lambda: LowRankLinear(8, 12, 3), shuffled], ids=["low rank", "grouped"])
def test_a_linear_layer_computes_with_the_matrix_that_it_stands_for(make):
    module, x = make(), torch.randn(2, 5, 8)
    nn.init.normal_(module.bias)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.matrix(), module.bias))
    assert copy.deepcopy(module)(x).equal(module(x))


def test_gradients_reach_the_factors_as_they_reach_the_matrix():
    module, x = shuffled(), torch.randn(3, 8)
    module(x).square().sum().backward()
    got = module.weight.grad.clone()
    module.weight.grad = None
    nn.functional.linear(x, module.matrix(), module.bias).square().sum().backward()
    torch.testing.assert_close(got, module.weight.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_numbers_and_products_are_the_formulas(bias):
    low, grouped = LowRankLinear(8, 12, 3, bias), GroupedLinear(8, 12, 4, bias)
    assert sum(p.numel() for p in low.parameters()) == 3 * (8 + 12) + 12 * bias and low.macs == 3 * (8 + 12)
    assert sum(p.numel() for p in grouped.parameters()) == 8 * 12 // 4 + 12 * bias and grouped.macs == 8 * 12 // 4


@given(cardinality=st.sampled_from([1, 2, 4, 8, 32]), width=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_a_grouped_layer_is_resnexts_sum_of_paths(cardinality, width):
    # y = sum of T_i(x), each path reading and writing d channels: C * d * d numbers
    channels = cardinality * width
    module = GroupedLinear(channels, channels, cardinality, bias=False)
    assert module.macs == cardinality * width * width == channels**2 // cardinality
    x = torch.randn(channels)
    paths = [torch.zeros(channels) for _ in range(cardinality)]
    for i, path in enumerate(paths):
        path[i * width : (i + 1) * width] = module.weight[i] @ x[i * width : (i + 1) * width]
    torch.testing.assert_close(module(x), sum(paths))


def test_shufflenets_unit_costs_what_the_paper_says():
    # hw(2cm/g + 9m): two grouped pointwise layers, and a depthwise 3x3 of m channels that is no matmul of ours
    c, m, g = 240, 60, 3
    pointwise = GroupedLinear(c, m, g).macs + GroupedLinear(m, c, g).macs
    assert pointwise == 2 * c * m // g


@given(groups=st.integers(1, 8), size=st.integers(1, 8))
def test_a_channel_shuffle_is_a_permutation_that_another_undoes(groups, size):
    order, back = channel_shuffle(groups * size, groups), channel_shuffle(groups * size, size)
    assert torch.equal(order[back], torch.arange(groups * size))


def test_a_channel_shuffle_is_shufflenets_reshape_and_lets_every_group_read_all():
    x = torch.arange(16)
    stock = nn.ChannelShuffle(4)(x.view(1, 16, 1, 1)).flatten()
    assert torch.equal(x[channel_shuffle(16, 4)], stock)
    assert [set((part // 4).tolist()) for part in stock.chunk(4)] == [{0, 1, 2, 3}] * 4


def test_two_grouped_layers_mix_all_channels_only_with_a_shuffle_between():
    first, second = GroupedLinear(16, 16, 4), GroupedLinear(16, 16, 4)
    ordered = GroupedLinear(16, 16, 4, input_order=True)
    ordered.input_order.copy_(channel_shuffle(16, 4))
    with torch.no_grad():
        for module in (first, second, ordered):
            module.weight.fill_(1.0)
    assert (second.matrix() @ first.matrix() > 0).float().mean() == 1 / 4
    assert (ordered.matrix() @ first.matrix() > 0).all()


def test_factorised_embeddings_are_rows_of_their_matrix_and_their_head_is_its_transpose():
    module = FactorizedEmbedding(20, 8, 3, padding_idx=1)
    ids, x = torch.randint(0, 20, (2, 5)), torch.randn(2, 5, 8)
    torch.testing.assert_close(module(ids), module.matrix()[ids])
    head = FactorizedHead(module, nn.Parameter(torch.randn(20)))
    torch.testing.assert_close(head(x), nn.functional.linear(x, module.matrix(), head.bias))
    assert list(head.state_dict()) == ["bias"] and not module(torch.tensor([1])).any()
    assert head.macs == 3 * (8 + 20) and module.macs == 3 * 8


@pytest.mark.parametrize("causal", [False, True])
def test_mixing_is_a_sum_over_neighbours(causal):
    module, x = mixing(3, causal), torch.randn(2, 7, 6)
    values = module.pointwise(x).detach()
    expected = module.bias.detach().expand(2, 7, 8).clone()
    for t in range(7):
        for j in range(3):
            place = t + j - (2 if causal else 1)
            if 0 <= place < 7:
                expected[:, t] += module.weight[:, 0, j].detach() * values[:, place]
    torch.testing.assert_close(module(x).detach(), expected)


def test_padding_does_not_reach_real_positions():
    module, x = mixing(5), torch.randn(2, 9, 6)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    alone = module(x[1:, :4])
    torch.testing.assert_close(module(x, valid)[1:, :4], alone)


def test_causal_mixing_does_not_see_what_comes_and_needs_only_its_reach_of_what_was():
    module, x = mixing(4, causal=True), torch.randn(1, 9, 6)
    changed = x.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(module(x)[:, :5], module(changed)[:, :5])
    values = module.values(x)
    torch.testing.assert_close(module.mix(values, length=2), module(x)[:, -2:])
    torch.testing.assert_close(module.mix(values[:, -5:], length=2), module(x)[:, -2:])


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_no_matrix_has_is_refused(rank):
    with pytest.raises(LmcompressError, match=f"rank of a 12×8 matrix must be 1 to 8, got {rank}"):
        LowRankLinear(8, 12, rank)
    with pytest.raises(LmcompressError, match=f"rank of a 20×8 table must be 1 to 8, got {rank}"):
        FactorizedEmbedding(20, 8, rank)


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(LmcompressError, match="must divide the widths 8 and 12, got 3; these do: 2, 4"):
        GroupedLinear(8, 12, 3)
    with pytest.raises(LmcompressError, match="must divide the widths 5 and 7, got 5; no number above 1 does"):
        GroupedLinear(5, 7, 5)
    with pytest.raises(LmcompressError, match="got 0"):
        channel_shuffle(8, 0)


@pytest.mark.parametrize(("kernel", "causal"), [(0, True), (2, False), (0, False), (-1, False)])
def test_a_kernel_that_cannot_be_laid_on_a_position_is_refused(kernel, causal):
    with pytest.raises(LmcompressError, match=f"kernel must be .*got {kernel}"):
        mixing(kernel, causal)


def test_damaged_orders_and_sizes_are_refused():
    module = shuffled()
    module.input_order[0] = module.input_order[1]
    with pytest.raises(CheckpointError, match=r"tensor q.input_order must have each number from 0 to 7 once"):
        module.check("q")
    low = LowRankLinear(8, 12, 3)
    low.weight[1] = 4
    with pytest.raises(CheckpointError, match=r"tensor q.weight must hold sizes \[8, 3, 12\], got \[8, 4, 12\]"):
        low.check("q")
    embedding = FactorizedEmbedding(20, 8, 3)
    embedding.weight[0] = 21
    with pytest.raises(CheckpointError, match=r"tensor w.weight must hold sizes \[20, 3, 8\]"):
        embedding.check("w")
