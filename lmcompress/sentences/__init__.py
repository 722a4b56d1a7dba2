"""Sentence encoders in the folders of sentence-transformers, compressed as any encoder, and rerankers."""

from lmcompress.sentences.encoder import SentenceEncoder
from lmcompress.sentences.folder import is_sentence_encoder
from lmcompress.sentences.reranking import reranker_scores

__all__ = ["SentenceEncoder", "is_sentence_encoder", "reranker_scores"]
