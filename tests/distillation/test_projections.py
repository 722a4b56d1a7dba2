import pytest
import torch

from lmcompress.distillation.projections import Projection
from lmcompress.errors import LmcompressError


@pytest.mark.parametrize("activation, function", [("linear", lambda x: x), ("relu", torch.relu), ("tanh", torch.tanh)])
def test_a_projection_is_an_affine_map_and_its_activation(activation, function):
    projection = Projection(3, 5, activation, seed=0)
    with torch.no_grad():
        projection.bias.normal_()
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    expected = function(hidden @ projection.weight.T + projection.bias)
    torch.testing.assert_close(projection(hidden), expected)


def test_the_weight_is_normal_with_deviation_two_hundredths_and_the_bias_zero():
    projection = Projection(200, 200, seed=0)
    assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert projection.weight.mean().item() == pytest.approx(0, abs=5e-4)
    assert not projection.bias.any()


def test_the_seed_gives_the_same_weight_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(Projection(4, 4, seed=7).weight, Projection(4, 4, seed=7).weight)
    assert not torch.equal(Projection(4, 4, seed=7).weight, Projection(4, 4, seed=8).weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_identity_changes_nothing_at_the_start():
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(Projection(3, 3, initialisation="identity")(hidden), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_is_float32_and_as_exact_under_autocast(dtype):
    projection = Projection(64, 8, seed=0)
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = projection(hidden)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projection(hidden), expected)


def test_gradients_reach_the_student_and_the_projection():
    projection = Projection(3, 5, seed=0)
    hidden = torch.randn(2, 3, requires_grad=True)
    projection(hidden).square().sum().backward()
    assert hidden.grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(student_dim=0, teacher_dim=3), "widths must be >= 1, got 0 and 3"),
        (dict(student_dim=2, teacher_dim=3, activation="rely"), "unknown activation 'rely'; did you mean 'relu'"),
        (dict(student_dim=2, teacher_dim=2, initialisation="eye"), "unknown initialisation 'eye'"),
        (dict(student_dim=2, teacher_dim=3, initialisation="identity"), "identity needs equal widths, got student 2"),
    ],
    ids=["width", "activation", "initialisation", "identity"],
)
def test_projections_refuse(arguments, message):
    with pytest.raises(LmcompressError, match=message):
        Projection(**arguments)


def test_a_projection_refuses_states_of_another_width():
    with pytest.raises(LmcompressError, match=r"takes states of width 3, got shape \(2, 4\)"):
        Projection(3, 5)(torch.zeros(2, 4))


def test_a_projection_prints_its_widths():
    assert repr(Projection(3, 5, "tanh")) == "Projection(3, 5, activation='tanh')"
