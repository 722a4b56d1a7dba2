"""Structured pruning: heads, neurons, layers and hidden dimensions are removed whole."""
