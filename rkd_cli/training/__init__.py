"""The training loop, its steps, and the files of a run."""
