"""Cached views: what a network makes of crops of images, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.cache import pixel_facts
from rkd_cli.data.decode import Crop, center_crop
from rkd_cli.data.loader import Batch, CachedViews, PixelReader, batch_of
from rkd_cli.embedding.batches import check_finite, embed_batches
from rkd_cli.embedding.store import CacheRows, cached_rows
from rkd_cli.events import Reporter
from rkd_cli.runtime.context import Context

_AT_ONCE = 256  # crops


@dataclass(frozen=True)
class ViewCache:
    """Embeddings of crops, computed where they are not in the cache.

    Args:
        compute: (B, 3, H, W) images on the device -> (B, D).
        size: D.
        digest: of the weights behind ``compute``.
        resize, image_size: sides, in pixels.
        reader: of pixels.
        folder: of caches.
        context: of this process.
        report: is told how far it is.
        cache: what has them computed and caches them.
    """

    compute: Callable[[Tensor], Tensor]
    size: int
    digest: str
    resize: int
    image_size: int
    reader: PixelReader
    folder: Path
    context: Context
    report: Reporter
    cache: CacheRows = cached_rows

    def center(self, images: ImageSet, what: str) -> Tensor:
        """(N, D) float32 of the center crops, as images are evaluated.

        Args:
            images: N.
            what: the name of this work.
        Raises:
            DataError: damaged images.
            RunError: the file cannot be written, or vectors are not finite.
        """

        def crops(rows: Sequence[int]) -> list[Crop]:
            return [center_crop(index, self.resize, self.image_size) for index in rows]

        return self._cached(images, len(images), crops, "center", torch.float32, what)

    def views(self, images: ImageSet, views: CachedViews, dtype: torch.dtype, what: str) -> Tensor:
        """(N, K, D) of K crops of each image.

        Args:
            images: N.
            views: K of each.
            dtype: how they are cached, float16 or float32.
            what: the name of this work.
        Raises:
            DataError: damaged images.
            RunError: the file cannot be written, or vectors are not finite.
        """
        found = self._cached(images, len(views), views.crops, views.digest, dtype, what)
        return found.view(len(images), -1, self.size)  # (N * K, D) -> (N, K, D)

    def _cached(
        self,
        images: ImageSet,
        count: int,
        crops: Callable[[Sequence[int]], list[Crop]],
        drawn: str,
        dtype: torch.dtype,
        what: str,
    ) -> Tensor:
        facts = pixel_facts(images.paths, self.resize, images.decoding) | {
            "vectors of": self.digest,
            "crops": drawn,
            "image_size": self.image_size,
            "precision": self.context.precision,
        }

        def compute(first: int) -> Iterator[Tensor]:
            starts = range(first, count, _AT_ONCE)
            plan = (crops(range(start, min(start + _AT_ONCE, count))) for start in starts)
            batches = self.reader.read(images, plan)
            for _, found in embed_batches(self.compute, batches, self.context, what, is_checked=False):
                rows = found.float().to(dtype)
                check_finite(rows, what, f" in {dtype}")
                yield rows

        return self.cache(self.folder, facts, (count, self.size), dtype, compute, self.report, what)


@dataclass(frozen=True)
class VectorReader:
    """Gives cached vectors where a ``PixelReader`` gives pixels: (B, F) as the images of a batch."""

    vectors: Tensor  # (N, K, F)
    what: str = "features that were computed once"

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """See ``PixelReader``; of a crop only the image and the view count."""
        for crops in plan:
            index = torch.tensor([(crop.index, crop.view) for crop in crops]).T
            index = index.to(self.vectors.device, non_blocking=True)
            yield batch_of(images, crops, self.vectors[index[0], index[1]].float())
