"""Open what a user names: a network, an ONNX file or a vectors file. All of them embed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.loader import EvalLoader, pick_reader
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.vectors import Vectors, conversion, is_vectors, missing_notes, read_vectors
from rkd_cli.errors import CheckpointError, DataError, SettingsError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.geometry import is_unit, normalized
from rkd_cli.models.embedding_net import EmbeddingNet, TeacherSpace, to_device
from rkd_cli.models.exported import is_exported
from rkd_cli.models.inference import for_inference
from rkd_cli.models.joined import JOINED_VECTORS, JoinedSpace, side_by_side
from rkd_cli.models.sources import (
    Network,
    check_teacher,
    digest_of,
    is_pretrained,
    located,
    open_network,
    read_network,
)
from rkd_cli.runtime.context import Context
from rkd_cli.schemas import Fit, Header


@dataclass(frozen=True)
class Reading:
    """How images are read: arguments of ``pick_reader`` and the batch size."""

    root: Path  # of the paths in a vectors file
    cache: str
    cache_dir: Path | None
    workers: int | None
    max_pixels: int
    batch: int


@dataclass(frozen=True)
class Embedded:
    """The images of a split that have an embedding, (N, D) float32 embeddings and (N,) labels on the device."""

    images: ImageSet
    embeddings: Tensor
    labels: Tensor


class Embedder(Protocol):
    """A network or a vectors file."""

    name: str  # as the user gave it
    path: str  # a file, or the name of a pretrained network
    digest: str  # of the network, or of the vectors file
    made_by: str  # stored in vectors files: the network's digest, and changed sides and fit
    size: int  # D
    unit: bool  # whether embeddings have unit length
    is_checkpoint: bool  # of this program, perhaps exported

    @property
    def header(self) -> Header | None:
        """The header of a network, with its preprocessing; None for a vectors file."""
        ...

    @property
    def network(self) -> Network | None:
        """The network; None for a vectors file."""
        ...

    @property
    def vectors(self) -> Vectors | None:
        """The content of a vectors file; None for a network."""
        ...

    def embed(
        self, sets: Mapping[str, ImageSet], reading: Reading, context: Context, report: Reporter
    ) -> dict[str, Embedded]:
        """Embed sets of images, by the names of the work. Sets without any embedding are left out.

        Raises:
            DataError: damaged images, or no image has an embedding.
            RunError: embeddings are not finite, memory is full, or a worker was killed.
        """
        ...


@dataclass
class NetworkEmbedder:
    """A checkpoint, a pretrained network, or an ONNX file of either."""

    name: str
    path: str
    digest: str
    header: Header
    opened: Network | None = None  # a file is loaded when the network is first used
    changes: str = ""  # of sides and fit since training
    vectors: None = None

    def __post_init__(self) -> None:
        self.size, self.unit = self.header.embedding_size, self.header.l2normalize
        self.made_by, self.is_checkpoint = self.digest + self.changes, not is_pretrained(self.path)

    @property
    def network(self) -> Network:
        """The network; a CheckpointError if its file is damaged."""
        if self.opened is None:
            self.opened = open_network(self.path)[0]
        return self.opened

    def close(self) -> None:
        """Free the memory of a network that can be loaded again."""
        if self.is_checkpoint:
            self.opened = None

    @property
    def teacher_space(self) -> TeacherSpace | None:
        """The projection into the teacher's space, if the network was trained for it."""
        if isinstance(self.network, EmbeddingNet):
            return self.network.teacher_space
        kind = self.header.teacher_space
        return TeacherSpace(self.size, kind == "unit", {}) if kind else None

    def with_preprocessing(self, resize: int | None, image_size: int | None, fit: Fit | None) -> NetworkEmbedder:
        """The network with another preprocessing in its header; None: as trained, ``resize`` in proportion.

        Raises:
            SettingsError: the crop is larger than the image, or does not fit an exported network.
        """
        own = self.header
        side, own_sides = image_size or own.image_size, (own.resize, own.image_size)
        sides = (resize or round(own.resize * side / own.image_size), side)
        fit = fit or own.fit
        if is_exported(Path(self.path)) and sides[1] != own.image_size:
            only = own.image_size
            raise SettingsError(f"--image-size {sides[1]}: {self.name} only takes {only} pixel images. Omit the flag.")
        if sides[1] > sides[0]:
            raise SettingsError(f"--image-size {sides[1]}: is larger than --resize {sides[0]}. Lower it.")
        changes = "" if sides == own_sides else f" {sides[0]} {sides[1]}"
        changes += "" if fit == own.fit else f" {fit}"
        header = own.model_copy(update={"resize": sides[0], "image_size": sides[1], "fit": fit})
        return replace(self, header=header, changes=changes)

    def loaders(
        self, sets: Sequence[ImageSet], reading: Reading, context: Context, report: Reporter, first: int = 0
    ) -> list[EvalLoader]:
        """Batches of each set from image ``first`` on, read from a pixel cache if one exists."""
        sides, fit = (self.header.resize, self.header.image_size), self.header.fit
        decoded = [images.decoded(reading.max_pixels, fit) for images in sets]
        where = (reading.cache, reading.cache_dir)
        reader = pick_reader(*where, decoded, *sides, context.device, reading.workers, report, make=None)
        return [EvalLoader(images, reading.batch, *sides, reader, first, context.ranks) for images in sets]

    def embed(
        self,
        sets: Mapping[str, ImageSet],
        reading: Reading,
        context: Context,
        report: Reporter,
        form: nn.Module | None = None,
    ) -> dict[str, Embedded]:
        """See ``Embedder``. ``form`` replaces the network, for example its ONNX form."""
        network = to_device(self.network if form is None else form, context.device)
        if form is None:
            total = sum(map(len, sets.values()))
            network = for_inference(network.eval(), self.header.image_size, total, context, report)
        found = {}
        for (what, images), batches in zip(
            sets.items(), self.loaders([*sets.values()], reading, context, report), strict=True
        ):
            found[what] = Embedded(images, *embed(network, batches, len(images), context, report, what))
        return found


