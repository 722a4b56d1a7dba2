"""Contrastive distillation: a token of the student is to resemble its teacher's more than other tokens do (QuantGPT).

Low-bit weights make the tokens of a sequence alike; being nearest to one's own teacher pulls them apart again. The
losses are pure functions, one value per token or sequence; :class:`MemoryBank` is the only thing that has a state.
"""
