"""The settings of an export: keys of a recipe, and options of the command line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Target = Literal["onnx", "openvino", "compressed-tensors", "gguf"]
"""The runtime or format that a model is exported to."""

Activations = Literal["auto", "static", "dynamic", "none"]
"""How activations are quantized in the graph."""

Weights = Literal["auto", "f32", "f16", "q8_0", "q4_0", "q4_1"]
"""How matrices are stored in a GGUF file."""

Pooling = Literal["mean", "cls", "max"]
"""How the vectors of tokens become the vector of a sentence."""

OLDEST_OPSET, NEWEST_OPSET = 18, 23


class ExportConfig(BaseModel):
    """The settings of an export.

    Attributes:
        to: ``onnx`` for ONNX Runtime, ``openvino`` for OpenVINO, ``compressed-tensors`` for a stock checkpoint of
            that format, which has the settings ``activations`` (``auto`` or ``none``) and ``tolerance``, or ``gguf``
            for llama.cpp, which has these and ``weights``.
        task: what the graph computes, a name of :data:`lmcompress.export.tasks.TASKS`; None: what the model's class is
            for. ``embeddings`` takes the model without its task head.
        activations: how activations are quantized in the graph. ``auto``: as the model was trained or calibrated,
            except that dynamic ranges become static for OpenVINO, which has integer matmuls for those only; ``static``:
            dynamic ranges are calibrated on the given batches; ``dynamic``: ranges are computed by the runtime;
            ``none``: weights only.
        opset: version of ONNX's operators.
        tolerance: relative error of outputs allowed between the exported model and the packed one with the same ranges:
            norm of the difference over norm of the output; None: 0.1.
        agreement: smallest share of equal answers (classes, tokens) allowed; None: not checked, as few rows say little.
        pooling: pooling of ``embeddings``: ``mean`` over tokens, the first token (``cls``), or ``max``; None: the
            tokens' vectors only.
        normalize: whether the vectors of sentences have length 1.
        stateful: whether the keys and values of a causal model stay in the runtime between calls, for OpenVINO; else
            they are inputs and outputs, as they always are for ONNX Runtime.
        weights: for GGUF: ``auto`` keeps the codes of packed matrices and the type of dense ones; else the type that
            every matrix is converted to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: Target = "onnx"
    task: str | None = None
    activations: Activations = "auto"
    opset: Annotated[int, Field(ge=OLDEST_OPSET, le=NEWEST_OPSET)] | None = None
    tolerance: Annotated[float, Field(gt=0)] | None = None
    agreement: Annotated[float, Field(gt=0, le=1)] | None = None
    pooling: Pooling | None = None
    normalize: bool = False
    stateful: bool = True
    weights: Weights = "auto"

    @model_validator(mode="after")
    def _settings_of_the_target(self) -> ExportConfig:
        if self.to != "gguf" and self.weights != "auto":
            raise ValueError(f"weights must be left out for {self.to}, got {self.weights!r}: it is a setting of gguf")
        if self.to not in ("compressed-tensors", "gguf"):
            return self
        set_here = {name for name in type(self).model_fields if getattr(self, name) != _default(self, name)}
        if foreign := sorted(set_here - {"to", "activations", "tolerance", "weights"}):
            raise ValueError(f"{', '.join(foreign)} must be left out for {self.to}, which has no graph")
        if self.to == "gguf" and self.activations not in ("auto", "none"):
            raise ValueError(
                f"activations must be auto or none for gguf, which quantizes none, got {self.activations!r}"
            )
        return self


def _default(config: ExportConfig, name: str) -> object:
    return type(config).model_fields[name].default
