"""Batches whose activations do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def in_chunks(network: nn.Module, run: Callable[[Tensor], list[Tensor]], images: Tensor, chunk: int) -> list[Tensor]:
    """``run(images)``, where activations of no more than ``chunk`` images are kept at any time (GradCache: Gao, Zhang,
    Han, Callan; RepL4NLP 2021; arXiv 2101.06983).

    Chunks pass the network first without anything kept for their gradient. Whoever goes back from what is given, with
    a loss of all of them, has each chunk pass again, with the random state that it had, and go back at once: the
    gradient is that of the whole batch, for a forward pass more. A batch norm takes its statistics of each chunk; its
    running statistics move with the first pass of a chunk alone.

    Args:
        network: whose buffers the second pass leaves alone.
        run: what it makes of images: tensors of (N, ...) each.
        images: (N, 3, H, W).
        chunk: 0 for the whole batch.
    """
    if not chunk or len(images) <= chunk:
        return run(images)
    # of nearly one size, so that no batch norm is left with a single image
    parts = images.tensor_split(-(-len(images) // chunk))
    made = [checkpoint(run, part, use_reentrant=False, context_fn=partial(_passes, network)) for part in parts]
    return [torch.cat(tensors) for tensors in zip(*made, strict=True)]


def _passes(network: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first and the second pass of a chunk run in."""
    return nullcontext(), _buffers_kept(network)


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
