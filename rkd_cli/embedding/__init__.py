"""Whatever gives embeddings of images, and the files that hold them."""
