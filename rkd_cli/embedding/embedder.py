"""Anything that gives vectors, and the vectors it gives of a data set's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rkd_cli.config.resolve import read_config
from rkd_cli.data import ImageSet
from rkd_cli.data.loader import EvalLoader, PixelReader, pick_reader
from rkd_cli.embedding.batches import embed, evaluation_batch
from rkd_cli.embedding.vectors import Vectors, conversion, is_vectors, missing_notes, read_vectors
from rkd_cli.errors import CheckpointError, DataError, SettingsError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.geometry import is_unit, normalized
from rkd_cli.models import sources
from rkd_cli.models.checkpoint import read_checksum, untrained_notes
from rkd_cli.models.embedding_net import EmbeddingNet, TeacherSpace, to_device
from rkd_cli.models.exported import ExportedNet, is_exported
from rkd_cli.models.sources import Network, digest_in, digest_of, header_in, is_pretrained, located
from rkd_cli.runtime.context import Context
from rkd_cli.schemas import Fit, Header
from rkd_cli.settings import ImageSettings, flag_name

_APART = 0.005  # of a recall: more than what rounding makes


@dataclass(frozen=True)
class Source:
    """Something that gives vectors, opened: a network with its header, or vectors."""

    name: str
    digest: str
    network: Network | None = None
    header: Header | None = None
    vectors: Vectors | None = None


def open_source(
    name: str,
    weights: Path | None = None,
    l2normalize: bool = True,
    image_size: int | None = None,
    report: Reporter = silent,
) -> Source:
    """A checkpoint, an exported or a pretrained network, or a file of embeddings.

    Args:
        name: a path, ``timm:NAME`` or ``torchvision:NAME``.
        weights: of a pretrained network, in a file.
        l2normalize: whether a pretrained network's features are scaled to unit length.
        image_size, report: of a pretrained network, as ``build_backbone``.
    Raises:
        RkdError: it cannot be had.
    """
    path = Path(name)
    if holds_vectors(name):
        vectors = read_vectors(path)
        return Source(name, vectors.digest, vectors=vectors)
    network, header = sources.open_network(name, weights, l2normalize, image_size, report)
    if isinstance(network, ExportedNet):
        digest = network.digest
    else:
        digest = digest_of(network, header) if is_pretrained(name) else read_checksum(path)
    return Source(name, digest, network, header)


def holds_vectors(name: str) -> bool:
    """Whether a name is that of a vectors file.

    Raises:
        CheckpointError: it is one of a form that is not read.
    """
    if is_pretrained(name):
        return False
    if told := conversion(Path(name)):
        raise CheckpointError(told)
    return is_vectors(Path(name))


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

    def note_untrained(self, report: Reporter) -> None:
        """Say that it is a run's network before training, if it is."""
        if self.header and self.is_checkpoint:
            for note in untrained_notes(self.name, self.header):
                report(Note(note))


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
    if not is_pretrained(path) and not holds_vectors(path):
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


def teacher_space_of(embedder: Embedder, network: Network | None) -> TeacherSpace | None:
    """How a network comes into the space of its teacher, where it was trained to answer there."""
    if isinstance(network, EmbeddingNet):
        return network.teacher_space
    header = embedder.header
    return TeacherSpace(embedder.size, header.teacher_space == "unit", {}) if header and header.teacher_space else None


def check_weights(names: list[str], settings: ImageSettings) -> None:
    """That ``--weights`` are of one pretrained network.

    Raises:
        SettingsError: they are not.
    """
    pretrained = [name for name in names if is_pretrained(name)]
    if settings.weights and len(set(pretrained)) != 1:
        found = f"{len(pretrained)} pretrained networks are named" if pretrained else f"{names[0]} has its own"
        raise SettingsError(f"--weights {settings.weights}: is for one timm:NAME or torchvision:NAME, and {found}")


def with_sides(digest: str, embedder: Embedder, settings: ImageSettings) -> str:
    """The digest of a network, and the sides and fit of the images that it is given where those are not its own."""
    sides, fit, header = sides_of(embedder, settings), fit_used(embedder, settings), embedder.header
    if header is None:
        return digest
    own_sides, own_fit = sides == (header.resize, header.image_size), fit == header.fit
    return digest + ("" if own_sides else f" {sides[0]} {sides[1]}") + ("" if own_fit else f" {fit}")


