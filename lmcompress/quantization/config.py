"""The configuration of quantization as validated data, shared by recipes and the Python API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, PlainSerializer, model_validator
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.numerics.grids import PER_TENSOR, Bits, Granularity, PerGroup, PerRow
from lmcompress.numerics.quantizers.base import Quantized, WeightQuantizer
from lmcompress.numerics.quantizers.ranges import check_percentile
from lmcompress.numerics.quantizers.registry import quantizer_for, quantizer_name

Default = Literal["default"]
Percentile = Annotated[float, AfterValidator(check_percentile)]


def width(bits: Bits) -> float:
    """Bits as a number, for comparisons.

    Args:
        bits: number of bits, or ``"ternary"``.

    Returns:
        The number; for ternary log2 of 3, rounded.

    Example:
        >>> width(2) > width("ternary") > width(1)
        True
    """
    return 1.58 if bits == "ternary" else float(bits)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WeightScheme(_Part):
    """The quantization of weights."""

    quantizer: Annotated[
        str | SkipJsonSchema[InstanceOf[WeightQuantizer]],
        PlainSerializer(quantizer_name),
        Field(description="A built-in quantizer such as lsq, or module:attribute of a WeightQuantizer."),
    ] = "dynamic_scaling"
    bits: Annotated[Bits, Field(description="Bit-width of the weights: 1, 2, 3, 4, 8, or 'ternary'.")] = 8
    granularity: Annotated[
        Literal["tensor", "row"] | Annotated[int, Field(ge=1, strict=True)],
        Field(
            description="Weights that share a scale: tensor, row (one output; for an embedding one token), or n for "
            "groups of n neighbours in a row, whose length n must divide."
        ),
    ] = "tensor"
    percentile: Annotated[
        Percentile,
        Field(description="For the quantizers percentile and asymmetric_percentile: per cent that are not clipped."),
    ] = 99.9

    @model_validator(mode="after")
    def _has_these_bits(self) -> WeightScheme:
        quantizer_for(self.quantizer, self.bits)
        return self

    @property
    def name(self) -> str:
        """The quantizer's name in messages and reports."""
        return quantizer_name(self.quantizer)

    def function(self) -> WeightQuantizer:
        """The quantizer object."""
        return quantizer_for(self.quantizer, self.bits)

    def initial_state(self, weight: Tensor) -> Tensor | None:
        """The quantizer's initial state for a weight, or None if it has none.

        Args:
            weight: ``(out, in)``, floating.

        Raises:
            LmcompressError: If weights are NaN or infinite, or the group size does not divide the rows.
        """
        quantizer = self.function()
        if quantizer.initial is None:
            return None
        options = {"percentile": self.percentile} if quantizer.takes_percentile else {}
        return quantizer.initial(weight.detach(), bits=self.bits, granularity=self.grouping(), **options)

    def quantize(self, weight: Tensor, state: Tensor | None, **options: Tensor) -> Quantized:
        """Values and codes of a weight.

        Args:
            weight: ``(out, in)``, floating.
            state: state of the quantizer, or None if it has none.
            **options: further arguments of the quantizer, such as a curvature.
        """
        return self.function().function(weight, state, bits=self.bits, granularity=self.grouping(), **options)

    def rounded(self, weight: Tensor) -> Quantized:
        """A weight rounded to nearest, with the quantizer's initial state and no gradient.

        Args:
            weight: ``(out, in)``, floating.

        Raises:
            LmcompressError: If weights are NaN or infinite, or the group size does not divide the rows.
        """
        weight = weight.detach()
        return self.quantize(weight, self.initial_state(weight))

    def grouping(self) -> Granularity:
        """The granularity as a type of lmcompress.numerics."""
        if isinstance(self.granularity, int):
            return PerGroup(self.granularity)
        return PER_TENSOR if self.granularity == "tensor" else PerRow()


class ActivationScheme(_Part):
    """The quantization of activations before a matmul."""

    bits: Annotated[Literal[8, 4], Field(description="Bit-width of the activations: 8 or 4.")] = 8
    range: Annotated[
        Literal["dynamic", "static", "learned"],
        Field(description="dynamic: computed per input; static: calibrated once; learned: calibrated, then trained."),
    ] = "dynamic"
    symmetric: Annotated[
        bool | Literal["auto"],
        Field(description="Whether levels are symmetric around 0; auto: except after a softmax or an activation."),
    ] = "auto"
    granularity: Annotated[
        Literal["tensor", "token"],
        Field(description="For dynamic ranges: one for the tensor, or one for each vector along the last axis."),
    ] = "tensor"
    clip: Annotated[
        float | None,
        Field(
            gt=0, allow_inf_nan=False, description="For dynamic ranges: clip inputs to ±clip first (TernaryBERT: 2.5)."
        ),
    ] = None
    calibration: Annotated[
        Literal["minmax", "percentile", "mse"],
        Field(description="For static ranges: min-max, a percentile, or the range of least squared error."),
    ] = "minmax"
    percentile: Annotated[
        Percentile, Field(description="For the calibration percentile: per cent that are not clipped.")
    ] = 99.99

    @model_validator(mode="after")
    def _belongs_together(self) -> ActivationScheme:
        if self.range != "dynamic" and (self.granularity != "tensor" or self.clip is not None):
            raise ValueError(
                f"granularity token and clip must go with range dynamic, got range {self.range}: a range that does "
                "not depend on the input is the same for all tokens, and clips by itself"
            )
        if self.range != "static" and self.calibration != "minmax":
            raise ValueError(
                f"calibration {self.calibration} must go with range static, got range {self.range}: dynamic ranges are "
                "not calibrated, and learned ones are initialized as in their paper"
            )
        return self

    def resolved(self, *, one_sided: bool) -> ActivationScheme:
        """The same scheme, with ``auto`` resolved.

        Args:
            one_sided: whether the activation comes from a softmax, a GELU or the like, mostly on one side of 0.

        Returns:
            A scheme whose ``symmetric`` is a bool.
        """
        return self if self.symmetric != "auto" else self.model_copy(update={"symmetric": not one_sided})

    def encoding(self) -> ActivationEncoding:
        """The description of such an activation in a checkpoint; learned ranges become static ones.

        Returns:
            The description.
        """
        symmetric = self.symmetric is True or self.symmetric == "auto"
        return ActivationEncoding(
            bits=self.bits,
            symmetric=symmetric,
            granularity=self.granularity,
            range="dynamic" if self.range == "dynamic" else "static",
            clip=self.clip,
            full=self.range == "learned" and symmetric,
        )


