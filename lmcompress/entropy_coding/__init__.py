"""Tensors as streams of bytes: lossless, checked, and as small as the structure of the numbers allows."""

from lmcompress.entropy_coding.stream import (
    CODERS,
    Coder,
    StreamInfo,
    decode,
    describe,
    describe_file,
    encode,
    load_file,
    save_file,
    shannon_bits,
    stream_shape,
    stream_tensor,
)

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
