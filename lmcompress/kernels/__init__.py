"""Matmuls with quantized weights: one file per kernel, and the dispatch that takes the first that works."""
