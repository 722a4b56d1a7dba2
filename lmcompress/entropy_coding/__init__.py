"""Tensors as byte streams: lossless, checked, and as small as the structure of the numbers allows."""

from lmcompress.entropy_coding.coders import CODERS, Coder
from lmcompress.entropy_coding.statistics import StreamInfo, describe, describe_file, shannon_bits
from lmcompress.entropy_coding.stream import decode, encode, load_file, save_file, stream_shape, stream_tensor

__all__ = [
    "CODERS",
    "Coder",
    "StreamInfo",
    "decode",
    "describe",
    "describe_file",
    "encode",
    "load_file",
    "save_file",
    "shannon_bits",
    "stream_shape",
    "stream_tensor",
]
