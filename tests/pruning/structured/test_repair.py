"""Repair: never worse than nothing on calibration data, exact where it can be, and only what the mask touches."""

import pytest
import torch
from families import FFN, HEAD_SIZE, HEADS, LAYERS, inputs, make

from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, weight_view
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.repair import compensate_bias, least_squares, least_squares_in_order
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.units import Units, full

REPAIRS = [least_squares, least_squares_in_order, compensate_bias]
NAMES = [repair.__name__ for repair in REPAIRS]


def batches_for(model, count=6):
    return [inputs(model, rows=4, seed=seed) for seed in range(count)]


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = full(model, ["heads", "neurons"]).map(lambda t: torch.rand(len(t), generator=generator) > 0.5)
    for tensor in (*mask.heads, *mask.neurons):
        tensor[0], tensor[1] = True, False
    return mask


def recorded(model, batches, name, index, gates=None):
    """Input and output of an output projection at valid tokens."""
    kept = []
    module = anatomy_of(model).blocks[index].get(name)

    def hook(_, args, output):
        kept.append((args[0], output))

    handle = module.register_forward_hook(hook)
    found = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            mask = batch["attention_mask"].bool()
            found.append(tuple(t[mask].double() for t in kept.pop()))
    handle.remove()
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def applied(module, x, kept):
    return (x * kept) @ weight_view(module).detach().double().T + module.bias.detach().double()


@pytest.mark.parametrize("repair", [least_squares, compensate_bias], ids=["least_squares", "compensate_bias"])
def test_no_sub_layer_is_worse_than_without_repair(family, repair):
    model = make(family)
    batches, mask = batches_for(model), half(model)
    before = {}
    for index in range(LAYERS):
        for name in ("attention_out", "ffn_out"):
            kept = mask.neurons[index] if name == "ffn_out" else mask.heads[index].repeat_interleave(HEAD_SIZE)
            x, y = recorded(model, batches, name, index)
            module = anatomy_of(model).blocks[index].get(name)
            before[index, name] = x, y, kept, (applied(module, x, kept) - y).square().sum()
    done = {
        (row.block, "attention_out" if row.part == "heads" else "ffn_out"): row for row in repair(model, mask, batches)
    }
    assert done.keys() == before.keys()
    for (index, name), (x, y, kept, error) in before.items():
        module = anatomy_of(model).blocks[index].get(name)
        after = (applied(module, x, kept) - y).square().sum()
        assert after <= error * (1 + 1e-5)
        row = done[index, name]
        assert row.error_after < row.error_before
        assert row.error_after / row.error_before == pytest.approx(float(after / error), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("repair", REPAIRS, ids=NAMES)
def test_the_repaired_model_is_what_the_mask_and_the_cut_make_of_it(family, repair):
    model = make(family)
    batches, mask = batches_for(model), half(model)
    repair(model, mask, batches)
    with torch.no_grad():
        alone = model(**batches[0]).logits
        with Gates(model, ["heads", "neurons"]) as gates:
            gates.set(mask)
            gated = model(**batches[0]).logits
        cut(model, mask)
        small = model(**batches[0]).logits
    torch.testing.assert_close(alone, gated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small, gated, rtol=1e-5, atol=1e-5)


def test_least_squares_is_exact_where_what_goes_is_a_combination_of_what_stays(family):
    model = make(family)
    batches = batches_for(model)
    with torch.no_grad():
        for block in anatomy_of(model).blocks:
            first = block.get("ffn_in")
            # neuron 3 is neuron 0 again, neuron 4 never says anything else than a constant
            weight_view(first)[3] = weight_view(first)[0]
            first.bias[3] = first.bias[0]
            weight_view(first)[4] = 0
        expected = model(**batches[0]).logits
        mask = full(model, ["neurons"])
        for tensor in mask.neurons:
            tensor[3] = tensor[4] = False
        done = least_squares(model, mask, batches, damping=1e-10)
        assert all(row.error_after < 1e-6 < row.error_before for row in done)
        cut(model, mask)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-3, atol=1e-4)


