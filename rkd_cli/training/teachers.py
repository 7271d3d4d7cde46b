"""Teachers of a student: a network that embeds each batch, or stored embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rkd_cli.models.joined import side_by_side
from rkd_cli.models.sources import Network
from rkd_cli.runtime.context import Context
from rkd_cli.training.chunks import in_chunks
from rkd_cli.training.objective import View


class Teacher(Protocol):
    """A network, or stored embeddings."""

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """The output for a training batch, without gradient. Stored embeddings have no feature maps.

        ``images`` are (N, 3, H, W) on the device, augmented as for the student.
        """
        ...

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """(N, D) embeddings of the center crops of a split and (N,) labels, on the device.

        ``batches`` are those of the split, in order; ``what`` names the work in progress and errors.
        """
        ...

    def has(self, split: str) -> bool:
        """Whether ``embed`` has embeddings of this split."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen network on the device."""

    network: Network
    context: Context
    chunk: int = 0  # images of a training batch per forward pass, 0 for all
    form: Callable[[Tensor], Tensor] | None = None  # of embeddings: ``at_unit_length``, or a ``JoinedSpace``

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """See ``Teacher``. Stages must be exposed before."""
        with torch.no_grad(), self.context.inference_autocast(self.network):
            embeddings, stages = view_of(self.network, images, with_stages, self.chunk)
        return View(_formed(embeddings, self.form), stages)

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """See ``Teacher``."""
        embeddings, labels = embed(self.network, batches, len(images), self.context, report, what)
        return _formed(embeddings, self.form), labels

    def has(self, split: str) -> bool:
        """See ``Teacher``."""
        return True


@dataclass(frozen=True)
class CachedTeacher:
    """Vectors that were computed before; no network is in memory.

    Args:
        training: (N, K, D) of the training images in order, ``Batch.view`` saying which of the K is meant; on the
            device, or on the CPU.
        center: (N, D) of each split's images as they are evaluated, for the splits that have them.
        context: of this process.
        form: of the vectors when they are read, as of a ``LiveTeacher``.
    """

    training: Tensor
    center: Mapping[str, Tensor]
    context: Context
    form: Callable[[Tensor], Tensor] | None = None

    def view(self, images: Tensor, batch: Batch, with_stages: bool) -> View:
        """See ``Teacher``."""
        where = self.training.device
        index, view = (rows.to(where, non_blocking=where.type == "cuda") for rows in (batch.index, batch.view))
        found = self.training[index, view]
        if where.type != self.context.device.type:
            found = found.pin_memory()  # so that the copy does not wait
        return View(_formed(self.context.to_device(found).float(), self.form), [])

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """See ``Teacher``."""
        labels = torch.tensor(images.labels if images.labels is not None else [-1] * len(images))
        return self.rows(images.name), self.context.to_device(labels)

    def rows(self, split: str, step: int = 1) -> Tensor:
        """(N, D) of every ``step``-th image of a split, on the device."""
        return _formed(self.context.to_device(self.center[split][::step]).float(), self.form)

    def has(self, split: str) -> bool:
        """See ``Teacher``."""
        return split in self.center


def at_unit_length(embeddings: Tensor) -> Tensor:
    """(N, D) rows scaled to unit length, in their dtype."""
    return unit_rows(embeddings).to(embeddings.dtype)


def _formed(embeddings: Tensor, form: Callable[[Tensor], Tensor] | None) -> Tensor:
    return form(embeddings) if form else embeddings


def join_vectors(
    files: Sequence[Vectors],
    splits: Mapping[str, ImageSet],
    root: Path,
    context: Context,
    form: Callable[[Tensor], Tensor] | None = None,
) -> CachedTeacher:
    """The teacher of vectors files, several ``side_by_side``, for the splits complete in each; ``train`` must be."""
    found: dict[str, Tensor] = {}
    for name, images in splits.items():
        rows = [[row for row in vectors.join(images, root).rows if row is not None] for vectors in files]
        if all(len(own) == len(images) for own in rows):
            parts = [torch.from_numpy(vectors.embeddings[own]) for vectors, own in zip(files, rows, strict=True)]
            found[name] = side_by_side(parts) if len(parts) > 1 else parts[0]
    return CachedTeacher(context.store(found["train"][:, None]), found, context, form)


def without_vectors(
    vectors: Vectors, splits: Mapping[str, ImageSet], root: Path, report: Reporter
) -> dict[str, ImageSet]:
    """The splits without the images that the file lacks, after notes about them.

    With labels, only ``train`` is reduced: the teacher is not measured on other incomplete splits. Raises a DataError
    if no image of a split is left.
    """
    joined = {name: vectors.join(images, root) for name, images in splits.items()}
    left_out = [name for name, images in splits.items() if name == "train" or images.labels is None]
    for name in left_out:
        if all(row is None for row in joined[name].rows):
            first = relative_names(splits[name].paths[:1], root)[0]
            raise DataError(
                f"{vectors.path}: has no embedding of the {name} images. Its paths must be relative to "
                f"{root}, such as {first}, but it has {next(iter(vectors.row))}."
            )
    for name, found in joined.items():
        then = "they are left out" if name in left_out else "the teacher is not measured there"
        for note in missing_notes(vectors.path, found.absent, found.zeros, f"{name} ", then):
            report(Note(note))
    used = {row for found in joined.values() for row in found.rows}
    surplus = [name for name, row in vectors.row.items() if row not in used]
    if surplus:
        report(Note(f"{vectors.path}: {len(surplus):,} embeddings match no image, such as {min(surplus)}"))

    def with_rows(name: str, images: ImageSet) -> ImageSet:
        gone = {path for path, row in zip(images.paths, joined[name].rows, strict=True) if row is None}
        return images.without(gone) if gone and name in left_out else images

    return {name: with_rows(name, images) for name, images in splits.items()}


def view_of(network: Network, images: Tensor, with_stages: bool, chunk: int = 0) -> View:
    """The output of a network for images, ``chunk`` at a time (0: all at once). Stages must be exposed before."""

    def run(part: Tensor) -> list[Tensor]:
        if not with_stages:
            return [network(part).float()]
        embeddings, stages = network(part, with_features=True)
        return [embeddings.float(), *(stage.float() for stage in stages)]

    embeddings, *stages = in_chunks(network, run, images, chunk)
    return View(embeddings, stages)