class Rule(_Part):
    """An override of the defaults for some modules; of two rules that match a module the later one applies."""

    modules: Annotated[
        str,
        Field(
            min_length=1,
            description="Names of parts (query, key, value, qkv, attention_out, ffn_in, ffn_out, embeddings, head, "
            "embedding_projection) or paths such as h.0.mlp.c_fc or pooler.dense; * and ? are wildcards.",
        ),
    ]
    weights: Annotated[
        WeightScheme | Default | None, Field(description="default: as configured for all; null: they stay dense.")
    ] = "default"
    activations: Annotated[
        ActivationScheme | Default | None, Field(description="Quantization of inputs; default: as for all; null: none.")
    ] = "default"

    @model_validator(mode="after")
    def _inputs_go_with_weights(self) -> Rule:
        if self.weights is None and isinstance(self.activations, ActivationScheme):
            raise ValueError(
                f"the rule for {self.modules!r} must not quantize inputs of modules it leaves dense: a matmul "
                "has integers on both sides or on none; give it weights, or leave activations out"
            )
        return self


class QuantizationConfig(_Part):
    """The quantization of weights and activations; the default is QuantGPT's at 8 bits."""

    weights: Annotated[
        WeightScheme | None, Field(description="Weights of every projection in the blocks; null leaves them dense.")
    ] = WeightScheme()
    embeddings: Annotated[
        WeightScheme | None,
        Field(description="Token embeddings, and with them a head that is tied to them; null: dense."),
    ] = WeightScheme(granularity="row")
    activations: Annotated[
        ActivationScheme | None, Field(description="Inputs of matmuls with quantized weights; null: none.")
    ] = ActivationScheme()
    attention: Annotated[
        bool, Field(description="Whether to quantize queries, keys, values and attention probabilities too.")
    ] = True
    rules: Annotated[tuple[Rule, ...], Field(description="Overrides for some modules.")] = ()
    scale_learning_rate: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="In training: learning rate of learned scales of weights; without weight decay, scheduled like "
            "the model's learning rate.",
        ),
    ] = 1e-3
    range_learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="In training: learning rate of learned ranges of activations; default: the model's.",
        ),
    ] = None
    bits_schedule: Annotated[
        tuple[tuple[Annotated[float, Field(ge=0, lt=1)], Bits], ...],
        Field(
            description="In training: bit-width of weights from each share of it on, in descending order, such as "
            "[[0.0, 8], [0.3, 4], [0.6, 2]]; no matrix gets fewer than its own. Default: its own from the beginning."
        ),
    ] = ()
    start_activations_at: Annotated[
        float,
        Field(ge=0, lt=1, description="In training: share of it after which activations are calibrated and quantized."),
    ] = 0.0
    calibration_rows: Annotated[
        int, Field(ge=1, description="In training: number of training rows to calibrate ranges on.")
    ] = 64
    calibration_batch_size: Annotated[int, Field(ge=1, description="Batch size of the calibration rows.")] = 16
    curvature_every: Annotated[
        int,
        Field(
            ge=0,
            description="In training with laq: optimizer steps between updates of the curvature from Adam's second "
            "moments, which weights the errors; 0: equal weights.",
        ),
    ] = 100
    monitor: Annotated[
        bool,
        Field(
            description="In training: whether to log the share of weights whose code has changed since the last log, "
            "which takes a byte for each weight."
        ),
    ] = True
    seed: Annotated[int, Field(ge=0, lt=1 << 32, description="Seed of the choice of calibration rows.")] = 0

    @model_validator(mode="after")
    def _from_many_to_few(self) -> QuantizationConfig:
        shares = [share for share, _ in self.bits_schedule]
        bits = [width(bits) for _, bits in self.bits_schedule]
        rising = all(a < b for a, b in zip(shares, shares[1:], strict=False))
        falling = all(a > b for a, b in zip(bits, bits[1:], strict=False))
        if self.bits_schedule and not (shares[0] == 0 and rising and falling):
            raise ValueError(
                "bits_schedule must begin at 0.0, go up in its shares and down in its bits, got "
                f"{[list(entry) for entry in self.bits_schedule]}"
            )
        return self

    def attention_scheme(self) -> ActivationScheme | None:
        """The quantization within attention: as ``activations``, if ``attention`` is on."""
        return self.activations if self.attention else None
