"""``rkd search``: the images of a gallery that are nearest to a query, and those that are nearly the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from rkd_cli import approximate
from rkd_cli.commands.options import check_used, check_weights, note_untrained, open_named, reading, reading_as_trained
from rkd_cli.compress import apply_pca
from rkd_cli.data import ImageSet
from rkd_cli.data.decode import DECODER
from rkd_cli.data.loader import find_damaged
from rkd_cli.data.walk import find_images, note_left_out, walk
from rkd_cli.embedding.batches import embed_batches
from rkd_cli.embedding.embedder import NetworkEmbedder, VectorsEmbedder
from rkd_cli.embedding.store import Store, image_stamps, open_store
from rkd_cli.embedding.vectors import Vectors, conversion, is_vectors, missing_notes, read_vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.geometry import exact_products, is_unit, normalized
from rkd_cli.models.embedding_net import TeacherSpace, to_device
from rkd_cli.report.gallery import thumbnail
from rkd_cli.retrieval import BLOCK_ELEMENTS, nearest, rounding
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.files import default_cache_folder, locked
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import SearchSettings, flag_name
from rkd_cli.settings.names import meant

_SPARE = 8  # hits beyond --top, of which the query itself is left out, should it be there under several names
_COMPARED = 10_000  # names that one which is not there may be meant for; each takes some microseconds


@dataclass(frozen=True)
class Hit:
    """An image of the gallery and how near it is: its cosine, or its distance."""

    path: Path
    similarity: float


@dataclass(frozen=True)
class Found:
    """What was found.

    Args:
        model: as it was named.
        gallery: where the images are, or the file of their embeddings.
        images: how many it has.
        measure: what ``Hit.similarity`` is.
        answers: (query, nearest first); none where duplicates were asked for.
        groups: of duplicates, each with its cosine to the first of the group.
        threshold: what made them duplicates; None where they were not asked for.
        recall: which share of the exact answers an index finds, by a sample; None where they are exact.
    """

    model: str
    gallery: Path
    images: int
    measure: str
    answers: tuple[tuple[Path, tuple[Hit, ...]], ...] = ()
    groups: tuple[tuple[Hit, ...], ...] = ()
    threshold: float | None = None
    recall: float | None = None


def search(name: str, settings: SearchSettings, report: Reporter) -> Found:
    """Answer queries from a gallery, or find what it has twice.

    Args:
        name: of a network.
        settings: what is asked for.
        report: is told how far it is.
    Raises:
        RkdError: the network, an image or the gallery cannot be had, or they do not fit.
    """
    check_weights([name], settings)
    embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    if isinstance(embedder, VectorsEmbedder):
        raise SettingsError(f"{name}: holds embeddings, and no network that could embed a query: name it as --gallery")
    check_used([embedder], settings)
    of_files = [name for name in ("data", "asymmetric") if name in settings.model_fields_set]
    if of_files and settings.gallery.is_dir():
        raise SettingsError(
            *(f"{flag_name(name)}: has no effect, {settings.gallery} is a folder: leave it out" for name in of_files)
        )
    context = make_context(settings.device, settings.precision)
    work = _Work(embedder, settings, context, report)
    queries = _images_of("--query", settings.query) if settings.query else ()
    if settings.query and settings.query.is_dir() and settings.query != settings.gallery:
        note_left_out(settings.query, report, walk(settings.query))
    paths, embeddings, pca, space = work.gallery()
    if not settings.query:
        groups = find_duplicates(embeddings, settings.threshold, report)
        same = tuple(tuple(Hit(_spelled(paths[row]), value) for row, value in group) for group in groups)
        return Found(name, settings.gallery, len(paths), "cosine", groups=same, threshold=settings.threshold)
    kept, vectors = work.embed(queries, "Embedding queries")
    if not kept:
        raise DataError(f"--query {settings.query}: holds no image that can be read: name another")
    if space:
        vectors = space.project(vectors)
    if pca:
        mean, components = (context.to_device(torch.from_numpy(part)) for part in pca)
        vectors = apply_pca(vectors, mean, components, space.unit if space else embedder.unit)
    cosine = (is_unit(vectors) if space else embedder.unit) and is_unit(embeddings)
    distances, rows, recall = _nearest(vectors, embeddings, settings, report)
    values = 1 - distances.square() / 2 if cosine else distances
    answers = []
    for query, places, figures in zip(kept, rows.tolist(), values.tolist(), strict=True):
        itself = os.path.realpath(query)
        hits = [Hit(_spelled(paths[row]), value) for row, value in zip(places, figures, strict=True) if row >= 0]
        others = [hit for hit in hits if os.path.realpath(hit.path) != itself]
        answers.append((query, tuple(others[: settings.top])))
    return Found(name, settings.gallery, len(paths), "cosine" if cosine else "distance", tuple(answers), recall=recall)


def _nearest(
    queries: Tensor, gallery: Tensor, settings: SearchSettings, report: Reporter
) -> tuple[Tensor, Tensor, float | None]:
    """(Q, K) distances and rows of some more than are asked for; where faiss finds them, with its recall."""
    k, comparisons = settings.top + _SPARE, len(queries) * len(gallery)
    if not settings.exact and gallery.device.type == "cpu" and comparisons >= approximate.FROM:
        if approximate.is_installed():
            report(Note(f"{comparisons:,} comparisons: faiss spares most of them; --exact makes them all"))
            found = approximate.nearly_nearest(queries, gallery, k)
            return found.distances, found.rows, found.recall
        report(Note(f"{comparisons:,} comparisons: `pip install faiss-cpu` would spare most of them"))
    return *nearest(queries, gallery, k), None


def pictures_of(found: Found) -> dict[Path, bytes | None]:
    """A thumbnail of each image that was found, and of the queries; None of one that cannot be read."""
    groups = [*found.groups, *(hits for _, hits in found.answers)]
    paths = [query for query, _ in found.answers] + [hit.path for group in groups for hit in group]
    return {path: thumbnail(path) for path in dict.fromkeys(paths)}


@torch.no_grad()
def find_duplicates(embeddings: Tensor, threshold: float, report: Reporter) -> list[list[tuple[int, float]]]:
    """Groups of rows, of which each has a cosine of ``threshold`` or more to another of its group.

    Args:
        embeddings: (N, D), of any length.
        threshold: from -1 to 1; cosines below it by less than the rounding of a product count, so that copies are
            found at 1.
        report: is told how far it is.
    Returns:
        Of each group, in the order of their first rows, (row, cosine to the group's first row) in the order of rows. As
        groups are chains, that cosine may be below the threshold.
    """
    x = normalized(embeddings)
    least = threshold - 2 * rounding(x)  # a share of two squared lengths
    count = len(x)
    first = np.arange(count)  # of the group of each row, as far as it is known
    known: Tensor | None = None  # the same on the device, once rows have been joined
    edges: list[np.ndarray] = []
    with exact_products(x.device):
        for block in torch.split(torch.arange(count, device=x.device), max(1, BLOCK_ELEMENTS // count)):
            start = int(block[0])
            near = (x[block] @ x[start:].T >= least).triu(1)  # the block's first row is the first column's
            if known is not None:
                near &= known[block, None] != known[start:]
            edges.append((near.nonzero() + start).cpu().numpy())
            if sum(map(len, edges)) > BLOCK_ELEMENTS:  # a gallery of one image would have N^2 of them
                first, edges = _join(first, edges), []
                known = torch.from_numpy(first).to(x.device)
            report(Progress("Comparing images", start + len(block), count))
    first = _join(first, edges)
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.bincount(first, minlength=count)[first] > 1).tolist():
        groups.setdefault(int(first[row]), []).append(row)
    return [list(zip(rows, (x[rows] @ x[rows[0]]).clamp(-1, 1).tolist(), strict=True)) for rows in groups.values()]


def _join(first: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """(N,) the least row of each row's group, after edges are added."""
    ends = np.concatenate([np.stack([np.arange(len(first)), first], axis=1), *edges])
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(first), len(first)))
    _, group = connected_components(graph, directed=False)
    _, least = np.unique(group, return_index=True)
    return np.asarray(least[group])


