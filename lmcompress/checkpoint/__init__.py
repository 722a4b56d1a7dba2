"""A compressed checkpoint: its config, its structure, its encoded weights, its streams, its loader and its card."""
