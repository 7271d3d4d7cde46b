"""Embedding networks: built by name, or loaded from a checkpoint alone."""

from rkd_cli.models.embedding_net import EmbeddingNet, build_model, load_model

__all__ = ["EmbeddingNet", "build_model", "load_model"]
