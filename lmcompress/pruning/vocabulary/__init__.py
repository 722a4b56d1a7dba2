"""Vocabulary pruning: tokens that a task never uses are removed from the tokenizer and from the embeddings."""
