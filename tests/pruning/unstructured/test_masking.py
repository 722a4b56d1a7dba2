"""Masks laid over weights in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.pruning.unstructured import masking
from lmcompress.pruning.unstructured.masking import keep_where

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


@given(
    rows=st.integers(0, 9), columns=st.integers(1, 9), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
    chunk=st.integers(1, 99), behind=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_is_where_to_the_bit(
    rows: int, columns: int, dtype: torch.dtype, seed: int, chunk: int, behind: bool, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, other = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(rows, columns, generator=generator) > 0.5
    if transposed:
        weight, other, mask = weight.t(), other.t(), mask.t()
    wanted = torch.where(mask, weight, other if behind else torch.zeros_like(weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_CHUNK", chunk)
        keep_where(weight, mask, other if behind else None)
    assert torch.equal(bits(weight), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_and_the_sign_of_zero(dtype: torch.dtype) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -1.0, -0.0], dtype=dtype)
    kept = odd.clone()
    keep_where(kept, torch.ones(4, dtype=torch.bool))
    assert torch.equal(bits(kept), bits(odd))
    keep_where(kept, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(bits(kept), bits(torch.zeros(4, dtype=dtype)))
    keep_where(kept, torch.zeros(4, dtype=torch.bool), odd)
    assert torch.equal(bits(kept), bits(odd))


def test_a_parameter_keeps_its_place_and_its_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    place = weight.data_ptr()
    weight.sum().backward()
    keep_where(weight, torch.tensor([True, False, True]))
    assert (weight.data_ptr(), weight.tolist(), weight.requires_grad) == (place, [1.0, 0.0, 1.0], True)
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 1.0, 1.0]
