"""Anything that gives vectors, and the vectors it gives of a data set's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.loader import EvalLoader, PixelReader, pick_reader
from rkd_cli.data.vectors import Vectors, is_vectors, relative_names
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.inference.embed import embed
from rkd_cli.models.embedding_net import to_device
from rkd_cli.models.exported import is_exported
from rkd_cli.models.sources import Network, Source, digest_in, header_in, is_pretrained, located, open_source
from rkd_cli.runtime.context import Context
from rkd_cli.schemas import Header
from rkd_cli.settings import ImageSettings, flag_name

_UNIT = 1e-3  # by which the length of a vector that was scaled to 1, perhaps in float16, may be off


@dataclass(frozen=True)
class Embedder:
    """Something that gives vectors, as it was found before the first image is looked at.

    Args:
        name: as the user gave it.
        path: the network's name, or where the file is.
        size: of its embeddings.
        l2normalize: whether they have unit length.
        header: of a network; None for embeddings in a file.
        source: None for a checkpoint or an exported network, which are loaded when their turn comes.
    """

    name: str
    path: str
    size: int
    l2normalize: bool
    header: Header | None
    source: Source | None

    @property
    def vectors(self) -> Vectors | None:
        """The embeddings of a file."""
        return self.source.vectors if self.source else None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of ours, perhaps exported."""
        return self.source is None


@dataclass(frozen=True)
class Embedded:
    """Those images of a split that have an embedding, (N, D) float32 embeddings and (N,) labels on the device."""

    images: ImageSet
    embeddings: Tensor
    labels: Tensor


def look_up(name: str, settings: ImageSettings, report: Reporter = silent) -> Embedder:
    """Find what a user names, and everything that can be wrong with it.

    Args:
        name: as it was given.
        settings: of the command.
        report: told what of a file of weights was taken, where that is not all.
    Raises:
        RkdError: it cannot be had.
    """
    path = located(name)
    if not is_pretrained(path) and not is_vectors(Path(path)):
        header = header_in(Path(path))
        return Embedder(name, path, header.embedding_size, header.l2normalize, header, None)
    weights = settings.weights if is_pretrained(path) else None
    source = open_source(path, weights, settings.l2normalize is not False, settings.image_size, report)
    if source.vectors:
        unit = settings.l2normalize
        if unit is None:
            unit = is_unit(torch.from_numpy(source.vectors.embeddings))
        return Embedder(name, path, source.vectors.size, unit, None, source)
    assert source.header is not None  # a source has the one or the other
    return Embedder(name, path, source.header.embedding_size, source.header.l2normalize, source.header, source)


def open_network(embedder: Embedder) -> Network | None:
    """Its network, None where it has its embeddings in a file.

    Raises:
        CheckpointError: its file is damaged.
    """
    return (embedder.source or open_source(embedder.path)).network


def model_digest(embedder: Embedder) -> str:
    """Of the network behind the vectors; empty for embeddings in a file that does not say.

    Raises:
        CheckpointError: its file is damaged.
    """
    if embedder.vectors:
        return embedder.vectors.model
    if embedder.source:
        return embedder.source.digest
    return digest_in(Path(embedder.path))


def check_weights(names: list[str], settings: ImageSettings) -> None:
    """That ``--weights`` are of one pretrained network.

    Raises:
        SettingsError: they are not.
    """
    pretrained = [name for name in names if is_pretrained(name)]
    if settings.weights and len(set(pretrained)) != 1:
        found = f"{len(pretrained)} pretrained networks are named" if pretrained else f"{names[0]} has its own"
        raise SettingsError(f"--weights {settings.weights}: is for one timm:NAME or torchvision:NAME, and {found}")


def check_used(embedders: Sequence[Embedder], settings: ImageSettings) -> None:
    """That flags of pixels and of networks are for something that has them.

    Raises:
        SettingsError: embeddings are in files, or all networks compute as they were exported.
    """
    networks = [embedder for embedder in embedders if embedder.header]
    unused = () if networks else ("resize", "image_size")
    if all(is_exported(Path(embedder.path)) for embedder in networks):
        unused += ("precision",)
    who = f"{embedders[0].name} holds embeddings" if not networks else f"{networks[0].name} computes as it was exported"
    given = [name for name in unused if name in settings.model_fields_set]
    if given:
        raise SettingsError(*(f"{flag_name(name)}: has no effect, {who}: leave it out" for name in given))


