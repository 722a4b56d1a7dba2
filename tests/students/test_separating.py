"""compact.separating: local mixing is the least squares fit to what attention gave."""

import numpy as np
import pytest
import torch
from compacting import batches
from families import make, outputs

from lmcompress import LmcompressError
from lmcompress.checkpoint.cutting import drop_heads, keep_heads
from lmcompress.families import anatomy_of, weight_view
from lmcompress.families.mixing import mixing_of
from lmcompress.students import factorize, separate


def test_the_kernels_are_what_a_solver_finds():
    model = make("bert")
    data = batches(model)
    block = anatomy_of(model).blocks[1]
    seen = []
    handles = [
        block.get("value").register_forward_hook(lambda m, a, out: seen.append(out.detach())),
        block.get("attention_out").register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())),
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    report = separate(model, [1], 3, data, ridge=0.0)
    mixing = mixing_of(anatomy_of(model).blocks[1])
    missed = deviation = 0.0
    for channel in range(16):
        rows, targets = [], []
        for batch, values, context in zip(data, seen[::2], seen[1::2], strict=True):
            for row, mask in enumerate(batch["attention_mask"].bool()):
                column = np.concatenate([[0], (values[row, :, channel] * mask).double().numpy(), [0]])
                for t in range(int(mask.sum())):
                    rows.append([*column[t : t + 3], 1.0])
                    targets.append(float(context[row, t, channel]))
        solution, residual, *_ = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)
        got = [*mixing.weight[channel, 0].tolist(), float(mixing.bias[channel].detach())]
        np.testing.assert_allclose(got, solution, rtol=2e-3, atol=1e-4)
        missed, deviation = missed + float(residual[0]), deviation + float(np.var(targets) * len(targets))
    assert report.errors["encoder.layer.1.attention.self"] == pytest.approx(missed / deviation, rel=1e-3)


def test_attention_that_looks_at_fixed_distances_is_kept(family):
    # all scores 0 and one token: each position sees the mean of what it may see, so a kernel of 1 is exact
    model = make(family)
    with torch.no_grad():
        block = anatomy_of(model).blocks[0]
        for part in ("query", "key") if not block.family.qkv else ("qkv",):
            rows = slice(0, 32) if part == "qkv" else slice(None)
            weight_view(block.get(part))[rows] = 0
            block.get(part).bias[rows] = 0
    single = [{"input_ids": torch.arange(2, 62).view(-1, 1), "attention_mask": torch.ones(60, 1, dtype=torch.long)}]
    expected = model(**single[0])[0]
    report = separate(model, [0], 1, single)
    torch.testing.assert_close(model(**single[0])[0], expected, rtol=1e-3, atol=1e-3)
    assert max(report.errors.values()) < 1e-4


def test_a_wider_kernel_misses_less(family):
    errors = []
    for kernel in (1, 3, 7):
        model = make(family)
        errors += separate(model, [0], kernel, batches(model)).errors.values()
    assert errors == sorted(errors, reverse=True) and errors[0] <= 1


def test_queries_and_keys_are_gone_and_their_cost_with_them(family):
    model = make(family)
    report = separate(model, [0, 2], 3, batches(model))
    # query and key with biases go, kernels and their bias come
    assert report.parameters[0] - report.parameters[1] == 2 * (2 * (16 * 16 + 16) - 16 * 4)
    assert report.flops[0] - report.flops[1] == 2 * 128 * 2 * (2 * 16 * 16 + 2 * 128 * 16 - 3 * 16)
    assert outputs(model).shape == outputs(make(family)).shape and "mixes 3 neighbours" in str(report)


def test_a_model_that_pruning_has_cut_mixes_the_heads_that_are_left(family):
    model = make(family)
    keep_heads(anatomy_of(model).blocks[0], [1, 3])
    separate(model, [0], 3, batches(model))
    assert mixing_of(anatomy_of(model).blocks[0]).out_features == 8 and outputs(model).isfinite().all()
    assert anatomy_of(model).blocks[0].num_heads == 2


def test_output_attentions_tells_of_no_heads_there():
    model = make("bert", attn_implementation="eager")
    separate(model, [0], 3, batches(model))
    attentions = model(**batches(model)[0], output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(6, 0, 12, 12), (6, 4, 12, 12), (6, 4, 12, 12)]


def test_bad_input_is_refused():
    model = make("bert")
    data = batches(model)
    with pytest.raises(LmcompressError, match="kernel must be an odd number, to cover both sides equally, got 4"):
        separate(model, [0], 4, data)
    with pytest.raises(LmcompressError, match="blocks must be numbers from 0 to 2, without repetition, got"):
        separate(model, [0, 0], 3, data)
    with pytest.raises(LmcompressError, match="calibration data must have at least one batch, got none"):
        separate(model, [0], 3, [])
    assert mixing_of(anatomy_of(model).blocks[0]) is None
    separate(model, [0], 3, data)
    with pytest.raises(LmcompressError, match="block 0 must attend to be replaced, it mixes neighbours already"):
        separate(model, [0], 3, data)
    drop_heads(anatomy_of(model).blocks[1])
    with pytest.raises(LmcompressError, match="block 1 must have heads to be replaced, pruning has removed all"):
        separate(model, [1], 3, data)
    factorize(model, rank=2, parts=["value"], blocks=[2])
    with pytest.raises(LmcompressError, match="the values of block 2 must be a dense matrix to be replaced"):
        separate(model, [2], 3, data)


def test_neighbours_that_nothing_tells_apart_are_refused():
    # rows of one token have no neighbours, and without a ridge nothing says what their kernels should be
    model = make("bert")
    single = [{"input_ids": torch.arange(2, 62).view(-1, 1), "attention_mask": torch.ones(60, 1, dtype=torch.long)}]
    with pytest.raises(LmcompressError, match="kernels of 3 neighbours must be fitted .* got 60 tokens"):
        separate(model, [1], 3, single, ridge=0.0)
    assert mixing_of(anatomy_of(model).blocks[1]) is None
