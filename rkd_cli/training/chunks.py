"""Batches in chunks: less memory for activations, one extra forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def in_chunks(network: nn.Module, run: Callable[[Tensor], list[Tensor]], images: Tensor, chunk: int) -> list[Tensor]:
    """``run(images)`` with the activations of at most ``chunk`` images in memory; 0: of all images.

    This is GradCache (Gao, Zhang, Han, Callan; RepL4NLP 2021; arXiv 2101.06983). The forward pass stores no
    activations. The backward pass recomputes each chunk with the same random state, so the gradient is that of the
    whole batch. Batch norm takes its statistics per chunk and updates its running statistics in the first pass only.
    """
    if not chunk or len(images) <= chunk:
        return run(images)
    # nearly equal sizes: batch norm cannot train on a single image
    parts = images.tensor_split(-(-len(images) // chunk))
    made = [checkpoint(run, part, use_reentrant=False, context_fn=partial(_passes, network)) for part in parts]
    return [torch.cat(tensors) for tensors in zip(*made, strict=True)]


def _passes(network: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _buffers_unchanged(network)  # of the first and the second pass


@contextmanager
def _buffers_unchanged(network: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
