"""Activation functions that a matmul applies to its result, in the same pass where its kernel can."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest

Post = Literal["gelu", "gelu_tanh"]
"""GELU, exact or by the approximation with tanh."""

POSTS: tuple[Post, ...] = ("gelu", "gelu_tanh")
"""All of them."""


def activated(y: Tensor, post: Post | None) -> Tensor:
    """The activation function of a matmul's result.

    Args:
        y: any shape, floating.
        post: the function; ``None`` changes nothing.

    Returns:
        The same shape and dtype.

    Raises:
        LmcompressError: If the function is unknown.

    Example:
        >>> activated(torch.tensor([-1.0, 0.0, 1.0]), "gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    if post is None:
        return y
    if post not in POSTS:
        raise LmcompressError(f"unknown function of a matmul's result {post!r}{nearest(post, POSTS)}")
    return torch.nn.functional.gelu(y, approximate="none" if post == "gelu" else "tanh")
