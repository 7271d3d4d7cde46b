"""``rkd search``: find the nearest images to a query in a gallery, or near-duplicates."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

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
from rkd_cli.data.members import is_there
from rkd_cli.data.splits import names_folder
from rkd_cli.data.walk import find_images, note_left_out, walk
from rkd_cli.embedding.batches import embed_batches
from rkd_cli.embedding.embedder import NetworkEmbedder, VectorsEmbedder
from rkd_cli.embedding.store import Store, image_stamps, open_store
from rkd_cli.embedding.vectors import Vectors, conversion, is_vectors, missing_notes, read_vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Progress, Reporter, silent
from rkd_cli.geometry import exact_products, is_unit, normalized
from rkd_cli.models.embedding_net import TeacherSpace, to_device
from rkd_cli.models.inference import for_inference
from rkd_cli.report.gallery import thumbnail
from rkd_cli.retrieval import BLOCK_ELEMENTS, nearest, rounding
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.files import default_cache_folder, locked
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import GallerySettings, SearchSettings, flag_name
from rkd_cli.settings.names import meant

_SPARE = 8  # hits beyond --top: the query itself, perhaps with several names, is left out of them
_LOOKED_FOR = 1000  # images of a vectors file that are looked for
_COMPARED = 10_000  # file names to look for a similar one in, some microseconds each


@dataclass(frozen=True)
class Hit:
    """An image of the gallery."""

    path: Path
    similarity: float  # cosine, or distance


@dataclass(frozen=True)
class Found:
    """The answers to queries, or groups of duplicates."""

    model: str
    gallery: Path  # a folder or a vectors file
    images: int  # in the gallery
    measure: str  # what ``Hit.similarity`` is
    answers: tuple[tuple[Path, tuple[Hit, ...]], ...] = ()  # (query, nearest first)
    groups: tuple[tuple[Hit, ...], ...] = ()  # of duplicates, with cosines to the first of the group
    threshold: float | None = None  # lowest cosine of duplicates; None for answers
    recall: float | None = None  # fraction of the exact answers that faiss finds, by a sample; None if exact


def search(name: str, settings: SearchSettings, report: Reporter) -> Found:
    """Answer queries from a gallery, or find duplicates in it.

    Raises:
        RkdError: the network, an image or the gallery cannot be read, or they do not match.
    """
    work = open_search(name, settings, report)
    queries = _images_of("--query", settings.query) if settings.query else ()
    if settings.query and settings.query.is_dir() and settings.query != settings.gallery:
        note_left_out(settings.query, report, walk(settings.query))
    index = work.index()
    about = name, settings.gallery, len(index.paths)
    if not settings.query:
        groups = find_duplicates(index.embeddings, settings.threshold, report)
        return Found(*about, "cosine", groups=tuple(map(index.hits, groups)), threshold=settings.threshold)
    readable, vectors = work.embed(queries, "Embedding queries")
    if not readable:
        raise DataError(f"--query {settings.query}: contains no readable image. Name another.")
    found = index.nearest(index.projected(vectors), readable, settings.top, settings.exact, report)
    answers = tuple((query, index.hits(rows)) for query, rows in zip(readable, found.rows, strict=True))
    return Found(*about, found.measure, answers, recall=found.recall)


def open_search(name: str, settings: GallerySettings, report: Reporter) -> Search:
    """Open the network of a search and check the flags."""
    check_weights([name], settings)
    embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    if isinstance(embedder, VectorsEmbedder):
        raise SettingsError(f"{name}: is a vectors file, which cannot embed a query. Pass it as --gallery.")
    check_used([embedder], settings)
    unused = [name for name in ("data", "asymmetric") if name in settings.model_fields_set]
    if unused and settings.gallery.is_dir():
        raise SettingsError(
            *(f"{flag_name(name)}: has no effect, {settings.gallery} is a folder. Omit the flag." for name in unused)
        )
    return Search(embedder, settings, make_context(settings.device, settings.precision), report)


class NearestRows(NamedTuple):
    """The nearest rows of each query, and what their values are."""

    measure: str
    rows: list[list[tuple[int, float]]]  # (row, value), nearest first
    recall: float | None  # fraction of the exact answers that faiss finds, by a sample; None if exact


@dataclass(frozen=True)
class Index:
    """The images of a gallery, and how queries are compared with them."""

    paths: list[Path]
    embeddings: Tensor  # (N, D), on the device
    unit: bool  # whether the network's embeddings have unit length
    pca: tuple[np.ndarray, np.ndarray] | None = None  # to apply to queries
    space: TeacherSpace | None = None  # to map queries into

    @cached_property
    def _is_unit(self) -> bool:
        return is_unit(self.embeddings)

    def projected(self, queries: Tensor) -> Tensor:
        """(Q, D) queries in the space of the gallery, from the network's embeddings."""
        if self.space:
            queries = self.space.project(queries)
        if self.pca:
            mean, components = (torch.from_numpy(part).to(queries.device) for part in self.pca)
            queries = apply_pca(queries, mean, components, self.space.unit if self.space else self.unit)
        return queries

    def nearest(
        self, queries: Tensor, itself: Sequence[Path | None], top: int, exact: bool = True, report: Reporter = silent
    ) -> NearestRows:
        """The nearest ``top`` rows of each of (Q, D) ``projected`` queries, without the files ``itself``."""
        cosine = (is_unit(queries) if self.space else self.unit) and self._is_unit
        distances, rows, recall = _nearest(queries, self.embeddings, top + _SPARE, exact, report)
        values = 1 - distances.square() / 2 if cosine else distances
        answers = []
        for query, found, figures in zip(itself, rows.tolist(), values.tolist(), strict=True):
            own = os.path.realpath(query) if query else ""
            hits = [(row, value) for row, value in zip(found, figures, strict=True) if row >= 0]
            answers.append([hit for hit in hits if os.path.realpath(self.path(hit[0])) != own][:top])
        return NearestRows("cosine" if cosine else "distance", answers, recall)

    def path(self, row: int) -> Path:
        """The image of a row, in the Unicode form that exists."""
        return _as_on_disk(self.paths[row])

    def hits(self, rows: Iterable[tuple[int, float]]) -> tuple[Hit, ...]:
        """The images of rows with their values."""
        return tuple(Hit(self.path(row), value) for row, value in rows)


