"""Post-training quantization: a model is planned, quantized block by block, and packed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import get_args

from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch
from lmcompress.activations.hooks import valid_tokens
from lmcompress.activations.running import evaluating
from lmcompress.activations.walking import calibration_batches
from lmcompress.errors import LmcompressError, nearest
from lmcompress.evaluation import weight_bytes
from lmcompress.families import inner_model
from lmcompress.families.refusal import refuse_unproven
from lmcompress.model import CompressedModel, unwrapped
from lmcompress.quantization.config import QuantizationConfig, WeightScheme
from lmcompress.quantization.fake import FakeQuantized
from lmcompress.quantization.planning import Plan, plan
from lmcompress.quantization.ptq.checks import Method, check_post_training, refuse_quantized
from lmcompress.quantization.ptq.run import PostTrainingRun, measured_batches
from lmcompress.quantization.report import QuantizationReport

POST_TRAINING = QuantizationConfig(
    weights=WeightScheme(quantizer="mse", granularity="row"),
    embeddings=WeightScheme(quantizer="mse", granularity="row"),
    attention=False,
)
"""8 bits per row, inputs of 8 bits: retains quality without training."""


def quantize(
    model: PreTrainedModel | CompressedModel,
    config: QuantizationConfig = POST_TRAINING,
    batches: Iterable[Batch] | None = None,
    *,
    method: Method = "rtn",
    damping: float = 0.01,
    order: bool = True,
    output_errors: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model without training it, and pack it.

    Blocks are processed in order. In each, query, key and value come first, then the modules they feed, and every
    matrix is rounded for its actual inputs: those from already quantized matrices and activations. Static ranges
    of activations are calibrated on the same inputs. Padding is ignored.

    Token embeddings are rounded to nearest whatever the method: each row is read alone, so that no other weight
    could compensate an error.

    Args:
        model: a model of a known family, stock or cut; packed in place. Any error leaves it unchanged.
        config: the configuration. Learned quantizers and ranges need training and are refused.
        batches: calibration data, some hundred sequences: model inputs, labels are ignored; any form that
            :func:`~lmcompress.activations.batches.as_batches` takes: batches, a ``DataLoader``, a ``Dataset``. With
            ``rtn`` they are needed only for static ranges. With them the report has the error of the last hidden
            state, on the first batches of some :data:`MEASURED_TOKENS` tokens.
        method: ``rtn`` rounds to nearest; ``gptq`` compensates each rounding error by the weights not rounded yet
            (:func:`~lmcompress.quantization.ptq.gptq.gptq`); ``awq`` gives important inputs finer steps if the
            family allows it (:func:`~lmcompress.quantization.ptq.awq.scalings`) and rounds the others to nearest.
        damping: for ``gptq``: fraction of the mean of the Hessian's diagonal that is added to it.
        order: for ``gptq``: whether to begin with the largest inputs.
        output_errors: whether the report has the error of each matrix at its outputs on the calibration data in place
            of that of its weights. ``gptq`` needs the second moments of inputs itself and always reports it; for the
            others they cost several forward passes over all data.
        progress: whether to show a bar, on a terminal.

    Returns:
        The result, with the error of each matrix.

    Raises:
        LmcompressError: If the method is unknown, something is learned, the model is packed or quantized already,
            calibration data are missing, empty or all padding, weights or activations are NaN or infinite, the method
            has nothing to do, or :func:`~lmcompress.quantization.planning.plan` refuses the config.
    """
    started = time.perf_counter()
    inner = inner_model(unwrapped(model))
    if method not in get_args(Method):
        raise LmcompressError(f"unknown method {method!r}{nearest(method, get_args(Method))}")
    refuse_quantized(inner)
    refuse_unproven(inner, method)
    planned = plan(inner, config)
    check_post_training(inner, planned, method)
    data = _data(inner, planned, batches, method, output_errors)
    before = weight_bytes(inner).total
    fake = FakeQuantized(inner, planned, with_states=False)
    run = PostTrainingRun(inner, fake, data, method, damping, order, output_errors)
    try:
        fake.set_enabled(False)
        with evaluating(inner):
            run.all(progress)
        fake.finish()
    except BaseException:
        fake.remove()
        run.undo()
        raise
    return QuantizationReport(
        method=method,
        config=config.model_dump(mode="json"),
        matrices=[run.rows[matrix.path] for matrix in planned.matrices],
        dense=dict(planned.dense),
        bytes_before=before,
        bytes_after=weight_bytes(inner).total,
        hidden_error=run.hidden_error,
        tokens=0 if data is None else sum(int(valid_tokens(batch).sum()) for batch in data),
        attention=None if planned.attention is None else planned.attention.bits,
        seconds=time.perf_counter() - started,
    )


def _data(
    model: PreTrainedModel, planned: Plan, batches: Iterable[Batch] | None, method: Method, output_errors: bool
) -> list[dict[str, Tensor]] | None:
    static = [m.path for m in planned.matrices if m.inputs is not None and m.inputs.range == "static"]
    static += ["attention"] if planned.attention is not None and planned.attention.range == "static" else []
    if batches is not None:
        data = calibration_batches(model, batches)
        # nothing but the error of the last hidden state depends on them
        return data if method != "rtn" or static or output_errors else data[: measured_batches(data)]
    if method != "rtn" or static or output_errors:
        needs = (
            f"method {method!r}"
            if method != "rtn"
            else f"the static range of {static[0]}"
            if static
            else "output_errors=True"
        )
        raise LmcompressError(
            f"{needs} must have calibration data, got batches=None: give it some hundred sequences, or use "
            "method='rtn' with dynamic ranges"
        )
    return None
