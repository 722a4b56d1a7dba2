"""OpenVINO's stateful form of a causal model: keys and values stay in the runtime between calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcompress.export.causal import PAST, PRESENT
from lmcompress.export.optional import library

BEAM_INDEX = "beam_idx"
"""Name of the input that says from which row of the last call each row goes on, as Optimum has it."""


def make_stateful(model: Any) -> None:
    """Turn past keys and values into states of the runtime, which ``beam_idx`` reorders before they are read.

    At the first call, and after a reset, the states are empty and have the batch size of ``input_ids``.

    Args:
        model: an ``openvino.Model`` with past keys and values as inputs and outputs; modified in place.
    """
    openvino = library("openvino", "openvino")
    ops = library("openvino.opset13", "openvino")
    transform = library("openvino._offline_transformations", "openvino").apply_make_stateful_transformation
    names = [port.get_any_name() for port in model.inputs if port.get_any_name().startswith(f"{PAST}.")]
    if not names:
        return
    beams = ops.parameter(name=BEAM_INDEX, dtype=np.int32, shape=openvino.PartialShape([-1]))
    beams.output(0).get_tensor().set_names({BEAM_INDEX})
    model.add_parameters([beams])
    for name in names:
        port = model.input(name)
        readers = port.get_target_inputs()
        reordered = ops.gather(port, beams, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    transform(model, {name: name.replace(PAST, PRESENT, 1) for name in names})
    _begin_empty(model, ops)


def _begin_empty(model: Any, ops: Any) -> None:
    """Without an initial value, a state would begin with the batch size that the graph was made with."""
    rows = ops.gather(ops.shape_of(model.input("input_ids"), output_type="i64"), ops.constant([0]), ops.constant(0))
    # not a literal 0, which the CPU plugin would take for the state's lasting length
    none = ops.subtract(rows, rows)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            fixed = [ops.constant(np.array([dimension.get_length()], dtype=np.int64)) for dimension in (heads, size)]
            shape = ops.concat([rows, fixed[0], none, fixed[1]], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()
