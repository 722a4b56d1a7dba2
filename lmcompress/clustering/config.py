"""What weight clustering is asked to do, as validated data: used by recipes and by the Python API alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lmcompress.clustering.kmeans import MAX_CLUSTERS, Initial

Count = Annotated[int, Field(ge=1, le=MAX_CLUSTERS, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SharingRule(_Part):
    """What some matrices get in place of the default; of two rules that name a matrix the later one counts."""

    modules: Annotated[
        str,
        Field(
            min_length=1,
            description="Names of parts (query, key, value, qkv, attention_out, ffn_in, ffn_out, embeddings, head) or "
            "paths such as h.0.mlp.c_fc or pooler.dense; * and ? stand for any.",
        ),
    ]
    clusters: Annotated[Count | None, Field(description="How many values; null: these matrices stay as they are.")]


class SharingConfig(_Part):
    """How many values weights share and how those are found; the defaults are Deep Compression's."""

    clusters: Annotated[
        Count | None,
        Field(description="Values of each Linear or Conv1D beside zero; 32 are 5 bits; null leaves them alone."),
    ] = 32
    convolution_clusters: Annotated[Count | None, Field(description="Values of each Conv2d; 256 are 8 bits.")] = 256
    embedding_clusters: Annotated[
        Count | None,
        Field(description="Values of the token embeddings, and with them of a head that is tied to them."),
    ] = 32
    rules: Annotated[tuple[SharingRule, ...], Field(description="For some matrices in place of the above.")] = ()
    initial: Annotated[
        Initial,
        Field(
            description="Where centroids start: linear (equal steps between the least weight and the greatest), "
            "density (equal shares of the weights), forgy (at random)."
        ),
    ] = "linear"
    keep_zeros: Annotated[
        bool, Field(description="Whether weights that are exactly 0 stay so, such as those that were pruned.")
    ] = True
    sensitivity: Annotated[
        bool,
        Field(
            description="Whether clusters are weighted by the squared gradients of the weights on some rows of the "
            "training data (SqueezeLLM); such matrices are clustered with more care for what the loss depends on."
        ),
    ] = False
    calibration_rows: Annotated[int, Field(ge=1, description="Rows of the training data for the sensitivity.")] = 128
    codebook_learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="In training: of the shared values, on the schedule of the model's and without weight decay; "
            "default: that of the model.",
        ),
    ] = None
    iterations: Annotated[int, Field(ge=1, description="Steps of k-means, at most.")] = 300
    seed: Annotated[
        int, Field(ge=0, lt=1 << 32, description="Of random starts and of the choice of calibration rows.")
    ] = 0
