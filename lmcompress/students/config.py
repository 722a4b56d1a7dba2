"""Compact layers in recipes as validated data: each entry is a call of one function of this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from lmcompress.students._choosing import Batch
from lmcompress.students.cross_layer import share_layers
from lmcompress.students.folding import fold_shuffles, fold_where_possible
from lmcompress.students.grouped import Shuffle, group
from lmcompress.students.low_rank import check_goal, factorize, factorize_embeddings
from lmcompress.students.report import CompactReport
from lmcompress.students.separable import separate


class _Replacement(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def unknown(self) -> str | None:
        """The quantities that a model without values does not determine, in words, or None."""
        return None


class OnData(_Replacement):
    """A replacement that may be fitted on training rows."""

    calibration_rows: Annotated[int, Field(ge=1, description="Number of training rows for fits on data.")] = 256
    calibration_batch_size: Annotated[int, Field(ge=1, description="Batch size of the calibration rows.")] = 32

    @property
    def needs_data(self) -> bool:
        """Whether it is."""
        return True


class _Projections(OnData):
    parts: Annotated[
        tuple[str, ...] | None,
        Field(
            min_length=1,
            description="Names of matrices (query, key, value, qkv, attention_out, ffn_in, ffn_out); * and ? are "
            "wildcards; default: all that the family has.",
        ),
    ] = None
    blocks: Annotated[
        tuple[int, ...] | None, Field(min_length=1, description="Numbers of blocks, from 0; default: all.")
    ] = None
    activations: Annotated[
        bool, Field(description="Whether to fit the outputs on training rows instead of the matrix.")
    ] = False

    @property
    def needs_data(self) -> bool:
        """Whether there are activations to fit to."""
        return self.activations


class Factorize(_Projections):
    """Two factors in place of matrices; exactly one of rank, energy and parameters determines their rank."""

    kind: Literal["factorize"] = "factorize"
    rank: Annotated[int | None, Field(ge=1, description="Rank, the same for all matrices.")] = None
    energy: Annotated[
        float | None,
        Field(description="For each matrix the lowest rank that keeps this share of the squared singular values."),
    ] = None
    parameters: Annotated[
        float | None,
        Field(description="Share of these matrices' parameters to keep in total; ranks are distributed by benefit."),
    ] = None

    @model_validator(mode="after")
    def _one_goal(self) -> Factorize:
        check_goal(self.rank, self.energy, self.parameters)
        return self

    @property
    def unknown(self) -> str | None:
        """Ranks, if the singular values determine them."""
        if self.rank is not None:
            return None
        shown = "the highest that save anything" if self.parameters is None else "the same share of every matrix"
        return f"ranks follow from the singular values, which the run will compute; here they are {shown}"

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.factorize`.

        Args:
            model: modified in place.
            batches: batches to fit on; ignored without ``activations``.
        """
        return factorize(
            model,
            rank=self.rank,
            energy=self.energy,
            parameters=self.parameters,
            activations=batches if self.activations else None,
            parts=self.parts,
            blocks=self.blocks,
        )


class FactorizeEmbeddings(_Replacement):
    """A narrow table and a matrix in place of the token embeddings and of a head tied to them."""

    kind: Literal["factorize_embeddings"] = "factorize_embeddings"
    rank: Annotated[int, Field(ge=1, description="Width of the table.")]

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.factorize_embeddings`.

        Args:
            model: modified in place.
            batches: unused.
        """
        return factorize_embeddings(model, self.rank)


class Group(_Projections):
    """Diagonal blocks in place of matrices, optionally with shuffled channels between them."""

    kind: Literal["group"] = "group"
    groups: Annotated[int, Field(ge=2, description="Number of groups; must divide all widths concerned.")]
    shuffle: Annotated[
        Shuffle,
        Field(
            description="none: adjacent channels, which never mix; channel: ShuffleNet's order before attention_out "
            "and ffn_out; fitted: groups of channels that hold the most energy together."
        ),
    ] = "fitted"

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.group`.

        Args:
            model: modified in place.
            batches: batches to fit on; ignored without ``activations``.
        """
        return group(
            model,
            self.groups,
            shuffle=self.shuffle,
            activations=batches if self.activations else None,
            parts=self.parts,
            blocks=self.blocks,
        )


class Separate(OnData):
    """A convolution of the values along the sequence in place of some blocks' attention, fitted on data."""

    kind: Literal["separate"] = "separate"
    blocks: Annotated[tuple[int, ...], Field(min_length=1, description="Numbers of blocks, from 0.")]
    kernel: Annotated[int, Field(ge=1, description="Number of positions in the kernel; odd, except for causal models.")]
    ridge: Annotated[
        float, Field(ge=0, description="Share of the values' mean square added to the normal equations.")
    ] = 1e-6

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.separate`.

        Args:
            model: modified in place.
            batches: batches to fit on.
        """
        return separate(model, self.blocks, self.kernel, batches, ridge=self.ridge)


class ShareLayers(_Replacement):
    """Runs of neighbouring blocks with the same parameters; the last of all replacements."""

    kind: Literal["share_layers"] = "share_layers"
    every: Annotated[int | None, Field(ge=2, description="Number of blocks in a run; default: all.")] = None
    values: Annotated[
        Literal["first", "mean"], Field(description="Shared values: the first block's, or the mean of the run.")
    ] = "first"

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.share_layers`.

        Args:
            model: modified in place.
            batches: unused.
        """
        return share_layers(model, every=self.every, values=self.values)


class FoldShuffles(_Replacement):
    """Permutations of channels are folded into adjacent matrices; the outputs are the same."""

    kind: Literal["fold_shuffles"] = "fold_shuffles"

    def apply(self, model: PreTrainedModel, batches: Iterable[Batch]) -> CompactReport:
        """See :func:`~lmcompress.students.fold_shuffles`; with values, a no-op if nothing is left to fold.

        Args:
            model: modified in place.
            batches: unused.
        """
        # whether a fitted permutation is the identity depends on values
        return fold_shuffles(model) if model.device.type == "meta" else fold_where_possible(model)


Replacement = Annotated[
    Factorize | FactorizeEmbeddings | Group | Separate | ShareLayers | FoldShuffles, Field(discriminator="kind")
]
"""One call of a function of :mod:`lmcompress.students`."""
