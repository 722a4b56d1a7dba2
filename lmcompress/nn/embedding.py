"""An embedding table as a narrow table and a matrix, and the head that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.nn.base import Compact, check_sizes, sizes


class FactorizedEmbedding(Compact):
    """Words of ``rank`` numbers each, and one matrix that widens them: ``V·E + E·H`` numbers instead of ``V·H``.

    Args:
        num_embeddings: tokens, V.
        embedding_dim: width of the answer, H.
        rank: width of the table, E, from 1 to H.
        padding_idx: token whose row gets no gradient.
        device: of the tensors.
        dtype: of the parameters.

    Raises:
        LmcompressError: If the rank is out of range.

    Reference:
        Lan et al., *ALBERT*, 2020, https://arxiv.org/abs/1909.11942, section 3.1, "Factorized embedding
        parameterization".
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim)
        most = min(num_embeddings, embedding_dim)
        if not 1 <= rank <= most:
            raise LmcompressError(
                f"the rank of a {num_embeddings}×{embedding_dim} table must be 1 to {most}, got {rank}; a matrix has "
                "no higher one"
            )
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.rank = rank
        self.table = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)
        self.register_buffer("weight", sizes(num_embeddings, rank, embedding_dim, device=device))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token; a look-up is free."""
        return self.rank * self.embedding_dim

    def matrix(self) -> Tensor:
        """The table that this stands for, ``(tokens, width)``, with gradient."""
        return self.table.weight @ self.expand.weight.t()

    def check(self, name: str) -> None:
        """Refuse sizes that are not the factors'.

        Args:
            name: of the module, for the error.

        Raises:
            CheckpointError: If the checkpoint says others.
        """
        check_sizes(self.weight, (self.num_embeddings, self.rank, self.embedding_dim), f"{name}.weight")

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: ``(...)`` int64.

        Returns:
            ``(..., width)``.
        """
        y: Tensor = self.expand(self.table(ids))
        return y

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class FactorizedHead(nn.Module):
    """A head over the vocabulary that is tied to factorised embeddings: it reads their factors and owns none.

    Args:
        embedding: whose factors they are; it stays a part of the model where it was.
        bias: the parameter that the full head had.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)
        # past nn.Module's own way, which would make it a submodule and save its tensors twice
        self.__dict__["embedding"] = embedding

    @property
    def weight(self) -> Tensor:
        """The matrix that the factors stand for, ``(tokens, width)``, with gradient; made anew whenever it is read."""
        embedding: FactorizedEmbedding = self.__dict__["embedding"]
        if not embedding.table.weight.is_floating_point() or not embedding.expand.weight.is_floating_point():
            # Transformers asks for it while a checkpoint is loaded, when they may be streams that are not decoded yet
            raise AttributeError("weight")
        return embedding.matrix()

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        embedding: FactorizedEmbedding = self.__dict__["embedding"]
        return embedding.rank * (self.in_features + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``x (T Uᵀ)ᵀ + b``, the narrow matmul first.

        Args:
            x: ``(..., width)``.

        Returns:
            ``(..., tokens)``.
        """
        embedding: FactorizedEmbedding = self.__dict__["embedding"]
        return nn.functional.linear(x @ embedding.expand.weight, embedding.table.weight, self.bias)

    def extra_repr(self) -> str:
        """Widths, for people."""
        return f"{self.in_features} -> {self.out_features}, tied"
