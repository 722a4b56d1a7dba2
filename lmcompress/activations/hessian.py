"""The effect of weight changes on a module's output, from the second moments of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics.quantizers.base import check_finite


def output_error(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    r"""Squared error of each output over the inputs: :math:`\mathrm{diag}((W - Q) H (W - Q)^T)`.

    Args:
        weight: ``(out, in)``, floating.
        values: same shape: the replacement of the weight.
        hessian: ``(in, in)``, Σ x xᵀ.

    Returns:
        ``(out,)`` float64, >= 0.

    Example:
        >>> output_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), 3 * torch.eye(2))
        tensor([3.], dtype=torch.float64)
    """
    difference = exact(weight) - exact(values)
    # rounding can make it slightly negative
    return ((difference @ exact(hessian)) * difference).sum(dim=1).clamp(min=0)


def check_hessian(weight: Tensor, hessian: Tensor, damping: float, block_size: int) -> None:
    """Validates the inputs of error compensation.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``, Σ x xᵀ over the module's inputs.
        damping: fraction of the mean of the diagonal that is added to the diagonal.
        block_size: number of columns processed at once.

    Raises:
        LmcompressError: If the Hessian has another shape, is not finite or is all zero, weights are NaN or
            infinite, or damping or the block size is not > 0.
    """
    check_finite(weight)
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise LmcompressError(
            "the Hessian must have shape (in, in) for a weight (out, in), got "
            f"{tuple(hessian.shape)} for {tuple(weight.shape)}"
        )
    if not damping > 0:
        raise LmcompressError(f"damping must be > 0, got {damping}; 0.01 is usual")
    if block_size < 1:
        raise LmcompressError(f"the block size must be at least 1, got {block_size}; 128 is usual")
    if not bool(torch.isfinite(hessian).all()):
        raise LmcompressError(
            "the Hessian must be finite, got NaN or infinity; are the model's activations finite in this dtype?"
        )
    if weight.numel() and not bool((hessian.diagonal() > 0).any()):
        raise LmcompressError("the Hessian must come from inputs that are not all 0, got only zeros")


def inverse_factor(h: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with H⁻¹ = UᵀU.

    Args:
        h: ``(in, in)`` float64, Σ x xᵀ.
        damping: fraction of the mean of the diagonal that is added to the diagonal, > 0; multiplied by 10 until H is no
            longer singular.

    Returns:
        ``(in, in)`` float64.

    Raises:
        LmcompressError: If H is not symmetric positive definite.
    """
    mean = h.diagonal().mean()
    dead = h.diagonal() <= 0
    # an input that is always 0 is uncorrelated with the others: any positive number works
    h = h + torch.diag(torch.where(dead, mean, 0.0))
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for power in range(8):
        # H = R Rᵀ with R upper triangular is the Cholesky factor of H reversed, and U = R⁻¹: one factorization, where
        # the paper inverts H and factors the inverse
        lower, failed = torch.linalg.cholesky_ex((h + damping * 10**power * mean * eye).flip(0, 1))
        if not int(failed):
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    raise LmcompressError(
        f"the Hessian must be symmetric positive definite, it is not, even with damping {damping * 1e7}; is it Σ x xᵀ?"
    )


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 and detached, on the CPU if the device has no float64.

    Args:
        tensor: any tensor.

    Returns:
        A new tensor, or the same one if nothing has to change.
    """
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
