"""What the memory of a large batch is that passes in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from figures import run
from rkd_cli.bench.measure import Measurement, Meter, free_memory, seconds_of
from rkd_cli.data.loader import Batch
from rkd_cli.losses import RKDAngle, RKDDistance
from rkd_cli.models import build_model
from rkd_cli.models.embedding_net import freeze, to_device
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.doctor import peak_memory
from rkd_cli.settings import BenchSettings
from rkd_cli.training.objective import Objective, OnEmbeddings
from rkd_cli.training.step import DistillStep, update_weights
from rkd_cli.training.teachers import LiveTeacher


def measure_chunks(settings: BenchSettings, meter: Meter) -> Iterator[Measurement]:
    """A step of distillation: a whole batch, one eight times as large in chunks of that, and the large one whole.

    Args:
        settings: of the benchmark: networks and ``image_size``.
        meter: whose device is computed on.
    """
    small = 8 if settings.quick else 128
    large, sides = 8 * small, f"{settings.teacher_base} to {settings.base}, {settings.image_size} pixels"
    meter.tell(f"a step of {small} images")
    seconds, peak = _step(settings, small, 0)
    yield Measurement(f"distillation step, batch of {small}: {sides}", seconds, bytes=peak)
    meter.tell(f"a step of {large:,} images, in chunks of {small} and whole")
    large_seconds, large_peak = _step(settings, large, small)
    # the whole of a large one is left out where it may not fit
    whole = _step(settings, large, 0) if peak and free_memory(meter.device) > 16 * peak else (None, None)
    yield Measurement(
        f"distillation step, batch of {large:,}: in chunks of {small} beside whole",
        large_seconds,
        whole[0],
        large_peak,
        whole[1],
    )


def _step(settings: BenchSettings, batch: int, chunk: int) -> tuple[float, int | None]:
    """In a process of its own, whose heap has not grown yet."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_step_here, settings, batch, chunk).result()


def _step_here(settings: BenchSettings, batch: int, chunk: int) -> tuple[float, int | None]:
    """Seconds of a step, and bytes of main memory (of the device's, on CUDA) at the peak beyond the networks and what
    a step of eight images takes."""
    context = make_context(settings.device, settings.precision)
    student, teacher = (build_model(base, 64, False) for base in (settings.base, settings.teacher_base))
    for network in (student, freeze(teacher)):
        to_device(network, context.device)
    objective = Objective({"dist": (1.0, OnEmbeddings(RKDDistance())), "angle": (2.0, OnEmbeddings(RKDAngle()))})
    step = DistillStep(student, LiveTeacher(teacher, context, chunk), [objective], 0, context, chunk)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    side = settings.image_size

    def learn(count: int) -> None:
        images, index = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count)
        update_weights(optimizer, step(Batch(images, index, index, index * 0), 1))

    learn(8)  # the optimizer's state, and what libraries make once
    before = _peak(context.device)
    seconds = seconds_of(lambda: learn(batch), context.device)
    after = _peak(context.device)
    return seconds, after - before if after and before else None


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


if __name__ == "__main__":
    run(measure_chunks, __doc__, "teacher_base", "base", "image_size", "precision")
