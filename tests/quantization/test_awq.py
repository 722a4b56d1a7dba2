"""AWQ: scaling changes nothing but what rounding does, and only where that is so."""

import pytest
import torch
from families import cut_to_nothing, cut_unevenly, make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.activations.hessian import output_error
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, in_features, weight_view
from lmcompress.numerics.grids import PER_TENSOR, PerGroup, PerRow
from lmcompress.numerics.quantizers.uniform import asymmetric, symmetric
from lmcompress.quantization.ptq.awq import awq_scales, multiply_columns, scalings, why_unscaled


def change(parameter, values):
    parameter.data = values


@pytest.mark.parametrize("cut", [lambda m: m, cut_unevenly, cut_to_nothing], ids=["whole", "unevenly", "to-nothing"])
def test_scaled_models_answer_as_they_did(family, cut):
    model = cut(make(family, "language"))
    before, found = outputs(model), 0
    for block in anatomy_of(model).blocks:
        for scaling in scalings(block, change):
            width = in_features(block.get(scaling.parts[0]))
            scales = torch.exp(torch.randn(width))
            for part in scaling.parts:
                old = weight_view(block.get(part)).clone()
                multiply_columns(block.get(part), scales, change)
                torch.testing.assert_close(weight_view(block.get(part)), old * scales)
            scaling.divide(scales)
            found += 1
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)
    assert found


def test_what_is_scaled_and_what_is_not_together_are_all(family):
    for block in anatomy_of(make(family)).blocks:
        scaled = {part for scaling in scalings(block, change) for part in scaling.parts}
        unscaled = why_unscaled(block)
        assert not scaled & unscaled.keys()
        assert scaled | unscaled.keys() == set(block.parts())
        # several query heads of Llama's read one value; the gate takes a scale where an activation would not
        of_llama = {"query", "key", "value", "ffn_in", "ffn_gate", "ffn_out"}
        expected = {"gpt2": {"qkv", "ffn_in", "attention_out"}, "llama": of_llama}
        assert scaled == expected.get(family.name, {"attention_out"})


@settings(max_examples=25, deadline=None)
@given(
    outs=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    bits=st.sampled_from([2, 3, 4]),
    granularity=st.sampled_from([PER_TENSOR, PerRow(), PerGroup(4)]),
    function=st.sampled_from([symmetric, asymmetric]),
    seed=st.integers(0, 1000),
)
def test_scales_are_never_worse_than_none(outs, bits, granularity, function, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out, 8, generator=generator) for out in outs]
    x = torch.randn(30, 8, generator=generator) * torch.exp(2 * torch.randn(8, generator=generator))
    roundings = [lambda w: function(w, bits=bits, granularity=granularity)] * len(weights)
    scales = awq_scales(weights, x.abs().mean(0), x.T @ x, roundings)
    assert scales.dtype == torch.float32 and (scales > 0).all()
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)

    def error(s):
        return sum(
            float(output_error(w, r(w * s).values / s, x.T @ x).sum()) for w, r in zip(weights, roundings, strict=True)
        )

    # by the outputs themselves, and not by way of a Hessian
    direct = sum(
        float(((r(w * scales).values / scales - w).double() @ x.double().T).square().sum())
        for w, r in zip(weights, roundings, strict=True)
    )
    assert error(scales) <= error(torch.ones(8)) * (1 + 1e-6)
    assert error(scales) == pytest.approx(direct, rel=1e-3, abs=1e-3)


def test_great_inputs_get_great_scales():
    x = torch.randn(200, 8)
    x[:, 2] *= 30
    weight = torch.randn(16, 8)
    round_ = [lambda w: symmetric(w, bits=3, granularity=PerRow())]
    scales = awq_scales([weight], x.abs().mean(0), x.T @ x, round_)
    assert scales.argmax() == 2 and scales[2] > 1.5
    plain = output_error(weight, round_[0](weight).values, x.T @ x).sum()
    assert output_error(weight, round_[0](weight * scales).values / scales, x.T @ x).sum() < 0.5 * plain


def test_inputs_that_are_always_zero_keep_their_scale():
    x = torch.randn(50, 6) * torch.tensor([0.0, 1.0, 9.0, 1.0, 0.0, 1.0])
    scales = awq_scales(
        [torch.randn(4, 6)], x.abs().mean(0), x.T @ x, [lambda w: symmetric(w, bits=2, granularity=PerRow())]
    )
    assert scales[0] == scales[4] == 1
    assert torch.equal(awq_scales([torch.randn(4, 6)], torch.zeros(6), torch.zeros(6, 6), [symmetric]), torch.ones(6))


def test_what_cannot_be_is_refused():
    with pytest.raises(LmcompressError, match="weights and at least one step, got 0 and 20"):
        awq_scales([], torch.ones(2), torch.eye(2), [])
    for wrong in (torch.ones(3), -torch.ones(2), torch.tensor([1.0, torch.nan])):
        with pytest.raises(LmcompressError, match="magnitudes must be 2 finite numbers >= 0"):
            awq_scales([torch.ones(1, 2)], wrong, torch.eye(2), [symmetric])