def _nearest(
    queries: Tensor, gallery: Tensor, k: int, exact: bool, report: Reporter
) -> tuple[Tensor, Tensor, float | None]:
    """(Q, K) distances and rows, and the recall if faiss found them."""
    comparisons = len(queries) * len(gallery)
    if not exact and gallery.device.type == "cpu" and comparisons >= approximate.FROM:
        if approximate.is_installed():
            report(Note(f"{comparisons:,} comparisons: faiss skips most of them. Pass --exact to make them all."))
            found = approximate.nearly_nearest(queries, gallery, k)
            return found.distances, found.rows, found.recall
        report(Note(f"{comparisons:,} comparisons: `pip install faiss-cpu` skips most of them"))
    return *nearest(queries, gallery, k), None


def pictures_of(found: Found) -> dict[Path, bytes | None]:
    """{path: thumbnail, None if unreadable} of queries and hits."""
    groups = [*found.groups, *(hits for _, hits in found.answers)]
    paths = [query for query, _ in found.answers] + [hit.path for group in groups for hit in group]
    return {path: thumbnail(path) for path in dict.fromkeys(paths)}


@torch.no_grad()
def find_duplicates(embeddings: Tensor, threshold: float, report: Reporter) -> list[list[tuple[int, float]]]:
    """Groups of rows that are connected by cosines of ``threshold`` or more.

    Args:
        embeddings: (N, D), of any length.
        threshold: from -1 to 1. Cosines below it by a rounding error count, so that copies are found at 1.
    Returns:
        (row, cosine to the group's first row) for each group, sorted by row. That cosine may be below the threshold,
        because groups are chains.
    """
    x = normalized(embeddings)
    least = threshold - 2 * rounding(x)  # relative to two squared lengths
    count = len(x)
    first = np.arange(count)  # first row of the group of each row, so far
    known: Tensor | None = None  # ``first`` on the device, once rows are joined
    edges: list[np.ndarray] = []
    with exact_products(x.device):
        for block in torch.split(torch.arange(count, device=x.device), max(1, BLOCK_ELEMENTS // count)):
            start = int(block[0])
            near = (x[block] @ x[start:].T >= least).triu(1)  # columns start at the block's first row
            if known is not None:
                near &= known[block, None] != known[start:]
            edges.append((near.nonzero() + start).cpu().numpy())
            if sum(map(len, edges)) > BLOCK_ELEMENTS:  # N copies of an image have N^2 edges
                first, edges = _join(first, edges), []
                known = torch.from_numpy(first).to(x.device)
            report(Progress("Comparing images", start + len(block), count))
    first = _join(first, edges)
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.bincount(first, minlength=count)[first] > 1).tolist():
        groups.setdefault(int(first[row]), []).append(row)
    return [list(zip(rows, (x[rows] @ x[rows[0]]).clamp(-1, 1).tolist(), strict=True)) for rows in groups.values()]


def _join(first: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """(N,) first row of each row's group, after adding edges."""
    ends = np.concatenate([np.stack([np.arange(len(first)), first], axis=1), *edges])
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(first), len(first)))
    _, group = connected_components(graph, directed=False)
    _, least = np.unique(group, return_index=True)
    return np.asarray(least[group])


