"""What a report shows of retrieval: queries with their nearest images, and the classes that are taken for others."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.retrieval import BLOCK_ELEMENTS, nearest
from rkd_cli.runtime.seeds import derive_seed

_NEAREST = 5  # images that a query is answered with
_SIDE = 112  # pixels of a thumbnail
_QUALITY = 70  # of its WebP: 2 or 3 KB
_PAIRS = 10  # of classes that are confused


@dataclass(frozen=True)
class Space:
    """A model's embeddings: (N, D) of all images of a set, and (N, 5) the nearest of each by them."""

    name: str
    embeddings: Tensor
    near: Tensor


@dataclass(frozen=True)
class Answer:
    """An image that was found. ``right`` says whether it is of the query's class; where there are no classes, whether
    the teacher finds it too; None where nobody says."""

    image: int
    right: bool | None


@dataclass(frozen=True)
class Query:
    """An image of the set, and what each model finds nearest to it."""

    image: int
    answers: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Gallery:
    """Queries of one kind; ``why`` says how they were chosen."""

    title: str
    why: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Confusion:
    """Queries of a class whose nearest image is of another one: how many, by each model. With a query and its answer by
    the model that the pair was chosen by."""

    of: str
    taken_for: str
    counts: tuple[int, ...]
    queries: int
    query: int
    answer: int


def find_near(name: str, embeddings: Tensor) -> Space:
    """The nearest of each image by a model's (N, D) embeddings.

    Raises:
        ValueError: one image alone.
    """
    rows = torch.arange(len(embeddings), device=embeddings.device)
    return Space(name, embeddings, nearest(embeddings, embeddings, _NEAREST, rows)[1])


def find_galleries(
    spaces: Sequence[Space], main: int, labels: Tensor | None, count: int, seed: int, has_teacher: bool
) -> list[Gallery]:
    """Queries worth a look, of each kind up to ``count``, none of them twice, and if it goes each of another class.

    Args:
        spaces: of the models; the first is what others are compared with.
        main: by which of them queries are hard or easy.
        labels: (N,) of the images, None where there are none.
        count: queries of a kind.
        seed: of what is drawn.
        has_teacher: whether the first is a teacher, who says what is right where there are no labels.
    """
    if not count:
        return []
    rights = [_rights(space, spaces[0] if has_teacher else None, labels) for space in spaces]
    scores = [_margins(space.embeddings, labels) for space in spaces] if labels is not None else None
    total, name, first = len(spaces[0].near), spaces[main].name, spaces[0].name
    kinds: list[tuple[str, str, list[int]]] = []
    if scores is not None:
        score = scores[main]
        valid = score.isfinite()
        kinds = [
            ("The hardest", f"{name} has a wrong image far nearer than any right one", _order(score, valid)),
            ("The easiest", f"{name} has every wrong image far behind a right one", _order(-score, valid)),
        ]
    elif has_teacher and main:
        share = _shares(rights[main])
        kinds = [
            ("The hardest", f"{name} shares the fewest of its five with {first}", _order(share)),
            ("The easiest", f"{name} shares the most of its five with {first}", _order(-share)),
        ]
    if scores is not None and main:
        hits = [_hits(rights[0]), _hits(rights[main])]
        lead = scores[0] / scores[0][valid].std() - scores[main] / scores[main][valid].std()
        lost, found = valid & hits[0] & ~hits[1], valid & ~hits[0] & hits[1]
        kinds += [
            (f"Right by {first}, wrong by {name}", "the first answers; the widest apart come first",
             _order(-lead, lost)),
            (f"Right by {name}, wrong by {first}", "the first answers; the widest apart come first",
             _order(lead, found)),
        ]  # fmt: skip
    generator = torch.Generator().manual_seed(derive_seed(seed, "gallery"))
    kinds.append(("Drawn at random", f"seed {seed}", torch.randperm(total, generator=generator).tolist()))
    of = [0] * total if labels is None else labels.tolist()
    galleries, used = [], set[int]()
    for title, why, order in kinds:
        picked = _pick(order, count, of if labels is not None else range(total), used)
        used |= {*picked}
        queries = tuple(
            Query(
                query,
                tuple(
                    tuple(
                        Answer(image, bool(ok) if right is not None else None)
                        for image, ok in zip(
                            space.near[query].tolist(), right[query] if right is not None else space.near[query],
                            strict=True,
                        )
                    )
                    for space, right in zip(spaces, rights, strict=True)
                ),
            )
            for query in picked
        )  # fmt: skip
        if queries:
            galleries.append(Gallery(title, why, queries))
    return galleries


def find_confusions(spaces: Sequence[Space], main: int, images: ImageSet, labels: Tensor) -> list[Confusion]:
    """The pairs of classes where the nearest image is of the other one most often, by ``spaces[main]``."""
    of = labels.tolist()
    sizes = Counter(of)
    found = []
    for space in spaces:
        first = space.near[:, 0].tolist()
        found.append([(label, of[answer]) for label, answer in zip(of, first, strict=True)])
    counts = [Counter(pair for pair in pairs if pair[0] != pair[1]) for pairs in found]
    confusions = []
    for pair, _ in sorted(counts[main].items(), key=lambda item: (-item[1], item[0]))[:_PAIRS]:
        query = found[main].index(pair)
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
    """Which images of the set a picture is needed of, each once."""
    shown: list[int] = []
    for gallery in galleries:
        for query in gallery.queries:
            shown += [query.image, *(answer.image for answers in query.answers for answer in answers)]
    for pair in confusions:
        shown += [pair.query, pair.answer]
    return list(dict.fromkeys(shown))


def thumbnail(path: Path) -> bytes | None:
    """A small square WebP of the middle of an image, EXIF rotation ignored as everywhere; None: it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (_SIDE, _SIDE))  # of a JPEG: decodes no more than it takes
            small = ImageOps.fit(image.convert("RGB"), (_SIDE, _SIDE))
    except Exception:  # a damaged file can raise nearly anything from inside a decoder
        return None
    data = io.BytesIO()
    small.save(data, "WEBP", quality=_QUALITY, method=4)
    return data.getvalue()


@torch.no_grad()
def _margins(embeddings: Tensor, labels: Tensor) -> Tensor:
    """(N,) how much farther the nearest negative is than the nearest positive; infinite where one is missing."""
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
    """(N, 5) whether each answer is right; None where nobody can say."""
    if labels is not None:
        return (labels[space.near] == labels[:, None]).cpu()
    if teacher is None or teacher is space:
        return None
    return (space.near[:, :, None] == teacher.near[:, None, :]).any(dim=2).cpu()


def _shares(right: Tensor | None) -> Tensor:
    assert right is not None  # the main model is not the teacher
    return right.float().mean(dim=1)


def _hits(right: Tensor | None) -> Tensor:
    assert right is not None  # there are labels
    return right[:, 0]


def _order(score: Tensor, valid: Tensor | None = None) -> list[int]:
    """The valid rows, the lowest score first."""
    order: list[int] = score.argsort(stable=True).tolist()
    return order if valid is None else [row for row in order if valid[row]]


def _pick(order: Sequence[int], count: int, classes: Sequence[int], used: set[int]) -> list[int]:
    """The first ones that are not used, of a class each as long as there are others."""
    rest = [row for row in order if row not in used]
    firsts: dict[int, int] = {}
    for row in rest:
        firsts.setdefault(classes[row], row)
    picked = [*firsts.values()][:count]
    picked += [row for row in rest if row not in {*picked}][: count - len(picked)]
    return picked
