"""What retrieval keeps with shorter and smaller vectors, and in the gallery of another network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rkd_cli.compress import column_mean, leading, to_int8, to_signs, vector_bytes
from rkd_cli.metrics import asymmetric_recall_at_k, recall_at_k, rescored_recall_at_k
from rkd_cli.models.embedding_net import TeacherSpace


@dataclass(frozen=True)
class Variant:
    """Recall@K of unseen classes by queries of ``size``; ``gallery`` is another network's, None: the queries' own."""

    gallery: str | None
    size: int
    vectors: str
    bytes: int  # of a vector of the gallery
    recall: dict[int, float]


@dataclass(frozen=True)
class Rows:
    """(N, D) embeddings by one network, ``unit`` where it scales them to unit length."""

    embeddings: Tensor
    unit: bool


def measure_variants(
    queries: Rows,
    gallery: Rows,
    name: str | None,
    labels: Tensor,
    sizes: Sequence[int],
    stored: Sequence[str],
    ks: Sequence[int],
    space: TeacherSpace | None = None,
) -> Iterator[Variant]:
    """Recall@K for each size and each way to store a gallery; in another's gallery for the floats as they are, first.

    int8 and binary galleries are calibrated on themselves. Queries stay float beside an int8 gallery, as where an index
    decodes what it holds. Bits are compared with bits, by Hamming distance; ``binary+rescore`` orders the first 10 x K
    of that anew by the float query, about the same thresholds, against the gallery's bits.

    Args:
        queries: each the image of a row of the gallery.
        gallery: of the same images.
        name: of the gallery, None where queries and gallery are the same.
        labels: (N,).
        sizes: how many leading dimensions.
        stored: of float, int8 and binary.
        ks: the values of K.
        space: how queries come into the space of the gallery. Those of a size that has a projection are compared with
            whole rows of it; sizes that reach it in no way are left out.
    """
    whole = (queries.embeddings.shape[1], "float")
    asked = [(size, vectors) for size in sizes for vectors in stored if (size, vectors) != whole]
    for size, vectors in asked if name is None else [whole, *asked]:
        q, g = leading(queries.embeddings, size, queries.unit), gallery.embeddings
        if space and size in space.projections:
            q = space.project(q)
        elif queries.embeddings.shape == g.shape:
            g = leading(g, size, gallery.unit)
        else:
            continue
        for what, recall in _recalls(vectors, q, g, name is None, labels, ks):
            yield Variant(name, size, what, vector_bytes(vectors, g.shape[1]), recall)


def _recalls(
    vectors: str, queries: Tensor, gallery: Tensor, symmetric: bool, labels: Tensor, ks: Sequence[int]
) -> Iterator[tuple[str, dict[int, float]]]:
    if vectors == "float":
        found = recall_at_k(queries, labels, ks) if symmetric else asymmetric_recall_at_k(queries, gallery, labels, ks)
        yield vectors, found
    elif vectors == "int8":
        codes, scales = to_int8(gallery)
        yield vectors, asymmetric_recall_at_k(queries, codes * scales, labels, ks)
    else:
        threshold = column_mean(gallery).to(gallery.dtype)
        asked, kept = to_signs(queries, threshold), to_signs(gallery, threshold)
        yield vectors, asymmetric_recall_at_k(asked, kept, labels, ks)
        # a sign is +-1 about 0, so this distance orders as the product of query and bits does
        yield f"{vectors}+rescore", rescored_recall_at_k(queries - threshold, kept, asked, kept, labels, ks)
