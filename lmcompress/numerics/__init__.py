"""Numbers on a few levels: quantizers of weights and activations, and the bytes that hold their codes."""
