"""Make image-embedding models small: relational knowledge distillation for image retrieval."""

__version__ = "0.1.0"