@dataclass
class VectorsEmbedder:
    """A vectors file. Its rows are matched to images by path."""

    name: str
    path: str
    vectors: Vectors
    unit: bool
    is_scaled: bool  # scale rows to unit length
    header: None = None
    network: None = None
    is_checkpoint: bool = False

    def __post_init__(self) -> None:
        self.digest, self.made_by, self.size = self.vectors.digest, self.vectors.model, self.vectors.size

    def embed(
        self, sets: Mapping[str, ImageSet], reading: Reading, context: Context, report: Reporter
    ) -> dict[str, Embedded]:
        """See ``Embedder``."""
        found = {}
        absent, zeros = list[str](), list[str]()
        for what, images in sets.items():
            joined = self.vectors.join(images, reading.root)
            absent += joined.absent
            zeros += joined.zeros
            rows = [row for row in joined.rows if row is not None]
            if not rows:
                continue
            without = {path for path, row in zip(images.paths, joined.rows, strict=True) if row is None}
            left = images.without(without) if without else images
            embeddings = torch.from_numpy(self.vectors.embeddings[rows])
            if self.is_scaled:
                embeddings = normalized(embeddings)
            labels = torch.tensor(left.labels if left.labels is not None else [-1] * len(left))
            found[what] = Embedded(left, context.to_device(embeddings), context.to_device(labels))
        if not found:
            raise DataError(
                f"{self.path}: has no embedding of these images. Its paths must be relative to {reading.root}, "
                f"such as {[*absent, *zeros][0]}, but it has {next(iter(self.vectors.row))}."
            )
        for note in missing_notes(self.vectors.path, absent, zeros, "", "left out"):
            report(Note(note))
        return found


def open_embedder(
    name: str,
    weights: Path | None = None,
    unit: bool | None = None,
    image_size: int | None = None,
    report: Reporter = silent,
) -> NetworkEmbedder | VectorsEmbedder:
    """Open what a user names; an RkdError if that fails.

    Args:
        name: a checkpoint, a run directory, an ONNX file, ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, or a
            vectors file.
        weights: a weights file for a pretrained network.
        unit: scale embeddings of a pretrained network or a vectors file to unit length; None: only of a network.
        image_size: to build a pretrained network for.
    """
    path = located(name)
    if is_pretrained(path):
        network, header = open_network(path, weights, unit is not False, image_size, report)
        return NetworkEmbedder(name, path, digest_of(network, header), header, network)
    if problem := conversion(Path(path)):
        raise CheckpointError(problem)
    if is_vectors(Path(path)):
        vectors = read_vectors(Path(path))
        has_unit = is_unit(torch.from_numpy(vectors.embeddings)) if unit is None else unit
        return VectorsEmbedder(name, path, vectors, has_unit, bool(unit))
    header, digest = read_network(Path(path))
    if header.base == JOINED_VECTORS:
        return VectorsEmbedder(name, path, _joined_vectors(Path(path), header, digest), True, False)
    return NetworkEmbedder(name, path, digest, header)


def _joined_vectors(path: Path, header: Header, digest: str) -> Vectors:
    """The images that all vectors files of a file of teachers have, in their space."""
    parts = []
    for name, expected in header.teachers:
        part = open_embedder(name)
        check_teacher(path, name, expected, part.digest)
        assert part.vectors
        parts.append(part.vectors)
    names = [name for name in parts[0].row if all(name in part.row for part in parts)]
    if not names:
        raise DataError(f"{path}: its teachers have no image in common. Distil again.")
    space = JoinedSpace([part.size for part in parts], header.embedding_size)
    space.read(path)
    rows = side_by_side([torch.from_numpy(part.embeddings[[part.row[name] for name in names]]) for part in parts])
    return Vectors(path, space(rows).numpy(), {name: index for index, name in enumerate(names)}, digest)
