"""What a network costs: parameters, arithmetic, bytes, and time on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rkd_cli.errors import RkdError
from rkd_cli.events import Event, Reporter, RunDone
from rkd_cli.models import load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.runtime.timing import times_of

_SECONDS = 0.5  # that a latency is measured for
_BATCHES = (1, 32)


@dataclass(frozen=True)
class Cost:
    """``flops`` of one image, where a multiply-add is two; ``latency`` is {(threads, batch): median ms a batch}."""

    parameters: int
    flops: int
    file_bytes: int
    vector_bytes: int
    latency: dict[tuple[int, int], float]


def measure_cost(network: nn.Module, image_size: int, file: Path, threads: Sequence[int] = (1, 2)) -> Cost:
    """Measure a network on the CPU, where it has to be, in evaluation mode.

    Args:
        network: of uint8 images (B, 3, image_size, image_size).
        image_size: their side.
        file: that it is kept in.
        threads: numbers of threads to time with.
    """
    latency = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            size = network(_images(1, image_size)).shape[1]
        for count in threads:
            for batch in _BATCHES:
                latency[count, batch] = _milliseconds(network, _images(batch, image_size), count)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops(), file.stat().st_size, 4 * size, latency)


def time_image(network: nn.Module, image_size: int, threads: int | None = None) -> float:
    """Median milliseconds of one image on the CPU, where the network has to be.

    Args:
        network: in evaluation mode.
        image_size: side of the image.
        threads: to time with; None: as many as torch has.
    """
    with torch.inference_mode():
        return _milliseconds(network, _images(1, image_size), threads)


def timing(report: Reporter) -> Reporter:
    """A reporter that tells ``report`` all, and of a run that is done how long its best model takes for an image."""

    def tell(event: Event) -> None:
        if isinstance(event, RunDone):
            best = event.saved[0]
            with suppress(RkdError, RuntimeError, MemoryError):  # the run is done, with this figure or without
                side = read_header(best).image_size
                event = replace(event, milliseconds=time_image(load_model(best), side, threads=1))
        report(event)

    return tell


def _images(batch: int, side: int) -> torch.Tensor:
    return torch.zeros(batch, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


def _milliseconds(network: nn.Module, images: torch.Tensor, threads: int | None) -> float:
    """The median, of at least one batch."""
    return 1e3 * statistics.median(times_of(lambda: network(images), _SECONDS, threads))
