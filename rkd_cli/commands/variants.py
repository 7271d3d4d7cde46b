"""Recall with shorter and smaller vectors, and in the gallery of another network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rkd_cli.compress import column_mean, leading, to_int8, to_signs, vector_bytes
from rkd_cli.embedding.embedder import Embedder
from rkd_cli.metrics import Protocol, asymmetric_recall_at_k, recall_at_k, rescored_recall_at_k
from rkd_cli.models.embedding_net import TeacherSpace

_FINEST_FIRST = ("float", "float16", "int8", "binary")


@dataclass(frozen=True)
class Variant:
    """Recall@K of the evaluation split with one size and kind of vectors."""

    gallery: str | None  # the network of the gallery, None if it is that of the queries
    size: int  # of the queries
    vectors: str
    bytes: int  # per vector of the gallery
    recall: dict[int, float]


@dataclass(frozen=True)
class Rows:
    """(N, D) embeddings of a network; ``unit``: it scales them to unit length; ``kind``: how their file stores them."""

    embeddings: Tensor
    unit: bool
    kind: str = "float"


def kind_of(model: Embedder) -> str:
    """How the embeddings of a model are stored: float, unless they are those of a vectors file of another kind."""
    return model.vectors.kind if model.vectors else "float"


def stored_as(vectors: str, kind: str) -> str:
    """The coarser of two forms: embeddings of a ``kind`` cannot be measured as finer ``vectors``."""
    return max(vectors, kind, key=_FINEST_FIRST.index)


def measure_variants(
    queries: Rows,
    gallery: Rows,
    name: str | None,
    measured: tuple[Tensor, Protocol | None],
    sizes: Sequence[int],
    stored: Sequence[str],
    ks: Sequence[int],
    space: TeacherSpace | None = None,
) -> Iterator[Variant]:
    """Recall@K for each size and each kind of vectors; for the gallery of another network, first with whole embeddings.

    Embeddings of a file are measured as it stores them in place of a finer kind. The whole ones are left out if the
    gallery is that of the queries.

    int8 and binary galleries are calibrated on themselves. Queries of an int8 gallery stay float. Binary queries are
    compared by Hamming distance; ``binary+rescore`` re-ranks the first 10 x K with the float query minus the
    thresholds.

    Args:
        queries, gallery: of the same N images, in the same order.
        name: of the gallery's network, None if it is that of the queries.
        measured: (N,) labels, and queries and gallery if not all are both; ``binary+rescore`` is then left out.
        sizes: numbers of leading dimensions.
        stored: float, int8 or binary.
        ks: the values of K.
        space: projections of queries into the gallery's space, which are compared with whole rows. A size without a
            projection is left out unless the gallery has the same number of dimensions.
    """
    whole = (queries.embeddings.shape[1], gallery.kind)
    kinds = dict.fromkeys(stored_as(vectors, gallery.kind) for vectors in stored)
    others = [(size, vectors) for size in sizes for vectors in kinds if (size, vectors) != whole]
    for size, vectors in others if name is None else [whole, *others]:
        q, g = leading(queries.embeddings, size, queries.unit), gallery.embeddings
        if space and size in space.projections:
            q = space.project(q)
        elif queries.embeddings.shape == g.shape:
            g = leading(g, size, gallery.unit)
        else:
            continue
        bytes_each = vector_bytes(vectors, g.shape[1])
        if vectors == gallery.kind:
            yield Variant(name, size, vectors, bytes_each, _recall(q, g, name is None, measured, ks))
            continue
        for what, recall in _compressed_recalls(vectors, q, g, measured, ks):
            yield Variant(name, size, what, bytes_each, recall)


def _recall(
    queries: Tensor, gallery: Tensor, symmetric: bool, measured: tuple[Tensor, Protocol | None], ks: Sequence[int]
) -> dict[int, float]:
    labels, protocol = measured
    if symmetric:
        return recall_at_k(queries, labels, ks, protocol=protocol)
    return asymmetric_recall_at_k(queries, gallery, labels, ks, protocol)


def _compressed_recalls(
    vectors: str, queries: Tensor, gallery: Tensor, measured: tuple[Tensor, Protocol | None], ks: Sequence[int]
) -> Iterator[tuple[str, dict[int, float]]]:
    labels, protocol = measured
    if vectors == "int8":
        codes, scales = to_int8(gallery)
        yield vectors, asymmetric_recall_at_k(queries, codes * scales, labels, ks, protocol)
    else:
        threshold = column_mean(gallery).to(gallery.dtype)
        query_signs, signs = to_signs(queries, threshold), to_signs(gallery, threshold)
        yield vectors, asymmetric_recall_at_k(query_signs, signs, labels, ks, protocol)
        if protocol:
            return
        # all sign vectors have the same length, so distances rank as dot products do
        yield f"{vectors}+rescore", rescored_recall_at_k(queries - threshold, signs, query_signs, signs, labels, ks)
