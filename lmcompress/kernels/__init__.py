"""Matmuls with quantized weights: one file per kernel, and the dispatch that uses the first one that works."""
