"""The rkd trainings to measure. ``reference`` has the textbook's, with the same networks and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rkd_cli.data import BalancedBatchSampler, ImageSet, load_dataset
from rkd_cli.data.loader import Batch
from rkd_cli.data.sets.demo import make_demo
from rkd_cli.events import Event, silent
from rkd_cli.models.backbones import build_backbone
from rkd_cli.models.checkpoint import save_model
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.step import update_weights

SIDE = 433  # as many pixels as CUB's 500 x 375
KS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One training."""

    name: str
    run: Run
    batch: Batch  # its images on the device

    def step(self) -> None:
        """One step, always with the same batch."""
        self.run.begin_training()
        update_weights(self.run.optimizer, self.run.step(self.batch, 1))

    def epoch(self) -> EpochDone:
        """An epoch of training, and the evaluation of both splits."""
        seen: list[Event] = []
        train(self.run, seen.append)
        return next(event for event in seen if isinstance(event, EpochDone) and event.epoch)


def cases(settings: BenchSettings, scratch: Path, cache: str = "disk") -> Iterator[Case]:
    """Teacher training, then distillation from that teacher, ``teacher.safetensors`` in ``scratch``."""
    places = {"cache": cache, "cache_dir": scratch / "cache", "overwrite": True, "epochs": 1}
    chosen = settings.model_dump(include=set(TeacherSettings.model_fields) - {"base", "dataset", "data", "save_dir"})
    dataset, data = place_of(settings)
    common: dict[str, Any] = chosen | places | {"dataset": dataset, "data": data}

    def network(base: str) -> dict[str, Any]:
        """Random weights, as a file with ``--freeze-bn``, which needs statistics."""
        if not settings.freeze_bn:
            return {"base": base, "weights": "none"}
        path = scratch / "weights.pth"
        torch.save(build_backbone(base, "none").network.state_dict(), path)
        return {"base": base, "weights": str(path)}

    teacher_run = build_run(
        TeacherSettings(**common, **network(settings.teacher_base), save_dir=scratch / "teacher"), silent
    )
    checkpoint = scratch / "teacher.safetensors"
    save_model(checkpoint, teacher_run.model.state_dict(), teacher_run.header)
    yield _case("teacher", teacher_run)
    distill_run = build_run(
        DistillSettings(**common, **network(settings.base), teacher=str(checkpoint), save_dir=scratch / "student"),
        silent,
    )
    yield _case("distillation", distill_run)


def _case(name: str, run: Run) -> Case:
    batch = next(run.loader.epoch(1))
    return Case(name, run, batch._replace(images=run.context.to_device(batch.images)))


def sampler_of(settings: BenchSettings, images: ImageSet) -> BalancedBatchSampler:
    """The batch sampler; a DataError if the images do not fill a batch."""
    each, batches = settings.num_image_per_class, settings.iter_per_epoch
    return BalancedBatchSampler(images.labels, settings.batch, each, batches, settings.seed)


def images_of(settings: BenchSettings) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split."""
    return load_dataset(*place_of(settings))


def place_of(settings: BenchSettings) -> tuple[str, Path]:
    """``--dataset`` and ``--data``, or generated JPEGs of CUB's size."""
    if settings.dataset:
        return settings.dataset, settings.data
    folder = settings.data / ("bench-small" if settings.quick else "bench-birds")
    # half of the classes fill the default batch
    make_demo(folder, species=26, images=10, size=60 if settings.quick else SIDE)
    return "cub200", folder
