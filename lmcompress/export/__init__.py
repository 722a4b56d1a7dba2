"""Export to ONNX Runtime, OpenVINO, compressed-tensors and GGUF, with the codes, scales and ranges of the packed model.

Needs the extra ``onnx``, ``openvino``, ``compressed-tensors`` or ``gguf``.
"""

from lmcompress.export.compressed_tensors import CompressedTensorsReport
from lmcompress.export.config import ExportConfig
from lmcompress.export.exporting import export_model
from lmcompress.export.gguf import GGUFReport
from lmcompress.export.loading import is_exported, load_exported
from lmcompress.export.report import ExportReport
from lmcompress.export.runtime import Exported

__all__ = [
    "CompressedTensorsReport",
    "ExportConfig",
    "ExportReport",
    "Exported",
    "GGUFReport",
    "export_model",
    "is_exported",
    "load_exported",
]
