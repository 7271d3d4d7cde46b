"""The textbook's side of a benchmark, in this process or as ``python -m rkd_cli.bench.reference``.

The separate process has torch's default allocator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from rkd_cli.bench import textbook
from rkd_cli.bench.apart import Apart, answer
from rkd_cli.bench.cases import KS, cases, images_of, sampler_of
from rkd_cli.bench.measure import begin, default_precision
from rkd_cli.data import ImageSet
from rkd_cli.mining import DistanceWeighted
from rkd_cli.models import build_model
from rkd_cli.settings import BenchSettings


def apart(settings: BenchSettings, part: str, case: str = "", ours: bool = False) -> Apart:
    """The textbook's work in its own process, with as many threads as this one.

    ``part`` is step, epoch or loader; ``case`` is teacher or distillation; ``ours`` runs rkd's work instead.
    """
    side = "ours" if ours else "textbook"
    threads = str(torch.get_num_threads())
    return Apart(["-m", "rkd_cli.bench.reference", settings.model_dump_json(), part, case, side, threads])


def training(settings: BenchSettings, case: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """The textbook's step of a fixed batch, and its epoch with the evaluation of both splits."""
    if case == "teacher":
        network = _plain(settings.teacher_base, 512, True, device)
        loss = textbook.triplet_step(network, DistanceWeighted(published=True), 0.2)
    else:
        network = _plain(settings.base, 64, False, device)
        loss = textbook.rkd_step(network, _plain(settings.teacher_base, 512, True, device))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=1e-5)
    train_set, eval_set = images_of(settings)
    sides, workers = (settings.resize, settings.image_size), settings.workers
    crops = textbook.Images(train_set.paths, train_set.labels or (), *sides, train=True)
    loader: Any = DataLoader(crops, batch_sampler=sampler_of(settings, train_set), num_workers=workers)
    loaders: list[Any] = [
        DataLoader(
            textbook.Images(split.paths, split.labels or (), *sides, train=False), settings.batch, num_workers=workers
        )
        for split in (train_set, eval_set)
    ]
    images, labels = next(iter(loader))
    fixed: Any = [(images.to(device), labels.to(device))]

    def step() -> None:
        with default_precision(device):
            textbook.train_epoch(network, loss, fixed, optimizer, settings.freeze_bn)

    def epoch() -> None:
        with default_precision(device):
            textbook.train_epoch(network, loss, loader, optimizer, settings.freeze_bn)
            for split in loaders:
                textbook.evaluate(network, split, KS)

    return {"step": step, "epoch": epoch}


def one_batch(settings: BenchSettings) -> tuple[ImageSet, list[int], int, int]:
    """A batch for the part loader: images, their indices, side to resize to, side of the crop."""
    resize, side, batch = (40, 32, 8) if settings.quick else (256, 224, 128)
    images = images_of(settings)[0]
    return images, list(islice(cycle(range(len(images))), batch)), resize, side


def _loading(settings: BenchSettings) -> Callable[[], object]:
    images, indices, resize, side = one_batch(settings)
    theirs = textbook.Images(images.paths, images.labels or (), resize, side, train=True, as_bytes=True)
    return lambda: torch.stack([theirs[index][0] for index in indices])


def _plain(base: str, size: int, l2normalize: bool, device: torch.device) -> nn.Module:
    model = build_model(base, size, l2normalize)
    layers = [model.base, nn.Flatten(), model.linear]
    return nn.Sequential(*layers, *([textbook.UnitLength()] if l2normalize else [])).to(device)


def _main(given: str, part: str, case: str, side: str, threads: str) -> None:
    settings, meter = begin(side, given, threads)

    def serve(work: Callable[[], object]) -> None:
        answer(lambda seconds: meter.times(work, seconds), lambda: meter.peak(work, resident=part == "epoch"))

    if side == "textbook":
        serve(_loading(settings) if part == "loader" else training(settings, case, meter.device)[part])
        return
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        found = next(found for found in cases(settings, Path(scratch)) if found.name == case)
        serve({"step": found.step, "epoch": found.epoch}[part])


if __name__ == "__main__":
    _main(*sys.argv[1:])
