"""The configuration of weight clustering as validated data, shared by recipes and the Python API."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lmcompress.clustering.kmeans import MAX_CLUSTERS, Initial
from lmcompress.families.weights import Matrices

Count = Annotated[int, Field(ge=1, le=MAX_CLUSTERS, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SharingRule(_Part):
    """An override of the defaults for some matrices; of two rules that match a matrix the later one applies."""

    modules: Matrices
    clusters: Annotated[Count | None, Field(description="How many values; null: these matrices stay as they are.")]


class SharingConfig(_Part):
    """The number of shared values and how they are initialized; the defaults are Deep Compression's."""

    clusters: Annotated[
        Count | None,
        Field(description="Number of shared values of each Linear or Conv1D besides zero; 32 are 5 bits; null: dense."),
    ] = 32
    convolution_clusters: Annotated[Count | None, Field(description="Shared values of each Conv2d; 256: 8 bits.")] = 256
    embedding_clusters: Annotated[
        Count | None,
        Field(description="Number of shared values of the token embeddings and of a head tied to them."),
    ] = 32
    rules: Annotated[tuple[SharingRule, ...], Field(description="Overrides for some matrices.")] = ()
    initial: Annotated[
        Initial,
        Field(
            description="Initial centroids: linear (equally spaced between the smallest and the largest weight), "
            "density (quantiles of the weights), forgy (random weights).",
        ),
    ] = "linear"
    keep_zeros: Annotated[
        bool, Field(description="Whether weights that are exactly 0 stay 0, such as pruned ones.")
    ] = True
    sensitivity: Annotated[
        bool,
        Field(
            description="Whether clusters are weighted by the squared gradients of the weights on some rows of the "
            "training data (SqueezeLLM), so that weights the loss depends on are approximated more closely."
        ),
    ] = False
    calibration_rows: Annotated[int, Field(ge=1, description="Number of training rows for the sensitivity.")] = 128
    codebook_learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Learning rate of the shared values, scheduled like the model's and without weight decay; "
            "default: that of the model.",
        ),
    ] = None
    iterations: Annotated[int, Field(ge=1, description="Steps of k-means, at most.")] = 300
    seed: Annotated[
        int, Field(ge=0, lt=1 << 32, description="Seed of random starts and of the choice of calibration rows.")
    ] = 0