def test_bias_is_exact_where_what_goes_is_constant():
    model = make("bert")
    batches = batches_for(model)
    with torch.no_grad():
        weight_view(anatomy_of(model).blocks[1].get("ffn_in"))[5] = 0
        expected = model(**batches[0]).logits
        mask = full(model, ["neurons"])
        mask.neurons[1][5] = False
        compensate_bias(model, mask, batches)
        cut(model, mask)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_everything_gone_leaves_the_mean():
    model = make("bert")
    batches = batches_for(model)
    mask = full(model, ["heads"])
    mask.heads[0][:] = False
    _, y = recorded(model, batches, "attention_out", 0)
    least_squares(model, mask, batches, damping=1e-9)
    torch.testing.assert_close(
        anatomy_of(model).blocks[0].get("attention_out").bias.double(), y.mean(0), rtol=1e-4, atol=1e-5
    )


def test_in_order_repairs_what_earlier_layers_lost(family):
    batches = batches_for(make(family), 12)
    dense = make(family)
    errors = {}
    for repair in (None, least_squares, least_squares_in_order):
        model = make(family)
        mask = half(model)
        if repair:
            repair(model, mask, batches)
        with torch.no_grad(), Gates(model, ["heads", "neurons"]) as gates:
            gates.set(mask)
            errors[repair] = sum(float((model(**b).logits - dense(**b).logits).square().sum()) for b in batches)
    assert errors[least_squares_in_order] < errors[None]
    assert errors[least_squares_in_order] < 1.2 * errors[least_squares]


@pytest.mark.parametrize("repair", REPAIRS, ids=NAMES)
def test_repair_does_not_see_padding_nor_batches(repair):
    model = make("bert")
    mask, batches = half(model), batches_for(model)
    repair(model, mask, batches)
    other = make("bert")
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(4)]
    wide = [{k: torch.nn.functional.pad(v, (0, 4)) for k, v in row.items()} for row in rows]
    repair(other, mask, wide)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("repair", REPAIRS, ids=NAMES)
def test_what_goes_as_a_whole_is_left_alone(repair):
    model = make("bert")
    mask = half(model).updated(
        attention=torch.tensor([False, True, True]), ffn=torch.tensor([True, False, True]),
        layers=torch.tensor([True, True, False]),
    )  # fmt: skip
    done = repair(model, mask, batches_for(model))
    assert [(row.block, row.part) for row in done] == [(0, "neurons"), (1, "heads")]


def test_the_model_keeps_its_mode_and_loses_its_hooks():
    model = make("bert").train()
    least_squares_in_order(model, half(model), batches_for(model))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("repair", REPAIRS, ids=NAMES)
def test_bad_input_is_refused(repair):
    model = make("bert")
    with pytest.raises(LmcompressError, match="some heads or neurons of .* got none: there is nothing to repair"):
        repair(model, full(model, ["heads"]), batches_for(model))
    with pytest.raises(LmcompressError, match="must have at least one batch, got none"):
        repair(model, half(model), [])
    with pytest.raises(LmcompressError, match="a mask of heads must have the model's shapes"):
        repair(model, Units(heads=(torch.ones(HEADS + 1, dtype=torch.bool),) * LAYERS), batches_for(model))
    with pytest.raises(LmcompressError, match="a mask must be bool, got torch.float32 for neurons"):
        repair(model, Units(neurons=(torch.ones(FFN),) * LAYERS), batches_for(model))


@pytest.mark.parametrize("repair", [least_squares, least_squares_in_order])
def test_damping_must_be_positive_and_enough(repair):
    model = make("bert")
    with pytest.raises(LmcompressError, match="damping must be > 0, got 0"):
        repair(model, half(model), batches_for(model), damping=0)
    with torch.no_grad():
        anatomy_of(model).blocks[0].get("ffn_in").bias[0] = float("nan")
    with pytest.raises(LmcompressError, match="inputs of .* in block .* raise damping"):
        repair(model, half(model), batches_for(model))


def test_a_bias_is_needed_for_its_compensation():
    model = make("bert")
    anatomy_of(model).blocks[1].get("ffn_out").bias = None
    with pytest.raises(LmcompressError, match="neurons in block 1 must have a bias.*use least_squares"):
        compensate_bias(model, half(model), batches_for(model))
    assert all(row.error_after < row.error_before for row in least_squares(model, half(model), batches_for(model)))