@dataclass(frozen=True)
class Search:
    """A network and the flags of a search."""

    embedder: NetworkEmbedder
    settings: GallerySettings
    context: Context
    report: Reporter

    def index(self) -> Index:
        """The gallery: a folder's images, embedded if they are not in the cached index, or the rows of a file."""
        root = self.settings.gallery
        if root.is_dir():
            note_left_out(root, self.report, walk(root))
            paths, found = self._folder(root)
            return Index(paths, self.context.to_device(torch.from_numpy(found)), self.embedder.unit)
        if not root.is_file() or not is_vectors(root):
            if problem := conversion(root):
                raise DataError(f"--gallery {problem}")
            missing = "is not a vectors file" if root.is_file() else "no such folder or file"
            hint = _suggestion(root) or ". Name a folder of images, or a file that `rkd embed` wrote."
            raise DataError(f"--gallery {root}: {missing}{hint}")
        vectors, name = read_vectors(root), self.embedder.name
        space, pca = self._space(vectors), vectors.pca
        size, own = len(pca[0]) if pca else vectors.size, space.size if space else self.embedder.size
        if self.settings.asymmetric and own == vectors.size != size:
            size, pca = vectors.size, None  # the reduced embeddings were the teacher
        if size != own:
            before = " before PCA" if pca else ""
            add = ", or add --asymmetric" if self._reaches(size) and not self.settings.asymmetric else ""
            raise DataError(
                f"--gallery {root}: its embeddings have {size} dimensions{before}, but those of {name} have {own}. "
                f"Name the network that made them{add}."
            )
        if vectors.model not in ("", self.embedder.made_by) and not self.settings.asymmetric:
            if vectors.model.partition(" ")[0] == self.embedder.digest:
                raise DataError(
                    f"--gallery {root}: was embedded with another --resize, --image-size or --fit. Pass the same flags."
                )
            raise DataError(
                f"--gallery {root}: was embedded by another network than {name}. Name that network, or add "
                f"--asymmetric if {name} embeds in its space."
            )
        if vectors.kind == "binary":
            raise DataError(
                f"--gallery {root}: has binary embeddings, which cannot be compared with floats. Name another file."
            )
        for note in missing_notes(root, (), vectors.zeros, "", "left out"):
            self.report(Note(note))
        folder = names_folder(self.settings.data)
        paths = [folder / name for name in vectors.row]
        if not any(is_there(_as_on_disk(path)) for path in paths[:: max(1, len(paths) // _LOOKED_FOR)]):
            what = f"--gallery {root}: its images, such as {next(iter(vectors.row))}, are not in {folder}"
            self.report(Note(f"{what}, so no picture is shown. Pass the --data that they were embedded from."))
        embeddings = self.context.to_device(torch.from_numpy(vectors.embeddings))
        if self.settings.asymmetric and space is None and vectors.model != self.embedder.digest:
            self.report(Note(f"--asymmetric: {name} is not known to embed in the space of {root}"))
        if space and space.unit and not is_unit(embeddings):
            if pca:
                raise DataError(
                    f"--gallery {root}: PCA reduced embeddings that were not normalized, but {name} learned only "
                    "directions. Embed the gallery again with --l2normalize and --pca."
                )
            self.report(Note(f"--gallery {root}: compared at unit length, as in the training of {name}"))
            embeddings = space.scale(embeddings)
        return Index(paths, embeddings, self.embedder.unit, pca, space)

    def _space(self, vectors: Vectors) -> TeacherSpace | None:
        """The teacher's space, if the file is in it."""
        space = self.embedder.teacher_space
        if space is None or vectors.model == self.embedder.digest:
            return None
        if self.settings.asymmetric:
            sizes = {vectors.size, len(vectors.pca[0]) if vectors.pca else vectors.size}
            return space if space.size in sizes and self._reaches(space.size) else None
        # the file names no network: scaling to unit length would not change rows of this network either
        direct = not vectors.model and self.embedder.unit and self.embedder.size == space.size == vectors.size
        return space if direct and space.unit and not vectors.pca else None

    def _reaches(self, size: int) -> bool:
        """Whether the network can embed in a teacher's space of ``size`` dimensions."""
        space = self.embedder.teacher_space
        return bool(space and space.size == size and self.embedder.size in {size, *space.projections})

    def embed(self, paths: Sequence[Path], what: str) -> tuple[Sequence[Path], Tensor]:
        """The readable images and their embeddings."""
        bad = self._damaged(paths)
        images = ImageSet(tuple(path for path in paths if path not in bad), None, ())
        if not images.paths:
            return (), torch.empty(0, self.embedder.size)
        how = reading_as_trained(self.embedder, self.settings, self.context.device)
        found = self.embedder.embed({what: images}, how, self.context, self.report)[what]
        return found.images.paths, found.embeddings

    def _folder(self, root: Path) -> tuple[list[Path], np.ndarray]:
        """The images of a folder and their (N, D) embeddings, from the index or else embedded now."""
        size, header = self.embedder.size, self.embedder.header
        precision = self.context.inference_precision(self.embedder.network)
        facts = {
            "rkd index": 2,
            "model": self.embedder.digest,
            "l2normalize": self.embedder.unit,
            "sides": [header.resize, header.image_size],
            "pixels": [DECODER, header.fit],
            "computed": [self.context.device.type, precision, torch.__version__],
            "gallery": os.path.realpath(root),
        }
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        about = {"index of": name, "folder": os.path.realpath(root)[-500:], "row bytes": 8 + 4 * size}
        folder = self.settings.cache_dir or default_cache_folder()
        path = folder / f"{header.resize}-{name}.index"
        with ExitStack() as stack:
            store = None
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path))
                store = stack.enter_context(open_store(path, about, size))
            except OSError as error:
                self._note_unwritable(path, error)
            if store and store.changed:
                self.report(Note(f"{path}: the index is damaged, or of an earlier version. Creating it again."))
            return self._update_index(root, store)

    def _update_index(self, root: Path, store: Store | None) -> tuple[list[Path], np.ndarray]:
        paths = _images_of("--gallery", root)
        stamps = image_stamps(paths, root)
        rows = store.find(stamps) if store else np.full(len(paths), -1)
        done = rows >= 0
        embeddings = np.empty((len(paths), self.embedder.size), np.float32)
        if store:
            embeddings[done] = store.take(rows[done])
        if not done.all():
            bad = self._damaged([paths[place] for place in np.flatnonzero(~done)])
            places = np.array([place for place in np.flatnonzero(~done) if paths[place] not in bad], np.int64)
            try:
                for at, found in self._embedded([paths[place] for place in places]):
                    embeddings[places[at]], done[places[at]] = found, True
                    if store and not self._try_write(store.append, store.path, found, stamps[places[at]]):
                        store = None
            except Stopped as stopped:
                if store and done.any():
                    count = f"{done.sum():,} of {len(paths):,}"
                    stopped.outcome = f". {count} images are in the index. The next search embeds the rest."
                raise
        if not done.any():
            raise DataError(f"--gallery {root}: all {len(paths):,} images are damaged. Name another folder of images.")
        found = embeddings[done]
        if store and store.done > 2 * len(found):  # most rows are of removed or changed images
            self._try_write(store.rewrite, store.path, found, stamps[done])
        return [path for path, has_row in zip(paths, done, strict=True) if has_row], found

    def _try_write(
        self, write: Callable[[Tensor, np.ndarray], None], path: Path, rows: np.ndarray, stamps: np.ndarray
    ) -> bool:
        """Write rows; on an error, report it and return False."""
        try:
            write(torch.from_numpy(rows), stamps)
        except OSError as error:
            self._note_unwritable(path, error)
            return False
        return True

    def _note_unwritable(self, path: Path, error: OSError) -> None:
        reason = error.strerror or error
        self.report(Note(f"{path}: the index cannot be written ({reason}). The answer is complete without it."))

    def _damaged(self, paths: Sequence[Path]) -> Collection[Path]:
        """The damaged images, with ``--skip-damaged``."""
        if not self.settings.skip_damaged:
            return ()
        images = ImageSet(tuple(paths), None, ()).decoded(self.settings.max_pixels)
        bad = find_damaged([images], self.settings.workers, self.report)
        if bad:
            self.report(Note(f"{len(bad)} damaged images are left out, the first of them {next(iter(bad))}"))
        return bad

    def _embedded(self, paths: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(B,) positions in ``paths`` and (B, D) embeddings of each batch without damaged images.

        After the last batch, a DataError names all damaged images.
        """
        if not paths:
            return
        images, context = ImageSet(tuple(paths), None, ()), self.context
        network = to_device(self.embedder.network, context.device).eval()
        form = for_inference(network, self.embedder.header.image_size, len(images), context, self.report)
        (batches,) = self.embedder.loaders([images], reading(self.settings), context, self.report)
        for batch, found in embed_batches(form, batches, context, "Embedding gallery", len(images), self.report):
            yield batch.index.cpu().numpy(), found.float().cpu().numpy()


def _as_on_disk(path: Path) -> Path:
    """The path in the Unicode form (NFC, NFD) that exists."""
    if path.exists():
        return path
    forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((form for form in forms if form.exists()), path)


def _images_of(flag: str, path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        hint = _suggestion(path) or ". Name an image, or a folder of images."
        raise DataError(f"{flag} {path}: no such file or folder{hint}")
    found = tuple(find_images(path))
    if not found:
        raise DataError(f"{flag} {path}: contains no images. Name another folder.")
    return found


def _suggestion(path: Path) -> str:
    """``meant`` among the names in the folder of a path that does not exist."""
    if path.exists() or not path.parent.is_dir():
        return ""
    return meant(path.name, [other.name for other in itertools.islice(path.parent.iterdir(), _COMPARED)])
