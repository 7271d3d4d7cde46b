"""Embed images with networks or vectors files, and read and write embeddings."""
