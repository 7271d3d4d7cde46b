"""What ``rkd evaluate`` measures of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rkd_cli.config.resolve import agree
from rkd_cli.data import ImageSet, load_dataset
from rkd_cli.data.loader import EvalLoader, pick_reader, without_damaged
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.errors import SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.inference.embed import embed
from rkd_cli.metrics import map_at_r, r_precision, recall_at_k, without_positive
from rkd_cli.models import load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.embedding_net import to_device
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.schemas import Header
from rkd_cli.settings import Dataset, EvaluateSettings


@dataclass(frozen=True)
class SplitMetrics:
    """The metrics of one split, as fractions."""

    recall: dict[int, float]
    r_precision: float
    map_at_r: float
    images: int
    without_positive: int  # queries that every metric leaves out


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one checkpoint. ``eval`` is of unseen classes, but for those of ``seen``."""

    path: Path
    header: Header
    dataset: str
    parameters: int
    train: SplitMetrics
    eval: SplitMetrics
    seen: tuple[str, ...] = ()  # evaluation classes that the network was trained on


def evaluate_checkpoints(paths: Sequence[Path], settings: EvaluateSettings, report: Reporter) -> list[Evaluation]:
    """Recall@K, R-Precision and MAP@R of checkpoints on both splits of a data set.

    Raises:
        RkdError: a file or data set that cannot be had, or flags that contradict a checkpoint.
    """
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):  # before the first minute, not after it
        agree(path, header, settings.base, settings.embedding_size, settings.l2normalize)
        if (settings.dataset or header.dataset) not in get_args(Dataset):
            raise SettingsError(f"{path}: was trained on {header.dataset}, unknown here: name a set with --dataset")
        if (settings.dataset or header.dataset) == "images":
            raise SettingsError(f"{path}: Recall@K needs classes, and photos have none: name a set with --dataset")
        resize, image_size = _sides(header, settings)
        if image_size > resize:
            raise SettingsError(f"--image-size {image_size} is larger than --resize {resize}")
    context = make_context(settings.device, settings.precision)
    return [_evaluate(path, header, settings, context, report) for path, header in zip(paths, headers, strict=True)]


def _sides(header: Header, settings: EvaluateSettings) -> tuple[int, int]:
    return settings.resize or header.resize, settings.image_size or header.image_size


def _evaluate(path: Path, header: Header, settings: EvaluateSettings, context: Context, report: Reporter) -> Evaluation:
    dataset = settings.dataset or header.dataset
    splits = load_dataset(dataset, settings.data, report)
    if settings.skip_damaged:
        splits = without_damaged(splits, settings.workers, report)
    seen = tuple(overlap(header.seen_classes, splits[1]))
    if seen:
        report(Note(seen_note(str(path), seen, "eval")))
    sides = _sides(header, settings)
    reader = pick_reader(
        settings.cache, settings.cache_dir, splits, *sides, context.device, settings.workers, report, make=False
    )
    model = to_device(load_model(path), context.device)

    def measure(split: ImageSet, name: str) -> SplitMetrics:
        batches = EvalLoader(split, settings.batch, *sides, reader)
        embeddings, labels = embed(model, batches, len(split), context, report, f"Evaluating {name} classes")
        return SplitMetrics(
            recall_at_k(embeddings, labels, settings.recall),
            r_precision(embeddings, labels),
            map_at_r(embeddings, labels),
            len(labels),
            without_positive(labels),
        )

    train, evaluation = measure(splits[0], "training"), measure(splits[1], "unseen")
    return Evaluation(path, header, dataset, model.parameter_count(), train, evaluation, seen)
