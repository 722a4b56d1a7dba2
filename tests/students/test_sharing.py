"""compact.sharing: blocks that share are one block in memory, on disk and for the gradient."""

import copy

import pytest
import torch
from compacting import grouped
from families import make, outputs

from lmcompress import LmcompressError
from lmcompress.checkpoint.cutting import keep_heads
from lmcompress.families import anatomy_of
from lmcompress.students import factorize, share_layers


def test_a_model_whose_blocks_are_alike_computes_what_it_did(family):
    model = make(family)
    blocks = anatomy_of(model).block_list
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
    before = outputs(model)
    for values in ("first", "mean"):
        again = copy.deepcopy(model)
        share_layers(again, values=values)
        torch.testing.assert_close(outputs(again), before)


def test_runs_share_with_their_first(family):
    model = make(family)
    first, last = (copy.deepcopy(anatomy_of(model).block_list[i].state_dict()) for i in (0, 2))
    per_block = sum(p.numel() for p in anatomy_of(model).block_list[0].parameters())
    report = share_layers(model, every=2)
    blocks = anatomy_of(model).block_list
    assert report.parameters[0] - report.parameters[1] == per_block and report.flops[0] == report.flops[1]
    assert list(report.changed.values()) == ["has the parameters of block 0"]
    for name, parameter in blocks[0].named_parameters():
        assert torch.equal(parameter, first[name]) and dict(blocks[1].named_parameters())[name] is parameter
    assert all(torch.equal(tensor, last[name]) for name, tensor in blocks[2].state_dict().items())


def test_the_mean_is_the_mean():
    model = make("bert")
    expected = torch.stack([b.get("query").weight.detach().clone() for b in anatomy_of(model).blocks]).mean(0)
    share_layers(model, values="mean")
    torch.testing.assert_close(anatomy_of(model).blocks[2].get("query").weight, expected)


def test_the_gradient_is_the_sum_over_all_blocks(family):
    model = make(family)
    alone = copy.deepcopy(model)
    for block in anatomy_of(alone).block_list[1:]:
        block.load_state_dict(anatomy_of(alone).block_list[0].state_dict())
    share_layers(model)
    ids = torch.arange(2, 12).view(2, 5)
    for one in (model, alone):
        one(input_ids=ids)[0].square().sum().backward()
    for name, parameter in anatomy_of(model).block_list[0].named_parameters():
        parts = [dict(block.named_parameters())[name].grad for block in anatomy_of(alone).block_list]
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-3, atol=1e-4)


def test_compact_blocks_share_too():
    model = grouped(make("bert"))
    share_layers(model)
    assert outputs(model).isfinite().all()


def test_blocks_of_other_shapes_are_refused():
    model = make("bert")
    keep_heads(anatomy_of(model).blocks[1], [0, 2])
    with pytest.raises(LmcompressError, match="block 1 differs from block 0; prune them alike"):
        share_layers(model)
    model = make("bert")
    factorize(model, rank=2, blocks=[2])
    with pytest.raises(LmcompressError, match="block 2 differs from block 0"):
        share_layers(model)


def test_bad_input_is_refused():
    model = make("bert")
    for every in (0, 1, 4):
        with pytest.raises(LmcompressError, match=f"every must be 2 to 3, the number of blocks, got {every}"):
            share_layers(model, every=every)
    with pytest.raises(LmcompressError, match="values must be 'first' or 'mean', got 'median'"):
        share_layers(model, values="median")
    share_layers(model)
    with pytest.raises(LmcompressError, match="blocks share their parameters: replace them first"):
        share_layers(model)
    with pytest.raises(LmcompressError, match="blocks share their parameters: replace them first"):
        factorize(model, rank=2)
