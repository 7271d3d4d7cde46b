"""``rkd embed``: write embeddings of images, optionally reduced by PCA, to a vectors file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rkd_cli import __version__
from rkd_cli.commands.options import (
    check_length,
    check_used,
    check_weights,
    note_untrained,
    open_named,
    reading,
)
from rkd_cli.compress import Rows, apply_pca, fit_half_whitened, fit_pca, vector_bytes
from rkd_cli.data import ImageSet, find_dataset, load_dataset
from rkd_cli.data.cache import boxes_text
from rkd_cli.data.decode import AS_DISPLAYED, DECODER
from rkd_cli.data.loader import Batch, without_damaged
from rkd_cli.data.members import joined
from rkd_cli.data.sets.listing import image_set
from rkd_cli.data.sets.lists import is_list, read_list
from rkd_cli.data.sets.packed import is_packed, read_packed
from rkd_cli.data.splits import relative_names
from rkd_cli.data.walk import note_left_out, walk
from rkd_cli.embedding.batches import embed_batches
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder, VectorsEmbedder
from rkd_cli.embedding.formats import check_writer, npy_model, npy_paths, write_vectors
from rkd_cli.embedding.store import Store, image_stamps, open_store, unfinished
from rkd_cli.embedding.vectors import is_vectors, read_vectors
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.models.embedding_net import to_device
from rkd_cli.models.inference import for_inference
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.distributed import ranks
from rkd_cli.runtime.files import refuse_existing
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import EmbedSettings

_WORK = "Embedding images"
_FORMAT = 3  # of unfinished files


@dataclass(frozen=True)
class Written:
    """A written vectors file."""

    name: str  # of the network
    images: int
    size: int
    settings: EmbedSettings
    holds: str  # --dataset, or the kind of data set found in the folder; empty if none
    images_per_second: float | None  # with decoding; None if all were embedded before

    @property
    def path(self) -> Path:
        """--out."""
        return self.settings.out

    @property
    def paths(self) -> Path | None:
        """The file with the paths, for npy."""
        return next(iter(_extra_files(self.path)), None)

    @property
    def has_map(self) -> bool:
        """Whether it contains a PCA."""
        return self.settings.pca is not None and self.path.suffix != ".npy"


def embed_file(name: str, settings: EmbedSettings, report: Reporter) -> Written:
    """Embed images and write the file atomically. Processes divide the images; the main process writes."""
    out, part, who = settings.out, unfinished(settings.out), ranks()
    for path in (out, *_extra_files(out)) if who.is_first else ():
        refuse_existing("--out", path, settings.overwrite)
    check_weights([name], settings)
    with who.first():
        embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    check_used([embedder], settings)
    check_length(embedder, settings.l2normalize)
    if embedder.vectors and embedder.vectors.kind == "binary":
        raise SettingsError(f"{embedder.name}: binary embeddings cannot be converted. Name a float or int8 file.")
    pca = _read_pca(settings.pca_file, embedder) if settings.pca_file else None
    context = make_context(settings.device, settings.precision)
    images = _images(settings, report)
    _check_components(settings, len(images), embedder)
    check_writer(out, relative_names(images.paths, settings.data))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # fail before the work
    except OSError as error:
        raise RunError(f"{out.parent}: cannot be created ({error.strerror}). Choose another --out.") from None
    if not who.is_first:
        speed = None
        if isinstance(embedder, NetworkEmbedder):
            speed = _embed(None, np.empty(0), embedder, images, settings, context, report)
        size = settings.pca_size or (len(pca[1]) if pca else embedder.size)
        return _written(name, len(images), size, settings, speed)
    if isinstance(embedder, VectorsEmbedder):
        (embedded,) = embedder.embed({_WORK: images}, reading(settings), context, report).values()
        _check_components(settings, len(embedded.images), embedder)  # the file may lack images
        return _write(name, embedded.embeddings, embedded.images, embedder, pca, settings, context, None)
    _check_room(out, len(images), embedder.size, settings.vectors)
    try:
        stamps = image_stamps(images.paths, settings.data)
        busy = RunError(f"--out {out}: another rkd embed is writing it. Wait for it, or name another file.")
        facts = _facts(embedder, context)
        if boxes := boxes_text(images.paths, images.decoding):
            facts["other boxes"] = [hashlib.sha256(boxes.encode()).hexdigest()]
        with open_store(part, facts, embedder.size, device=context.device, busy=busy) as store:
            store.truncate_to_matching(stamps)
            speed = _embed(store, stamps, embedder, images, settings, context, report)
            written = _write(name, store, images, embedder, pca, settings, context, speed)
            part.unlink(missing_ok=True)
    except OSError as error:
        remedy = "Free some space and run the command again" + (", which resumes" if part.exists() else "")
        raise RunError(
            f"{part}: cannot be written ({error.strerror or error}). {remedy}, or choose another --out."
        ) from None
    return written


def _extra_files(out: Path) -> list[Path]:
    return [npy_paths(out), npy_model(out)] if out.suffix == ".npy" else []


def _facts(embedder: NetworkEmbedder, context: Context) -> dict[str, object]:
    """All that the embeddings depend on except the images, by what a note says if it changed."""
    header = embedder.header
    return {
        "another version": [_FORMAT, __version__, torch.__version__],
        "another model": [embedder.digest, embedder.size, embedder.unit],
        "another --resize or --image-size": [header.resize, header.image_size],
        "another --fit": [header.fit],
        "another decoder": [DECODER],
        "another --device or --precision": [context.device.type, context.inference_precision(embedder.network)],
    }


def _check_room(out: Path, count: int, size: int, vectors: str) -> None:
    """Raise a RunError unless the unfinished file and the finished one both fit on the disk."""
    try:
        present = unfinished(out).stat().st_size
    except OSError:
        present = 0
    needed = count * (4 * size + vector_bytes(vectors, size)) - present
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"--out {out}: needs {needed / 1e6:,.0f} MB while it is written, and {free / 1e6:,.0f} MB are free. Name a "
            "file on another disk."
        )


def _embed(
    store: Store | None,
    stamps: np.ndarray,
    embedder: NetworkEmbedder,
    images: ImageSet,
    settings: EmbedSettings,
    context: Context,
    report: Reporter,
) -> float | None:
    """Append the missing rows; returns images/s, or None if no row was missing. Only the main process has a store."""
    total, ranks = len(images), context.ranks
    ranks.wait()  # the main process stamps all images first
    if store and store.changed:
        report(Note(f"{settings.out}: embedded before from {store.changed}. Starting over."))
    if store and store.done < total:
        store.truncate(store.done // settings.batch * settings.batch)  # the batches of an uninterrupted run
    first = done = ranks.largest(store.done if store else 0)
    if first:
        report(Note(f"{settings.out}: {first:,} of {total:,} images were embedded before. Resuming."))
        report(Progress(_WORK, first, total))
    if first == total:
        return None
    network = to_device(embedder.network, context.device).eval()
    start = context.clock()
    form = for_inference(network, embedder.header.image_size, total, context, report)
    (loader,) = embedder.loaders([images], reading(settings), context, report, first)
    batches = _in_order(loader, first + ranks.rank * settings.batch, ranks.size * settings.batch)
    embedded = embed_batches(form, batches, context, _WORK, total, report, first)
    try:
        for _, found in zip_longest(range(loader.rounds), embedded):
            rows = found[1].float() if found else torch.empty(0, embedder.size, device=context.device)
            rows = ranks.gather(rows)  # in the order of the images
            if store:
                store.append(rows, stamps[done : done + len(rows)])
            done += len(rows)
    except (Stopped, KeyboardInterrupt) as stopped:
        if isinstance(stopped, Stopped):
            stopped.outcome = f". {done:,} of {total:,} images are embedded. The same command embeds the rest."
        raise
    return (total - first) / max(context.clock() - start, 1e-9)


def _in_order(batches: Iterable[Batch], first: int, step: int) -> Iterator[Batch]:
    """The batches that start at image ``first`` and every ``step`` from there, up to the first missing one.

    A batch with damaged images is missing. Later batches are decoded too, so that the error names all damaged images.
    """
    for number, batch in enumerate(batches):
        if int(batch.index[0]) == first + number * step:
            yield batch


@dataclass(frozen=True)
class _Reduced:
    """Rows that are reduced by a PCA when they are read."""

    rows: Rows
    mean: Tensor
    components: Tensor
    unit: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], len(self.components)

    def __getitem__(self, rows: slice) -> Tensor:
        return apply_pca(self.rows[rows], self.mean, self.components, self.unit)


def _write(
    name: str,
    rows: Rows,
    images: ImageSet,
    embedder: Embedder,
    pca: tuple[Tensor, Tensor] | None,
    settings: EmbedSettings,
    context: Context,
    speed: float | None,
) -> Written:
    if settings.pca_size:
        pca = (fit_half_whitened if settings.half_whiten else fit_pca)(rows, settings.pca_size)
    if pca:
        mean, components = map(context.to_device, pca)
        rows = _Reduced(rows, mean, components, embedder.unit)
    stored_pca = (pca[0].cpu().numpy(), pca[1].cpu().numpy()) if pca else None
    names = relative_names(images.paths, settings.data)
    write_vectors(settings.out, rows, names, stored_pca, settings.vectors, embedder.made_by, embedder.unit)
    return _written(name, len(images), rows.shape[1], settings, speed)


def _written(name: str, count: int, size: int, settings: EmbedSettings, speed: float | None) -> Written:
    holds: str = settings.dataset or ""
    with suppress(DataError):  # for example too few images
        if not holds:
            load_dataset(found := find_dataset(settings.data), settings.data)
            holds = found
    return Written(name, count, size, settings, holds, speed)


def _check_components(settings: EmbedSettings, count: int, embedder: Embedder) -> None:
    most = min(count - 1, embedder.size)  # centered rows span one dimension less than there are images
    if settings.pca_size and settings.pca_size > most:
        what = (
            f"{embedder.name} has {most} dimensions" if most == embedder.size else f"{settings.data} has {count} images"
        )
        remedy = f"Use --pca {most} or less." if most else "It needs two or more."
        raise SettingsError(f"--pca {settings.pca}: {what}. {remedy}")


def _read_pca(path: Path, embedder: Embedder) -> tuple[Tensor, Tensor]:
    """The mean and the components in a vectors file."""
    remedy = "Name a file that `rkd embed --pca D` wrote"
    if not path.is_file() or not is_vectors(path):
        problem = "is not a vectors file" if path.is_file() else "no such file"
        raise SettingsError(f"--pca {path}: {problem}. {remedy}, or a number.")
    pca = read_vectors(path).pca
    if pca is None:
        raise SettingsError(f"--pca {path}: contains no PCA. {remedy}.")
    mean, components = (torch.from_numpy(part) for part in pca)
    if len(mean) != embedder.size:
        raise SettingsError(
            f"--pca {path}: its PCA is for {len(mean)} dimensions, but {embedder.name} has {embedder.size}. {remedy} "
            "for this network."
        )
    return mean, components


def _images(settings: EmbedSettings, report: Reporter) -> ImageSet:
    """All images of the data set, or in the folder."""
    paths: Sequence[Path]
    decoding = AS_DISPLAYED
    if is_list(settings.data) and settings.dataset in (None, "list"):  # it need not have both splits
        _, members = read_list(settings.data, report)
        listed = image_set([image for of in members.values() for image in of])
        paths, decoding = listed.paths, listed.decoding
    elif settings.dataset:
        train, evaluation = load_dataset(settings.dataset, settings.data, report)
        paths = joined(part.paths for part in (*train.parts, evaluation))
        decoding = train.decoding
    elif is_packed(settings.data):
        paths = read_packed(settings.data, report).paths
    elif settings.data.is_dir():
        tree = walk(settings.data)
        note_left_out(settings.data, report, tree)
        paths = tree.images
    else:
        raise DataError(f"{settings.data}: no such folder. Pass the folder of images as --data.")
    if not paths:
        raise DataError(f"{settings.data}: contains no images. Pass another folder as --data.")
    images = ImageSet(paths, None, (), decoding=decoding).decoded(settings.max_pixels)
    if settings.skip_damaged:
        (images,) = without_damaged([images], settings.workers, report)
    return images
