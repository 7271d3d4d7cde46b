"""Embedding networks: build one by name, or load one from a checkpoint."""

from rkd_cli.models.embedding_net import EmbeddingNet, build_model, load_model

__all__ = ["EmbeddingNet", "build_model", "load_model"]
