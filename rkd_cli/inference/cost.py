"""What a network costs: parameters, arithmetic, bytes, and time on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_SECONDS = 0.5  # that a latency is measured for
_LEAST = 3  # batches, however long they take


@dataclass(frozen=True)
class Cost:
    """``flops`` of one image, where a multiply-add is two; ``latency`` is {(threads, batch): median ms a batch}."""

    parameters: int
    flops: int
    file_bytes: int | None
    vector_bytes: int
    latency: dict[tuple[int, int], float]


def measure_cost(
    network: nn.Module,
    image_size: int,
    file: Path | None,
    threads: Sequence[int] = (1, 2),
    batches: Sequence[int] = (1, 32),
) -> Cost:
    """Measure a network on the CPU, where it has to be, in evaluation mode.

    Args:
        network: of uint8 images (B, 3, image_size, image_size).
        image_size: their side.
        file: that it is kept in.
        threads: numbers of threads to time with.
        batches: sizes of batches to time.
    """
    before = torch.get_num_threads()
    latency = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            size = network(_images(1, image_size)).shape[1]
        try:
            for count in threads:
                torch.set_num_threads(count)
                for batch in batches:
                    latency[count, batch] = _milliseconds(network, _images(batch, image_size))
        finally:
            torch.set_num_threads(before)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    bytes = file.stat().st_size if file else None
    return Cost(parameters, counter.get_total_flops(), bytes, 4 * size, latency)


def time_image(network: nn.Module, image_size: int) -> float:
    """Median milliseconds of one image on the CPU, where the network has to be, with as many threads as torch has."""
    with torch.inference_mode():
        return _milliseconds(network, _images(1, image_size))


def _images(batch: int, side: int) -> torch.Tensor:
    return torch.zeros(batch, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


def _milliseconds(network: nn.Module, images: torch.Tensor) -> float:
    network(images)
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < _SECONDS:
        start = time.perf_counter()
        network(images)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
