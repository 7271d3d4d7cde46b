"""The trainings that are measured: ours and the textbook's, of the same networks and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rkd_cli.bench import textbook
from rkd_cli.bench.measure import default_precision
from rkd_cli.data import BalancedBatchSampler, ImageSet, load_dataset
from rkd_cli.data.loader import Batch
from rkd_cli.data.sets.demo import make_demo
from rkd_cli.events import Event, silent
from rkd_cli.mining import DistanceWeighted
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.step import update_weights

SIDE = 433  # pixels: as many as CUB's 500 x 375 have
KS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One training, ours and the textbook's."""

    name: str
    run: Run
    batch: Batch  # on the device
    our_step: Callable[[], object]
    their_step: Callable[[], object]
    their_epoch: Callable[[], object]

    def our_epoch(self) -> EpochDone:
        """Training and the evaluation of both splits."""
        seen: list[Event] = []
        train(self.run, seen.append)
        return next(event for event in seen if isinstance(event, EpochDone) and event.epoch)


def cases(settings: BenchSettings, scratch: Path, device: torch.device, cache: str = "disk") -> Iterator[Case]:
    """Teacher training, then distillation from that teacher, which stays in ``scratch`` as ``teacher.safetensors``."""
    places = {"cache": cache, "cache_dir": scratch / "cache", "overwrite": True, "weights": "none", "epochs": 1}
    chosen = settings.model_dump(include=set(TeacherSettings.model_fields) - {"base", "dataset", "data", "save_dir"})
    dataset, data = place_of(settings)
    common: dict[str, Any] = chosen | places | {"dataset": dataset, "data": data}
    teacher_run = build_run(TeacherSettings(**common, base=settings.teacher_base, save_dir=scratch / "teacher"), silent)
    checkpoint = scratch / "teacher.safetensors"
    save_model(checkpoint, teacher_run.model.state_dict(), teacher_run.header)
    miner = DistanceWeighted(published=True)
    teacher = _plain(settings.teacher_base, 512, True, device)

    def teacher_loss(images: Tensor, labels: Tensor) -> Tensor:
        embeddings = teacher(images)
        return textbook.triplet_loss(embeddings, miner(embeddings, labels), 0.2)

    yield _case("teacher", settings, teacher_run, teacher, teacher_loss)

    distill_run = build_run(
        DistillSettings(**common, base=settings.base, teacher=str(checkpoint), save_dir=scratch / "student"), silent
    )
    student, frozen = _plain(settings.base, 64, False, device), _plain(settings.teacher_base, 512, True, device).eval()

    def distill_loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = frozen(images)
        learned = student(images)
        return textbook.distance_loss(learned, taught) + 2 * textbook.angle_loss(learned, taught)

    yield _case("distillation", settings, distill_run, student, distill_loss)


def _case(name: str, settings: BenchSettings, run: Run, network: nn.Module, loss: textbook.Step) -> Case:
    batch = next(run.loader.epoch(1))
    batch = Batch(*map(run.context.to_device, batch))

    def our_step() -> None:
        run.begin_training()
        update_weights(run.optimizer, run.step(batch, 1))

    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=1e-5)
    floats = run.model.normalize(batch.images).contiguous()
    train_set, eval_set = images_of(settings)
    sides = settings.resize, settings.image_size
    sampler = sampler_of(settings, train_set)
    workers: dict[str, Any] = {"num_workers": settings.workers}
    loader: Any = DataLoader(
        textbook.Images(train_set.paths, train_set.labels or (), *sides, train=True), batch_sampler=sampler, **workers
    )
    loaders: list[Any] = [
        DataLoader(textbook.Images(split.paths, split.labels or (), *sides, train=False), settings.batch, **workers)
        for split in (train_set, eval_set)
    ]

    fixed: Any = [(floats, batch.labels)]

    def their_step() -> None:
        with default_precision(run.context.device):
            textbook.train_epoch(network, loss, fixed, optimizer)

    def their_epoch() -> None:
        with default_precision(run.context.device):
            textbook.train_epoch(network, loss, loader, optimizer)
            for split in loaders:
                textbook.evaluate(network, split, KS)

    return Case(name, run, batch, our_step, their_step, their_epoch)


def sampler_of(settings: BenchSettings, images: ImageSet) -> BalancedBatchSampler:
    """What draws the batches.

    Raises:
        DataError: the images do not fill one.
    """
    each, batches = settings.num_image_per_class, settings.iter_per_epoch
    return BalancedBatchSampler(images.labels, settings.batch, each, batches, settings.seed)


def _plain(base: str, size: int, l2normalize: bool, device: torch.device) -> nn.Module:
    model = build_model(base, size, l2normalize)
    layers = [model.base, nn.Flatten(), model.linear]
    return nn.Sequential(*layers, *([textbook.UnitLength()] if l2normalize else [])).to(device)


def images_of(settings: BenchSettings) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split.

    Raises:
        RkdError: images that cannot be had.
    """
    return load_dataset(*place_of(settings))


def place_of(settings: BenchSettings) -> tuple[str, Path]:
    """The data set that is asked for, or drawn JPEGs as large as CUB's."""
    if settings.dataset:
        return settings.dataset, settings.data
    folder = settings.data / ("bench-small" if settings.quick else "bench-birds")
    # half of the species fill the default batch
    make_demo(folder, species=26, images=10, size=60 if settings.quick else SIDE)
    return "cub200", folder
