"""Whatever gives embeddings of images, by the name that a user gives it: a network, an ONNX file, a vectors file."""

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
from rkd_cli.models.sources import Network, digest_of, is_pretrained, located, open_network, read_network
from rkd_cli.runtime.context import Context
from rkd_cli.schemas import Fit, Header


@dataclass(frozen=True)
class Reading:
    """Where images are and how they are read: ``root`` is what the paths of a vectors file are relative to; the others
    are the arguments of ``pick_reader``, and how many images pass at once."""

    root: Path
    cache: str
    cache_dir: Path | None
    workers: int | None
    max_pixels: int
    batch: int


@dataclass(frozen=True)
class Embedded:
    """Those images of a split that have an embedding, (N, D) float32 embeddings and (N,) labels on the device."""

    images: ImageSet
    embeddings: Tensor
    labels: Tensor


class Embedder(Protocol):
    """Gives embeddings of images."""

    name: str  # as the user gave it
    path: str  # the network's name, or where the file is
    digest: str  # of the network, or of the vectors file
    made_by: str  # what files say that its embeddings are by: the network, with sides and fit where those were changed
    size: int  # D
    unit: bool  # whether embeddings have unit length
    is_checkpoint: bool  # whether it is a checkpoint of this program, perhaps exported

    @property
    def header(self) -> Header | None:
        """What is known of a network, with how an image becomes its square; None: a vectors file."""
        ...

    @property
    def network(self) -> Network | None:
        """The network; None: a vectors file."""
        ...

    @property
    def vectors(self) -> Vectors | None:
        """The embeddings of a vectors file; None: a network."""
        ...

    def embed(
        self, sets: Mapping[str, ImageSet], reading: Reading, context: Context, report: Reporter
    ) -> dict[str, Embedded]:
        """The embeddings of some sets of images.

        Args:
            sets: by what embedding them is called.
            reading: where the images are and how they are read.
            context: of this process.
            report: is told how far it is, and which images have no embedding.
        Returns:
            Those sets of which some images have one.
        Raises:
            DataError: none has; or damaged images.
            RunError: embeddings that are not finite, memory that is full, or a worker that was killed.
        """
        ...


@dataclass
class NetworkEmbedder:
    """A checkpoint, a pretrained network, or an ONNX file of either."""

    name: str
    path: str
    digest: str
    header: Header
    opened: Network | None = None  # a file is loaded when its network is asked for
    changes: str = ""  # of sides and fit since it was trained
    vectors: None = None

    def __post_init__(self) -> None:
        self.size, self.unit = self.header.embedding_size, self.header.l2normalize
        self.made_by, self.is_checkpoint = self.digest + self.changes, not is_pretrained(self.path)

    @property
    def network(self) -> Network:
        """See ``Embedder``.

        Raises:
            CheckpointError: its file is damaged.
        """
        if self.opened is None:
            self.opened = open_network(self.path)[0]
        return self.opened

    def close(self) -> None:
        """Let go of a network that can be loaded again."""
        if self.is_checkpoint:
            self.opened = None

    @property
    def teacher_space(self) -> TeacherSpace | None:
        """How the network comes into the space of its teacher, where it was trained to answer there."""
        if isinstance(self.network, EmbeddingNet):
            return self.network.teacher_space
        kind = self.header.teacher_space
        return TeacherSpace(self.size, kind == "unit", {}) if kind else None

    def taking(self, resize: int | None, image_size: int | None, fit: Fit | None) -> NetworkEmbedder:
        """The same of other images, which its header then says.

        Args:
            resize, image_size: sides of the images and of their crops; None: as it was trained.
            fit: how an image becomes a square; None: as it was trained.
        Raises:
            SettingsError: the crop is the larger, or the network was exported for another one.
        """
        own = self.header
        sides, own_sides = (resize or own.resize, image_size or own.image_size), (own.resize, own.image_size)
        fit = fit or own.fit
        if is_exported(Path(self.path)) and sides[1] != own.image_size:
            raise SettingsError(f"--image-size {sides[1]}: {self.name} takes images of {own.image_size} pixels alone")
        if sides[1] > sides[0]:
            raise SettingsError(f"--image-size {sides[1]} is larger than --resize {sides[0]}")
        changes = "" if sides == own_sides else f" {sides[0]} {sides[1]}"
        changes += "" if fit == own.fit else f" {fit}"
        header = own.model_copy(update={"resize": sides[0], "image_size": sides[1], "fit": fit})
        return replace(self, header=header, changes=changes)

    def loaders(
        self, sets: Sequence[ImageSet], reading: Reading, context: Context, report: Reporter, first: int = 0
    ) -> list[EvalLoader]:
        """Batches of the images of each set from the one numbered ``first`` on, as the network takes them, from a file
        of decoded images if there is one.

        Raises:
            DataError, RunError: as ``pick_reader``.
        """
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
        """See ``Embedder``; ``form`` is another form of the network."""
        network = to_device(self.network if form is None else form, context.device)
        found = {}
        for (what, images), batches in zip(
            sets.items(), self.loaders([*sets.values()], reading, context, report), strict=True
        ):
            found[what] = Embedded(images, *embed(network, batches, len(images), context, report, what))
        return found


@dataclass
class VectorsEmbedder:
    """A vectors file: its rows are joined to images by their paths, and scaled to unit length where asked for."""

    name: str
    path: str
    vectors: Vectors
    unit: bool
    is_scaled: bool
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
            if self.is_scaled:  # asked for; where they are of that length already, they stay as they are
                embeddings = normalized(embeddings)
            labels = torch.tensor(left.labels if left.labels is not None else [-1] * len(left))
            found[what] = Embedded(left, context.to_device(embeddings), context.to_device(labels))
        if not found:
            raise DataError(
                f"{self.path}: has an embedding of none of these images; its paths are to be relative to "
                f"{reading.root}, for instance {[*absent, *zeros][0]}, and it has {next(iter(self.vectors.row))}"
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
    """Find what a user names, and everything that can be wrong with it.

    Args:
        name: a checkpoint, a run directory, an ONNX file, ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, or a
            vectors file.
        weights: of a pretrained network, in a file.
        unit: whether the embeddings of a pretrained network or of a vectors file are scaled to unit length; None: those
            of a network are, those of a file stay as they are.
        image_size: that a pretrained network is built for.
        report: told what of a file of weights was taken, where that is not all.
    Raises:
        RkdError: it cannot be had.
    """
    path = located(name)
    if is_pretrained(path):
        network, header = open_network(path, weights, unit is not False, image_size, report)
        return NetworkEmbedder(name, path, digest_of(network, header), header, network)
    if told := conversion(Path(path)):
        raise CheckpointError(told)
    if is_vectors(Path(path)):
        vectors = read_vectors(Path(path))
        has_unit = is_unit(torch.from_numpy(vectors.embeddings)) if unit is None else unit
        return VectorsEmbedder(name, path, vectors, has_unit, bool(unit))
    header, digest = read_network(Path(path))
    return NetworkEmbedder(name, path, digest, header)
