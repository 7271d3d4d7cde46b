"""What `rkd evaluate` measures of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rkd_cli.data import load_dataset
from rkd_cli.data.loader import EvalLoader, pick_reader
from rkd_cli.errors import SettingsError
from rkd_cli.events import Reporter
from rkd_cli.inference.embed import embed
from rkd_cli.metrics import map_at_r, r_precision, recall_at_k, without_positive
from rkd_cli.models import checkpoint
from rkd_cli.models.checkpoint import Header
from rkd_cli.models.embedding_net import load_model, placed
from rkd_cli.runtime.device import pick_device, pick_precision
from rkd_cli.settings import Dataset, EvaluateSettings
from rkd_cli.training.build import agree


@dataclass(frozen=True)
class Judgement:
    """The metrics of one split, as fractions."""

    recall: dict[int, float]
    r_precision: float
    map_at_r: float
    images: int
    without_positive: int  # queries that every metric leaves out


@dataclass(frozen=True)
class Evaluation:
    """What was found of one checkpoint."""

    path: Path
    header: Header
    dataset: str
    parameters: int
    train: Judgement
    unseen: Judgement


def evaluate_checkpoints(paths: Sequence[Path], settings: EvaluateSettings, report: Reporter) -> list[Evaluation]:
    """Recall@K, R-Precision and MAP@R of checkpoints on both splits of a data set.

    Raises:
        RkdError: a file or data set that cannot be had, or flags that contradict a checkpoint.
    """
    headers = [checkpoint.read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):  # before the first minute, not after it
        agree(path, header, settings.base, settings.embedding_size, settings.l2normalize)
        if (settings.dataset or header.dataset) not in get_args(Dataset):
            raise SettingsError(f"{path}: was trained on {header.dataset}, unknown here: name a set with --dataset")
        resize, image_size = _sizes(header, settings)
        if image_size > resize:
            raise SettingsError(f"--image-size {image_size} is larger than --resize {resize}")
    return [_evaluate(path, header, settings, report) for path, header in zip(paths, headers, strict=True)]


def _sizes(header: Header, settings: EvaluateSettings) -> tuple[int, int]:
    return settings.resize or header.resize, settings.image_size or header.image_size


def _evaluate(path: Path, header: Header, settings: EvaluateSettings, report: Reporter) -> Evaluation:
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    dataset = settings.dataset or header.dataset
    splits = load_dataset(dataset, settings.data, report)
    sizes = _sizes(header, settings)
    reader = pick_reader(
        settings.cache, settings.cache_dir, splits, *sizes, device, settings.workers, report, make=False
    )
    model = placed(load_model(path), device)
    judgements = []
    for name, split in zip(("training", "unseen"), splits, strict=True):
        batches = EvalLoader(split, settings.batch, *sizes, reader)
        embeddings, labels = embed(model, batches, device, precision, report, f"Evaluating {name} classes")
        judgements.append(
            Judgement(
                recall_at_k(embeddings, labels, settings.recall),
                r_precision(embeddings, labels),
                map_at_r(embeddings, labels),
                len(labels),
                without_positive(labels),
            )
        )
    return Evaluation(path, header, dataset, model.parameter_count(), *judgements)
