"""Networks and vectors files that embed images, and the files of embeddings."""