def check_used(embedders: Sequence[Embedder], settings: ImageSettings) -> None:
    """That flags of pixels and of networks are for something that has them.

    Raises:
        SettingsError: embeddings are in files, or all networks compute as they were exported.
    """
    networks = [embedder for embedder in embedders if embedder.header]
    unused = [] if networks else ["resize", "image_size", "fit"]
    if all(is_exported(Path(embedder.path)) for embedder in networks):
        unused.append("precision")
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


def fit_used(embedder: Embedder, settings: ImageSettings) -> Fit:
    """How its images become squares."""
    return settings.fit or (embedder.header.fit if embedder.header else "square")


def open_reader(
    embedder: Embedder, sets: Sequence[ImageSet], settings: ImageSettings, context: Context, report: Reporter
) -> PixelReader:
    """The pixels of some sets as a network takes them, from a file of decoded images if there is one.

    Raises:
        DataError, RunError: as ``pick_reader``.
    """
    where, sides = (settings.cache, settings.cache_dir), sides_of(embedder, settings)
    sets = [images.decoded(settings.max_pixels, fit_used(embedder, settings)) for images in sets]
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
    size = _batch_of(embedder, settings, context)
    for what, images in sets.items():
        batches = EvalLoader(images, size, *sides, reader, ranks=context.ranks)
        found[what] = Embedded(images, *embed(network, batches, len(images), context, report, what))
    return found


def _batch_of(embedder: Embedder, settings: ImageSettings, context: Context) -> int:
    """Not asked for, that of the checkpoint's run: another rounds otherwise, which may turn nearly equal neighbors."""
    run = Path(embedder.path).with_name("settings.json")
    if "batch" not in settings.model_fields_set and embedder.is_checkpoint and run.is_file():
        with suppress(SettingsError):
            saved = read_config(run)
            batch, chunk = saved.get("batch"), saved.get("chunk", 0)
            if isinstance(batch, int) and isinstance(chunk, int) and batch > 0 <= chunk:
                return evaluation_batch(batch, chunk, context.device)
    return settings.batch


def recall_notes(name: str, now: Mapping[int, float], then: Mapping[int, float]) -> list[str]:
    """That a model's recalls, in percent with two decimals, are not those of its run, and why."""
    changed = [k for k in sorted(now.keys() & then.keys()) if f"{100 * now[k]:.2f}" != f"{100 * then[k]:.2f}"]
    if not changed:
        return []
    k = changed[0]
    why = "the images are others, or embedded otherwise"
    if max(abs(now[k] - then[k]) for k in changed) <= _APART:
        why = "neighbors at nearly equal distances change places with the machine, its threads, precision or batch"
    return [f"{name}: Recall@{k} is {100 * now[k]:.2f} here and was {100 * then[k]:.2f} in its run: {why}"]


def _joined(
    vectors: Vectors,
    sets: Mapping[str, ImageSet],
    settings: ImageSettings,
    context: Context,
    report: Reporter,
) -> dict[str, Embedded]:
    root = settings.data
    found = {}
    absent, zeros = list[str](), list[str]()
    for what, images in sets.items():
        joined = vectors.join(images, root)
        absent += joined.absent
        zeros += joined.zeros
        rows = [row for row in joined.rows if row is not None]
        if not rows:
            continue
        without = {path for path, row in zip(images.paths, joined.rows, strict=True) if row is None}
        kept = images.without(without) if without else images
        embeddings = torch.from_numpy(vectors.embeddings[rows])
        if settings.l2normalize:  # asked for; where they are of that length already, they stay as they are
            embeddings = normalized(embeddings)
        labels = torch.tensor(kept.labels if kept.labels is not None else [-1] * len(kept))
        found[what] = Embedded(kept, context.to_device(embeddings), context.to_device(labels))
    if not found:
        raise DataError(
            f"{vectors.path}: has an embedding of none of these images; its paths are to be relative to {root}, "
            f"for instance {[*absent, *zeros][0]}, and it has {next(iter(vectors.row))}"
        )
    for note in missing_notes(vectors.path, absent, zeros, "", "left out"):
        report(Note(note))
    return found
