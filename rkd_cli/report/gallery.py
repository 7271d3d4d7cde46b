"""Retrieval examples of a report: queries with their nearest images, and confused classes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.decode import Decoding, as_shown, read_image
from rkd_cli.metrics import Protocol
from rkd_cli.retrieval import BLOCK_ELEMENTS, nearest
from rkd_cli.runtime.seeds import derive_seed

NEAREST = 5  # images shown for a query
SIDE = 112  # pixels of a thumbnail on the page
_LARGEST = 256  # pixels of what is stored of an image, for the enlarged picture
_QUALITY = 60  # of its WebP: some 6 KB
_PAIRS = 10  # of confused classes


_Kind = tuple[str, str, list[int]]  # title, how they were chosen, queries (best first)


@dataclass(frozen=True)
class Space:
    """A model's (N, D) embeddings of a set, and the (N, 5) nearest images of each."""

    name: str
    embeddings: Tensor
    near: Tensor


@dataclass(frozen=True)
class Answer:
    """A found image. ``right``: it is of the query's class, or without classes, the teacher finds it too; or None."""

    image: int
    right: bool | None


@dataclass(frozen=True)
class Query:
    """A query image, and each model's nearest images."""

    image: int
    answers: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Gallery:
    """Queries of one kind, and how they were chosen."""

    title: str
    why: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Confusion:
    """Number of queries of a class whose nearest image is of another class, by model, with an example."""

    of: str
    taken_for: str
    counts: tuple[int, ...]
    queries: int
    query: int
    answer: int


def find_near(name: str, embeddings: Tensor, protocol: Protocol | None = None) -> Space:
    """The nearest other images of each image by (N, D) embeddings, of the gallery; a ValueError for a single image."""
    rows = torch.arange(len(embeddings), device=embeddings.device)
    gallery = protocol.gallery.to(rows.device) if protocol else rows
    own = torch.full_like(rows, -1)
    own[gallery] = torch.arange(len(gallery), device=rows.device)
    return Space(name, embeddings, gallery[nearest(embeddings, embeddings[gallery], NEAREST, own)[1]])


def recall_by_class(space: Space, labels: Tensor, queries: Tensor | None = None) -> dict[int, float]:
    """{class: the share of its images, or of its queries, whose nearest image is of it}."""
    rows = torch.arange(len(labels)) if queries is None else queries.cpu()
    right = labels[space.near[:, 0].cpu()[rows]] == labels[rows]
    return {label: float(right[labels[rows] == label].double().mean()) for label in torch.unique(labels[rows]).tolist()}


def find_galleries(
    spaces: Sequence[Space],
    main: int,
    other: int | None,
    teacher: int | None,
    labels: Tensor | None,
    count: int,
    seed: int,
    queries: Container[int] | None = None,
) -> list[Gallery]:
    """Up to ``count`` distinct queries of each kind, of different classes if possible.

    Args:
        spaces: the models.
        main: index of the model that queries are hard or easy for.
        other: index of a model to compare it with.
        teacher: index of the model that defines right answers if there are no labels.
        labels: (N,) of the images.
        count: queries per kind.
        seed: for random queries.
        queries: images that may be queries, if not all are.
    """
    if not count:
        return []
    rights = [
        _rights(space, None if teacher in (None, at) else spaces[teacher], labels) for at, space in enumerate(spaces)
    ]
    if labels is not None:
        kinds = _kinds_by_class(spaces, rights, main, other, labels)
    else:
        kinds = _kinds_by_teacher(spaces, rights[main], main, teacher)
    total = len(spaces[main].near)
    kinds.append(("Drawn at random", f"seed {seed}", _drawn(total, seed)))
    classes: Sequence[int] = range(total) if labels is None else labels.tolist()
    galleries, used = [], set[int]()
    for title, why, order in kinds:
        order = [row for row in order if queries is None or row in queries]
        picked = _pick(order, count, classes, used)
        used |= {*picked}
        asked = [Query(row, tuple(_answers(s, r, row) for s, r in zip(spaces, rights, strict=True))) for row in picked]
        if asked:
            galleries.append(Gallery(title, why, tuple(asked)))
    return galleries


def draw_queries(labels: Sequence[int] | None, total: int, count: int, seed: int) -> list[int]:
    """Up to ``count`` random images, of different classes if possible, without classes of a single image."""
    order, classes = _drawn(total, seed), range(total) if labels is None else labels
    sizes = Counter(classes)
    if labels is not None:
        order = [row for row in order if sizes[classes[row]] > 1]
    return _pick(order, count, classes, set())


def find_confusions(
    spaces: Sequence[Space], main: int, images: ImageSet, labels: Tensor, queries: Container[int] | None = None
) -> list[Confusion]:
    """The pairs of classes that ``spaces[main]`` confuses most often. ``queries``: as in ``find_galleries``."""
    of = labels.tolist()
    rows = [row for row in range(len(of)) if queries is None or row in queries]
    sizes = Counter(of[row] for row in rows)
    found = []
    for space in spaces:
        first = space.near[:, 0].tolist()
        found.append([(of[row], of[first[row]]) for row in rows])
    counts = [Counter(pair for pair in pairs if pair[0] != pair[1]) for pairs in found]
    confusions = []
    for pair, _ in sorted(counts[main].items(), key=lambda item: (-item[1], item[0]))[:_PAIRS]:
        query = rows[found[main].index(pair)]
        confusions.append(
            Confusion(
                images.classes[pair[0]],
                images.classes[pair[1]],
                tuple(count[pair] for count in counts),
                sizes[pair[0]],
                query,
                int(spaces[main].near[query, 0]),
            )
        )
    return confusions


