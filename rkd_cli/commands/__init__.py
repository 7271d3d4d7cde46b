"""The commands of ``rkd`` except training, one per file."""
