"""lmcompress: compresses transformer language models with little loss of accuracy.

Importing this package tells Transformers how to load what it writes: afterwards, ``AutoModel*.from_pretrained``
rebuilds compressed checkpoints like any others.
"""

from lmcompress.checkpoint.config import CompressionConfig
from lmcompress.checkpoint.loader import register
from lmcompress.errors import CheckpointError, EquivalenceError, LmcompressError, UnknownFamilyError
from lmcompress.families import anatomy_of
from lmcompress.model import CompressedModel

register()

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompressedModel",
    "CompressionConfig",
    "EquivalenceError",
    "LmcompressError",
    "UnknownFamilyError",
    "__version__",
    "anatomy_of",
]
