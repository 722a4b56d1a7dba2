"""Whether a graph of the model is being recorded for another runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch

# torch 2.5 and 2.6 have none
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def recording() -> bool:
    """Whether operations are recorded for a graph that leaves this process.

    That is in ``torch.jit.trace``, ``torch.export``, both exporters of ``torch.onnx``, and converters that use one of
    these, such as OpenVINO's; not in ``torch.compile``. A graph holds tensor operations only: Python's numbers would be
    those of its example, and autograd functions and kernels of this processor do not exist elsewhere.
    """
    return _is_exporting() or torch._C._get_tracing_state() is not None