@dataclass(frozen=True)
class _Work:
    embedder: NetworkEmbedder
    settings: SearchSettings
    context: Context
    report: Reporter

    def gallery(self) -> tuple[list[Path], Tensor, tuple[np.ndarray, np.ndarray] | None, TeacherSpace | None]:
        """The paths of the images, their (N, D) embeddings on the device, the map that reduces queries as it did them,
        if one does, and the teacher's space, if they are of it."""
        root = self.settings.gallery
        if root.is_dir():
            note_left_out(root, self.report, walk(root))
            paths, found = self._index(root)
            return paths, self.context.to_device(torch.from_numpy(found)), None, None
        if not root.is_file() or not is_vectors(root):
            if told := conversion(root):
                raise DataError(f"--gallery {told}")
            missing = "no file of embeddings" if root.is_file() else "no such folder or file"
            hint = _meant(root) or ": name a folder of images, or what `rkd embed` wrote"
            raise DataError(f"--gallery {root}: {missing}{hint}")
        vectors, name = read_vectors(root), self.embedder.name
        space, pca = self._space(vectors), vectors.pca
        size, mine = len(pca[0]) if pca else vectors.size, space.size if space else self.embedder.size
        if self.settings.asymmetric and mine == vectors.size != size:
            size, pca = vectors.size, None  # reduced, they were the teacher
        if size != mine:
            before = " before they were reduced" if pca else ""
            add = ", or add --asymmetric" if self._reaches(size) and not self.settings.asymmetric else ""
            raise DataError(
                f"--gallery {root}: its embeddings have {size} dimensions{before}, and those of {name} {mine}: name "
                f"the network that made them{add}"
            )
        if vectors.model not in ("", self.embedder.made_by) and not self.settings.asymmetric:
            if vectors.model.partition(" ")[0] == self.embedder.digest:
                raise DataError(
                    f"--gallery {root}: was embedded with another --resize, --image-size or --fit: search with the same"
                )
            raise DataError(
                f"--gallery {root}: is not by {name}: name the network that made it, or add --asymmetric where {name} "
                "embeds in that one's space"
            )
        if vectors.kind == "binary":
            raise DataError(f"--gallery {root}: holds signs alone, which floats are not compared with: name another")
        for note in missing_notes(root, (), vectors.zeros, "", "left out"):
            self.report(Note(note))
        paths = [self.settings.data / name for name in vectors.row]
        embeddings = self.context.to_device(torch.from_numpy(vectors.embeddings))
        if self.settings.asymmetric and space is None and vectors.model != self.embedder.digest:
            self.report(Note(f"--asymmetric: {name} does not say that it answers in its teacher's space, nor in this"))
        if space and space.unit and not is_unit(embeddings):
            if pca:
                raise DataError(
                    f"--gallery {root}: {name} learned directions, and these were reduced at other lengths: embed with "
                    "--l2normalize, then reduce"
                )
            self.report(Note(f"--gallery {root}: compared at unit length, as {name} learned it"))
            embeddings = space.scale(embeddings)
        return paths, embeddings, pca, space

    def _space(self, vectors: Vectors) -> TeacherSpace | None:
        """The teacher's space, where the file is of it."""
        space = self.embedder.teacher_space
        if space is None or vectors.model == self.embedder.digest:
            return None
        if self.settings.asymmetric:
            sizes = {vectors.size, len(vectors.pca[0]) if vectors.pca else vectors.size}
            return space if space.size in sizes and self._reaches(space.size) else None
        # by whom it is, it does not say: rows by this network would have unit length, and stay as they are
        direct = not vectors.model and self.embedder.unit and self.embedder.size == space.size == vectors.size
        return space if direct and space.unit and not vectors.pca else None

    def _reaches(self, size: int) -> bool:
        """Whether the network's whole embeddings come into a teacher's space of ``size`` dimensions."""
        space = self.embedder.teacher_space
        return bool(space and space.size == size and self.embedder.size in {size, *space.projections})

    def embed(self, paths: Sequence[Path], what: str) -> tuple[tuple[Path, ...], Tensor]:
        """The images that can be read, and their embeddings."""
        bad = self._damaged(paths)
        images = ImageSet(tuple(path for path in paths if path not in bad), None, ())
        if not images.paths:
            return (), torch.empty(0, self.embedder.size)
        how = reading_as_trained(self.embedder, self.settings, self.context.device)
        found = self.embedder.embed({what: images}, how, self.context, self.report)[what]
        return found.images.paths, found.embeddings

    def _index(self, root: Path) -> tuple[list[Path], np.ndarray]:
        """The images of the folder now and their (N, D) embeddings; those that the index lacks are embedded."""
        size, header = self.embedder.size, self.embedder.header
        facts = {
            "rkd index": 2,
            "model": self.embedder.digest,
            "l2normalize": self.embedder.unit,
            "sides": [header.resize, header.image_size],
            "pixels": [DECODER, header.fit],
            "computed": [self.context.device.type, self.context.precision, torch.__version__],
            "gallery": os.path.realpath(root),
        }
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        about = {"index of": name, "folder": os.path.realpath(root)[-500:], "row bytes": 8 + 4 * size}
        folder = self.settings.cache_dir or default_cache_folder()
        path = folder / f"{header.resize}-{name}.index"
        with ExitStack() as held:
            store = None
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path))
                store = held.enter_context(open_store(path, about, size))
            except OSError as error:
                self._note_unwritable(path, error)
            if store and store.changed:
                self.report(Note(f"{path}: the index is damaged, or of an earlier version: made again"))
            return self._updated(root, store)

    def _updated(self, root: Path, store: Store | None) -> tuple[list[Path], np.ndarray]:
        paths = _images_of("--gallery", root)
        stamps = image_stamps(paths, root)
        rows = store.find(stamps) if store else np.full(len(paths), -1)
        there = rows >= 0
        embeddings = np.empty((len(paths), self.embedder.size), np.float32)
        if store:
            embeddings[there] = store.take(rows[there])
        if not there.all():
            bad = self._damaged([paths[place] for place in np.flatnonzero(~there)])
            places = np.array([place for place in np.flatnonzero(~there) if paths[place] not in bad], np.int64)
            try:
                for at, found in self._embedded([paths[place] for place in places]):
                    embeddings[places[at]], there[places[at]] = found, True
                    if store and not self._is_written(store.append, store.path, found, stamps[places[at]]):
                        store = None
            except Stopped as stopped:
                if store and there.any():
                    have = f"{there.sum():,} of {len(paths):,}"
                    stopped.outcome = f". {have} images are in the index; the next search embeds the rest."
                raise
        if not there.any():
            raise DataError(f"--gallery {root}: all {len(paths):,} images are damaged: name a folder of images")
        found = embeddings[there]
        if store and store.done > 2 * len(found):  # most are of images that are gone or have changed
            self._is_written(store.rewrite, store.path, found, stamps[there])
        return [path for path, has in zip(paths, there, strict=True) if has], found

    def _is_written(
        self, write: Callable[[Tensor, np.ndarray], None], path: Path, rows: np.ndarray, stamps: np.ndarray
    ) -> bool:
        try:
            write(torch.from_numpy(rows), stamps)
        except OSError as error:
            self._note_unwritable(path, error)
            return False
        return True

    def _note_unwritable(self, path: Path, error: OSError) -> None:
        self.report(Note(f"{path}: the index cannot be cached ({error.strerror or error}); the answer is complete"))

    def _damaged(self, paths: Sequence[Path]) -> Collection[Path]:
        """Those that are to be left out."""
        if not self.settings.skip_damaged:
            return ()
        images = ImageSet(tuple(paths), None, ()).decoded(self.settings.max_pixels)
        bad = find_damaged([images], self.settings.workers, self.report)
        if bad:
            self.report(Note(f"{len(bad)} damaged images are left out, the first of them {next(iter(bad))}"))
        return bad

    def _embedded(self, paths: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batch by batch (B,) positions in ``paths`` and (B, D) embeddings, but for the batches of damaged images.

        Raises:
            DataError: (in the end) damaged images, all of them named.
        """
        if not paths:
            return
        images, context = ImageSet(tuple(paths), None, ()), self.context
        network = to_device(self.embedder.network, context.device).eval()
        (batches,) = self.embedder.loaders([images], reading(self.settings), context, self.report)
        for batch, found in embed_batches(network, batches, context, "Embedding gallery", len(images), self.report):
            yield batch.index.cpu().numpy(), found.float().cpu().numpy()


def _spelled(path: Path) -> Path:
    """The path in the Unicode form that the disk has, where it has one."""
    if path.exists():
        return path
    forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((form for form in forms if form.exists()), path)


def _images_of(flag: str, path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        hint = _meant(path) or ": name an image, or a folder of images"
        raise DataError(f"{flag} {path}: no such file or folder{hint}")
    found = tuple(find_images(path))
    if not found:
        raise DataError(f"{flag} {path}: holds no image: name a folder that does")
    return found


def _meant(path: Path) -> str:
    """What is likely to be meant by a path that is not there."""
    if path.exists() or not path.parent.is_dir():
        return ""
    return meant(path.name, [other.name for other in itertools.islice(path.parent.iterdir(), _COMPARED)])