def sides_of(embedder: Embedder, settings: ImageSettings) -> tuple[int, int]:
    """What its images are resized and cropped to.

    Raises:
        SettingsError: the crop is the larger, or the network was exported for another one.
    """
    if embedder.header is None:
        return settings.resize or 0, settings.image_size or 0
    resize, image_size = settings.resize or embedder.header.resize, settings.image_size or embedder.header.image_size
    if is_exported(Path(embedder.path)) and image_size != embedder.header.image_size:
        side = embedder.header.image_size
        raise SettingsError(f"--image-size {image_size}: {embedder.name} takes images of {side} pixels alone")
    if image_size > resize:
        raise SettingsError(f"--image-size {image_size} is larger than --resize {resize}")
    return resize, image_size


def open_reader(
    embedder: Embedder, sets: Sequence[ImageSet], settings: ImageSettings, context: Context, report: Reporter
) -> PixelReader:
    """The pixels of some sets as a network takes them, from a file of decoded images if there is one.

    Raises:
        DataError, RunError: as ``pick_reader``.
    """
    where, sides = (settings.cache, settings.cache_dir), sides_of(embedder, settings)
    return pick_reader(*where, sets, *sides, context.device, settings.workers, report, make=None)


def embed_sets(
    embedder: Embedder,
    network: nn.Module | None,
    sets: Mapping[str, ImageSet],
    settings: ImageSettings,
    context: Context,
    report: Reporter,
) -> dict[str, Embedded]:
    """The embeddings of some sets of images.

    Args:
        embedder: what gives them.
        network: of ``open_network``, or another form of it.
        sets: by what embedding them is called.
        settings: where the images are and how they are read.
        context: of this process.
        report: is told how far it is, and which images have no embedding.
    Returns:
        Those sets of which some images have one.
    Raises:
        DataError: none has; or damaged images.
        RunError: embeddings that are not finite, memory that is full, or a worker that was killed.
    """
    if embedder.vectors:
        return _joined(embedder.vectors, sets, settings, context, report)
    sides = sides_of(embedder, settings)
    reader = open_reader(embedder, tuple(sets.values()), settings, context, report)
    assert network is not None  # an embedder has the one or the other
    to_device(network, context.device)
    found = {}
    for what, images in sets.items():
        batches = EvalLoader(images, settings.batch, *sides, reader, ranks=context.ranks)
        found[what] = Embedded(images, *embed(network, batches, len(images), context, report, what))
    return found


def _joined(
    vectors: Vectors,
    sets: Mapping[str, ImageSet],
    settings: ImageSettings,
    context: Context,
    report: Reporter,
) -> dict[str, Embedded]:
    root = settings.data
    found, missing = {}, []
    for what, images in sets.items():
        rows = vectors.rows_of(images, root)
        without = {path for path, row in zip(images.paths, rows, strict=True) if row is None}
        missing += [path for path in images.paths if path in without]
        if len(without) == len(images):
            continue
        kept = images.without(without) if without else images
        embeddings = torch.from_numpy(vectors.embeddings[[row for row in rows if row is not None]])
        if settings.l2normalize:  # asked for; where they are of that length already, they stay as they are
            embeddings = F.normalize(embeddings, dim=1)
        labels = torch.tensor(kept.labels if kept.labels is not None else [-1] * len(kept))
        found[what] = Embedded(kept, context.to_device(embeddings), context.to_device(labels))
    if missing:
        first = relative_names(missing[:1], root)[0]
        if not found:
            raise DataError(
                f"{vectors.path}: has an embedding of none of these images; its paths are to be relative to {root}, "
                f"for instance {first}, and it has {next(iter(vectors.row))}"
            )
        count = f"{len(missing):,} image{'' if len(missing) == 1 else 's'}"
        report(Note(f"{vectors.path}: no embedding of {count}, the first {first}: left out"))
    return found


def is_unit(embeddings: Tensor) -> bool:
    """Whether all rows of (N, D) have a length of 1, but for the rounding of float16."""
    return bool(((torch.linalg.vector_norm(embeddings, dim=1) - 1).abs() < _UNIT).all())
