"""An embedding table factored into a narrow table and a matrix, and the head tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.nn.base import Compact, check_sizes, sizes


class FactorizedEmbedding(Compact):
    """Token embeddings of width ``rank`` and a matrix that widens them: ``V·E + E·H`` parameters instead of ``V·H``.

    Args:
        num_embeddings: tokens, V.
        embedding_dim: output width, H.
        rank: width of the table, E, from 1 to H.
        padding_idx: token whose embedding gets no gradient.
        device: device of the tensors.
        dtype: dtype of the parameters.

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
        """The full table, ``(tokens, width)``, with gradient."""
        return self.table.weight @ self.expand.weight.t()

    def check(self, name: str) -> None:
        """Refuse sizes that differ from the factors'.

        Args:
            name: name of the module in the error.

        Raises:
            CheckpointError: If the checkpoint has other sizes.
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
    """A vocabulary head tied to factorized embeddings: it reads their factors and has none of its own.

    Args:
        embedding: owner of the factors; it stays where it is in the model.
        bias: the full head's parameter.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)
        # bypasses nn.Module, which would register it as a submodule and save its tensors twice
        self.__dict__["embedding"] = embedding

    @property
    def weight(self) -> Tensor:
        """The full matrix, ``(tokens, width)``, with gradient; computed anew on each access."""
        embedding: FactorizedEmbedding = self.__dict__["embedding"]
        if not embedding.table.weight.is_floating_point() or not embedding.expand.weight.is_floating_point():
            # Transformers reads it while a checkpoint is loaded, when the factors may still be encoded streams
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
        """The widths, for ``print``."""
        return f"{self.in_features} -> {self.out_features}, tied"