def shown_images(galleries: Iterable[Gallery], confusions: Iterable[Confusion]) -> list[int]:
    """The images of which the page needs a picture, each once."""
    shown: list[int] = []
    for gallery in galleries:
        for query in gallery.queries:
            shown += [query.image, *(answer.image for answers in query.answers for answer in answers)]
    for pair in confusions:
        shown += [pair.query, pair.answer]
    return list(dict.fromkeys(shown))


def thumbnail(
    path: Path,
    side: int = _LARGEST,
    square: bool = False,
    decoding: Decoding = Decoding(),  # noqa: B008  # frozen
) -> bytes | None:
    """A WebP of an image or its box: within ``side``, or its middle square; None if it cannot be read."""
    box = decoding.boxes.get(path)

    def shrink(upright: Image.Image) -> Image.Image:
        part = upright.crop(box[:4]) if box else upright
        within = min(side, part.width), min(side, part.height)
        return ImageOps.fit(part, (side, side)) if square else ImageOps.contain(part, within)

    def made(image: Image.Image) -> Image.Image:
        if not box:
            image.draft(None, (side, side))  # decodes a JPEG at a reduced size
        return as_shown(image, shrink)

    try:
        small = read_image(path, made)
    except Exception:  # decoders raise many types on damaged files
        return None
    data = io.BytesIO()
    small.save(data, "WEBP", quality=_QUALITY, method=4)
    return data.getvalue()


@torch.no_grad()
def _margins(embeddings: Tensor, labels: Tensor) -> Tensor:
    """(N,) distance of the nearest negative minus that of the nearest positive; infinite if one is missing."""
    found = []
    rows = torch.arange(len(embeddings), device=embeddings.device)
    for block in torch.split(rows, max(1, BLOCK_ELEMENTS // len(rows))):
        distances = torch.cdist(embeddings[block], embeddings)
        same = labels[block, None] == labels
        negative = distances.masked_fill(same, torch.inf).amin(dim=1)
        same[torch.arange(len(block), device=rows.device), block] = False
        found.append(negative - distances.masked_fill(~same, torch.inf).amin(dim=1))
    margins = torch.cat(found).cpu()
    return torch.where(margins.isfinite(), margins, torch.inf)


def _rights(space: Space, teacher: Space | None, labels: Tensor | None) -> Tensor | None:
    """(N, 5) whether each answer is right, None without labels and teacher."""
    if labels is not None:
        return (labels[space.near] == labels[:, None]).cpu()
    if teacher is None:
        return None
    return (space.near[:, :, None] == teacher.near[:, None, :]).any(dim=2).cpu()


def _kinds_by_class(
    spaces: Sequence[Space], rights: Sequence[Tensor | None], main: int, other: int | None, labels: Tensor
) -> list[_Kind]:
    name, score = spaces[main].name, _margins(spaces[main].embeddings, labels)
    valid = score.isfinite()
    kinds = [
        ("The hardest", f"{name} has a wrong image far nearer than any right one", _order(score, valid)),
        ("The easiest", f"{name} has every wrong image far behind a right one", _order(-score, valid)),
    ]
    mine, theirs = rights[main], rights[other] if other is not None else None
    if other is not None and mine is not None and theirs is not None:
        against = spaces[other].name
        lead = _scaled(_margins(spaces[other].embeddings, labels), valid) - _scaled(score, valid)
        why = "by the nearest image; the largest difference first"
        lost, won = valid & theirs[:, 0] & ~mine[:, 0], valid & ~theirs[:, 0] & mine[:, 0]
        kinds.append((f"Right by {against}, wrong by {name}", why, _order(-lead, lost)))
        kinds.append((f"Right by {name}, wrong by {against}", why, _order(lead, won)))
    return kinds


def _kinds_by_teacher(spaces: Sequence[Space], right: Tensor | None, main: int, teacher: int | None) -> list[_Kind]:
    if right is None or teacher is None:
        return []
    share, name, by = right.float().mean(dim=1), spaces[main].name, spaces[teacher].name
    return [
        ("The hardest", f"{name} finds the fewest of the five that {by} finds", _order(share)),
        ("The easiest", f"{name} finds the most of the five that {by} finds", _order(-share)),
    ]


def _answers(space: Space, right: Tensor | None, row: int) -> tuple[Answer, ...]:
    near = space.near[row].tolist()
    return tuple(Answer(image, None if right is None else bool(right[row, at])) for at, image in enumerate(near))


def _scaled(score: Tensor, valid: Tensor) -> Tensor:
    """Divide by the standard deviation, to compare the margins of two spaces."""
    spread = float(score[valid].std(unbiased=False)) if bool(valid.any()) else 0.0
    return score / (spread or 1.0)


def _drawn(total: int, seed: int) -> list[int]:
    """All rows in random order."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "gallery"))
    order: list[int] = torch.randperm(total, generator=generator).tolist()
    return order


def _order(score: Tensor, valid: Tensor | None = None) -> list[int]:
    """The valid rows, the lowest score first."""
    order: list[int] = score.argsort(stable=True).tolist()
    return order if valid is None else [row for row in order if valid[row]]


def _pick(order: Sequence[int], count: int, classes: Sequence[int], used: set[int]) -> list[int]:
    """The first unused rows, of different classes if possible."""
    rest = [row for row in order if row not in used]
    firsts: dict[int, int] = {}
    for row in rest:
        firsts.setdefault(classes[row], row)
    picked = [*firsts.values()][:count]
    picked += [row for row in rest if row not in {*picked}][: count - len(picked)]
    return picked
