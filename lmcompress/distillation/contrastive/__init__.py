"""Contrastive distillation: each token of the student should resemble its teacher's more than other tokens' (QuantGPT).

Low-bit weights make the tokens of a sequence alike; being nearest to one's own teacher separates them again. The
losses are pure functions, one value per token or sequence; only :class:`MemoryBank` has state.
"""
