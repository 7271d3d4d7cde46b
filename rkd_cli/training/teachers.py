"""What a student learns from: a network that is asked for each batch, or its answers, kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.loader import Batch
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.vectors import Vectors, missing_notes
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter
from rkd_cli.geometry import unit_rows
from rkd_cli.models.sources import Network
from rkd_cli.runtime.context import Context
from rkd_cli.training.chunks import in_chunks
from rkd_cli.training.objective import View


class Teacher(Protocol):
    """Gives vectors of images."""

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """What it makes of a training batch; no gradient flows to it.

        Args:
            images: (N, 3, H, W) of the batch, on the device, as the student sees them.
            batch: which images they are.
            with_stages: whether feature maps are asked for; kept vectors have none.
        """
        ...

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """(N, D) embeddings of the center crops of a split and (N,) its labels, on the device.

        Args:
            images: the split.
            batches: its images in order, for a teacher that has to look at them.
            report: is told how far it is.
            what: the name of this work.
        """
        ...

    def has(self, split: str) -> bool:
        """Whether ``embed`` has an answer for this split."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen network on the device; ``chunk`` images of a training batch pass it at once, 0 for all.

    With ``unit`` its embeddings, of other lengths, are scaled to unit length.
    """

    network: Network
    context: Context
    chunk: int = 0
    unit: bool = False

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """See ``Teacher``; with stages exposed where they are asked for."""
        with torch.no_grad(), self.context.autocast():
            embeddings, stages = view_of(self.network, images, with_stages, self.chunk)
        return View(_scaled(embeddings, self.unit), stages)

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """See ``Teacher``."""
        embeddings, labels = embed(self.network, batches, len(images), self.context, report, what)
        return _scaled(embeddings, self.unit), labels

    def has(self, split: str) -> bool:
        """See ``Teacher``."""
        return True


@dataclass(frozen=True)
class KeptTeacher:
    """Vectors that were computed before; no network is in memory.

    Args:
        training: (N, K, D) of the training images in order, ``Batch.view`` saying which of the K is meant; on the
            device, or on the CPU.
        center: (N, D) of each split's images as they are evaluated, for the splits that have them.
        context: of this process.
        unit: whether they are of other lengths, and scaled to unit length here.
    """

    training: Tensor
    center: Mapping[str, Tensor]
    context: Context
    unit: bool = False

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """See ``Teacher``."""
        where = self.training.device
        index, view = (rows.to(where, non_blocking=where.type == "cuda") for rows in (batch.index, batch.view))
        found = self.training[index, view]
        if where.type != self.context.device.type:
            found = found.pin_memory()  # so that the copy does not wait
        return View(_scaled(self.context.to_device(found).float(), self.unit), [])

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """See ``Teacher``."""
        labels = torch.tensor(images.labels if images.labels is not None else [-1] * len(images))
        embeddings = self.context.to_device(self.center[images.name]).float()
        return _scaled(embeddings, self.unit), self.context.to_device(labels)

    def has(self, split: str) -> bool:
        """See ``Teacher``."""
        return split in self.center


def _scaled(embeddings: Tensor, unit: bool) -> Tensor:
    return unit_rows(embeddings).to(embeddings.dtype) if unit else embeddings


def join_vectors(
    vectors: Vectors, splits: Mapping[str, ImageSet], root: Path, context: Context, unit: bool = False
) -> KeptTeacher:
    """The teacher that a file of embeddings is.

    Args:
        vectors: with one for every image of ``train``.
        splits: by their names; those of which it has all images can be measured.
        root: what the file's paths are relative to.
        context: of this process.
        unit: as ``KeptTeacher``.
    """
    found: dict[str, Tensor] = {}
    for name, images in splits.items():
        rows = [row for row in vectors.join(images, root).rows if row is not None]
        if len(rows) == len(images):
            found[name] = torch.from_numpy(vectors.embeddings[rows])
    return KeptTeacher(context.store(found["train"][:, None]), found, context, unit)


def without_vectors(
    vectors: Vectors, splits: Mapping[str, ImageSet], root: Path, report: Reporter
) -> dict[str, ImageSet]:
    """The splits, the training images left out that the file has no embedding of, and without labels those of every
    split; notes name what does not match.

    Raises:
        DataError: it has none of the training images, or of another split without labels.
    """
    joined = {name: vectors.join(images, root) for name, images in splits.items()}
    left_out = [name for name, images in splits.items() if name == "train" or images.labels is None]
    for name in left_out:
        if all(row is None for row in joined[name].rows):
            first = relative_names(splits[name].paths[:1], root)[0]
            raise DataError(
                f"{vectors.path}: has no {'training' if name == 'train' else name} image; its paths are to be relative "
                f"to {root}, for instance {first}, and it has {next(iter(vectors.row))}"
            )
    for name, found in joined.items():
        then = "they are left out" if name in left_out else "the teacher is not measured there"
        for note in missing_notes(vectors.path, found.absent, found.zeros, f"{name} ", then):
            report(Note(note))
    used = {row for found in joined.values() for row in found.rows}
    surplus = [name for name, row in vectors.row.items() if row not in used]
    if surplus:
        report(Note(f"{vectors.path}: {len(surplus):,} embeddings of no image here, for instance {min(surplus)}"))

    def with_rows(name: str, images: ImageSet) -> ImageSet:
        gone = {path for path, row in zip(images.paths, joined[name].rows, strict=True) if row is None}
        return images.without(gone) if gone and name in left_out else images

    return {name: with_rows(name, images) for name, images in splits.items()}


def view_of(network: Network, images: Tensor, with_stages: bool, chunk: int = 0) -> View:
    """What a network makes of images, ``chunk`` at a time (0: all at once); for stages it has them exposed."""

    def run(part: Tensor) -> list[Tensor]:
        if not with_stages:
            return [network(part).float()]
        embeddings, stages = network(part, with_features=True)
        return [embeddings.float(), *(stage.float() for stage in stages)]

    embeddings, *stages = in_chunks(network, run, images, chunk)
    return View(embeddings, stages)
