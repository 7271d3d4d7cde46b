"""What ``rkd embed`` writes: the embeddings of images, perhaps reduced, in a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
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
from rkd_cli.compress import Rows, apply_pca, fit_pca, vector_bytes
from rkd_cli.data import ImageSet, find_dataset, load_dataset
from rkd_cli.data.decode import AS_DISPLAYED, DECODER
from rkd_cli.data.loader import Batch, find_damaged
from rkd_cli.data.sets.lists import is_list
from rkd_cli.data.splits import relative_names
from rkd_cli.data.walk import note_left_out, walk
from rkd_cli.embedding.batches import embed_batches
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder, VectorsEmbedder
from rkd_cli.embedding.formats import check_writer, npy_paths, write_vectors
from rkd_cli.embedding.store import Store, image_stamps, open_store, unfinished
from rkd_cli.embedding.vectors import is_vectors, read_vectors
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.models.embedding_net import to_device
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.distributed import ranks
from rkd_cli.runtime.files import refuse_existing
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import EmbedSettings

_WORK = "Embedding images"
_FORMAT = 3  # of what is unfinished


@dataclass(frozen=True)
class Written:
    """A file of embeddings and how it came about."""

    path: Path
    name: str  # of what embedded
    images: int
    size: int
    data: Path
    dataset: str | None  # as it was asked for
    holds: str  # what data set the folder holds: folder, images, ...; nothing where it is none
    with_map: bool  # whether it keeps a PCA map
    vectors: str = "float"  # how it stores them
    images_per_second: float | None = None  # of those that were embedded now, decoding included
    paths: Path | None = None  # where the paths are, if not in it


def embed_file(name: str, settings: EmbedSettings, report: Reporter) -> Written:
    """Embed images and write the file, whole or not at all. Many ranks share the images, and the first one writes.

    Args:
        name: of a checkpoint, a run directory, a pretrained network, or a file of embeddings.
        settings: what is asked for.
        report: is told how far it is.
    Raises:
        RkdError: something cannot be had or written, or flags that contradict it or each other.
    """
    out, part, who = settings.out, unfinished(settings.out), ranks()
    for path in (out, *_beside(out)) if who.is_first else ():
        refuse_existing("--out", path, settings.overwrite)
    check_weights([name], settings)
    with who.first():  # which fetches what is not here
        embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    check_used([embedder], settings)
    check_length(embedder, settings.l2normalize)
    if embedder.vectors and embedder.vectors.kind == "binary":
        raise SettingsError(f"{embedder.name}: holds signs alone, of which no other embeddings can be made")
    pca = _kept_map(settings.pca_file, embedder) if settings.pca_file else None
    context = make_context(settings.device, settings.precision)
    images = _images(settings, report)
    _check_components(settings, len(images), embedder)
    check_writer(out, relative_names(images.paths, settings.data))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    except OSError as error:
        raise RunError(f"{out.parent}: cannot be made ({error.strerror}): choose another --out") from None
    if not who.is_first:
        speed = None
        if isinstance(embedder, NetworkEmbedder):
            speed = _embed(None, np.empty(0), embedder, images, settings, context, report)
        size = settings.pca_size or (len(pca[1]) if pca else embedder.size)
        return _written(name, len(images), size, settings, speed)
    if isinstance(embedder, VectorsEmbedder):
        (embedded,) = embedder.embed({_WORK: images}, reading(settings), context, report).values()
        _check_components(settings, len(embedded.images), embedder)  # a file may have embeddings of fewer
        return _write(name, embedded.embeddings, embedded.images, embedder, pca, settings, context, None)
    _check_room(out, len(images), embedder.size, settings.vectors)
    try:
        stamps = image_stamps(images.paths, settings.data)
        busy = RunError(f"--out {out}: another rkd embed is writing it: wait for that, or name another file")
        facts = _facts(embedder, context)
        with open_store(part, facts, embedder.size, device=context.device, busy=busy) as store:
            store.keep_same(stamps)
            speed = _embed(store, stamps, embedder, images, settings, context, report)
            written = _write(name, store, images, embedder, pca, settings, context, speed)
            part.unlink(missing_ok=True)
    except OSError as error:
        kept = "what was embedded is kept" if part.exists() else "nothing was written"
        raise RunError(
            f"{part}: cannot be written ({error.strerror or error}): {kept}; make room and run the same "
            "command again, or choose another --out"
        ) from None
    return written


def _beside(out: Path) -> list[Path]:
    return [npy_paths(out)] if out.suffix == ".npy" else []


def _facts(embedder: NetworkEmbedder, context: Context) -> dict[str, object]:
    """All that the embeddings are a function of beside their images."""
    header = embedder.header
    return {
        "another version": [_FORMAT, __version__, torch.__version__],
        "another model": [embedder.digest, embedder.size, embedder.unit],
        "another --resize or --image-size": [header.resize, header.image_size],
        "another --fit": [header.fit],
        "another decoder": [DECODER],
        "another --device or --precision": [context.device.type, context.precision],
    }


def _check_room(out: Path, count: int, size: int, vectors: str) -> None:
    """That the unfinished file and the finished one fit beside each other.

    Raises:
        RunError: they do not.
    """
    try:
        there = unfinished(out).stat().st_size
    except OSError:
        there = 0
    needed = count * (4 * size + vector_bytes(vectors, size)) - there
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"--out {out}: takes {needed / 1e6:,.0f} MB while it is made, and {free / 1e6:,.0f} are free: name a "
            "file on another disk"
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
    """Append the rows that are missing; images/s where there were some. Only the first rank has the file.

    Raises:
        DataError: damaged images, all of them named.
        RunError: embeddings that are not finite, memory that is full, or a worker that was killed.
        OSError: the disk is full.
    """
    total, ranks = len(images), context.ranks
    ranks.wait()  # the first looks at each image before
    if store and store.changed:
        report(Note(f"{settings.out}: embedded before from {store.changed}. Starting over."))
    if store and store.done < total:
        store.cut(store.done // settings.batch * settings.batch)  # in the batches of a run that nothing stopped
    first = done = ranks.largest(store.done if store else 0)
    if first:
        report(Note(f"{settings.out}: {first:,} of {total:,} images were embedded before: going on from there"))
        report(Progress(_WORK, first, total))
    if first == total:
        return None
    network = to_device(embedder.network, context.device).eval()
    start = context.clock()
    (loader,) = embedder.loaders([images], reading(settings), context, report, first)
    batches = _in_order(loader, first + ranks.rank * settings.batch, ranks.size * settings.batch)
    embedded = embed_batches(network, batches, context, _WORK, total, report, first)
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
    """The batches that start at image ``first`` and every ``step`` from there, up to the first that is missing for
    damaged images; those after it are decoded too, so that the error names all of these."""
    for number, batch in enumerate(batches):
        if int(batch.index[0]) == first + number * step:
            yield batch


@dataclass(frozen=True)
class _Reduced:
    """Rows reduced by a PCA map, slice by slice, so that they are never stored."""

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
        pca = fit_pca(rows, settings.pca_size)
    if pca:
        mean, components = map(context.to_device, pca)
        rows = _Reduced(rows, mean, components, embedder.unit)
    kept = (pca[0].cpu().numpy(), pca[1].cpu().numpy()) if pca else None
    out = settings.out
    names = relative_names(images.paths, settings.data)
    write_vectors(out, rows, names, kept, settings.vectors, embedder.made_by)
    return _written(name, len(images), rows.shape[1], settings, speed)


def _written(name: str, count: int, size: int, settings: EmbedSettings, speed: float | None) -> Written:
    out, with_map = settings.out, settings.pca is not None and settings.out.suffix != ".npy"
    beside = next(iter(_beside(out)), None)
    holds: str = settings.dataset or ""
    with suppress(DataError):  # of too few images, for instance
        if not holds:
            load_dataset(found := find_dataset(settings.data), settings.data)
            holds = found
    data, dataset = settings.data, settings.dataset
    return Written(out, name, count, size, data, dataset, holds, with_map, settings.vectors, speed, beside)


def _check_components(settings: EmbedSettings, count: int, embedder: Embedder) -> None:
    most = min(count, embedder.size)
    if settings.pca_size and settings.pca_size > most:
        what = f"{embedder.name} has {most} dimensions" if most == embedder.size else f"there are {most} images"
        raise SettingsError(f"--pca {settings.pca}: {what}, which have no more components: name fewer")


def _kept_map(path: Path, embedder: Embedder) -> tuple[Tensor, Tensor]:
    """The map that a file keeps.

    Raises:
        DataError: it is no file of embeddings.
        SettingsError: it keeps none, or one of embeddings of another size.
    """
    if not path.is_file() or not is_vectors(path):
        missing = "no such file" if not path.is_file() else "no file of embeddings"
        raise SettingsError(f"--pca {path}: {missing}: name one that `rkd embed --pca D` wrote, or a number")
    pca = read_vectors(path).pca
    if pca is None:
        raise SettingsError(f"--pca {path}: keeps no PCA map: name a file that `rkd embed --pca D` wrote")
    mean, components = (torch.from_numpy(part) for part in pca)
    if len(mean) != embedder.size:
        raise SettingsError(
            f"--pca {path}: its map is of {len(mean)} dimensions, and {embedder.name} has {embedder.size}"
        )
    return mean, components


def _images(settings: EmbedSettings, report: Reporter) -> ImageSet:
    """Every image of the set, or below the folder.

    Raises:
        DataError: there is none.
        RunError: a worker was killed, or is stuck.
    """
    decoding = AS_DISPLAYED
    if dataset := settings.dataset or ("list" if is_list(settings.data) else None):
        train, evaluation = load_dataset(dataset, settings.data, report)
        paths, decoding = [path for part in (*train.parts, evaluation) for path in part.paths], train.decoding
    elif settings.data.is_dir():
        tree = walk(settings.data)
        note_left_out(settings.data, report, tree)
        paths = tree.images
    else:
        raise DataError(f"{settings.data}: no such folder: name that of the images with --data")
    if not paths:
        raise DataError(f"{settings.data}: holds no image: name a folder that does with --data")
    images = ImageSet(tuple(paths), None, (), decoding=decoding).decoded(settings.max_pixels)
    if settings.skip_damaged and (damaged := find_damaged([images], settings.workers, report)):
        report(Note(f"{len(damaged)} damaged images are left out, the first of them {next(iter(damaged))}"))
        images = images.without(damaged)
    return images
