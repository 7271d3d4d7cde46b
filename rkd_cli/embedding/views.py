"""Cached views: embeddings of image crops, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.cache import pixel_facts
from rkd_cli.data.decode import Crop, center_crop
from rkd_cli.data.loader import Batch, CachedViews, PixelReader, batch_of
from rkd_cli.embedding.batches import check_finite, embed_batches
from rkd_cli.embedding.store import CacheRows, cached_rows
from rkd_cli.events import Reporter
from rkd_cli.models.inference import for_inference
from rkd_cli.runtime.context import Context

_AT_ONCE = 256  # crops


@dataclass(frozen=True)
class ViewCache:
    """Embeddings of crops, from a cache file or computed into it.

    Methods raise a DataError for damaged images, and a RunError if embeddings are not finite or the file cannot be
    written. ``what`` names the work in progress and errors.
    """

    compute: Callable[[Tensor], Tensor]  # (B, 3, H, W) images on the device -> (B, D)
    size: int  # D
    digest: str  # of the weights of ``compute``
    resize: int
    image_size: int
    reader: PixelReader
    folder: Path  # the cache folder
    context: Context
    report: Reporter
    cache: CacheRows = cached_rows

    def center(self, images: ImageSet, what: str) -> Tensor:
        """(N, D) float32 embeddings of the center crops, which evaluation uses."""

        def crops(rows: Sequence[int]) -> list[Crop]:
            return [center_crop(index, self.resize, self.image_size) for index in rows]

        return self._cached(images, len(images), crops, "center", torch.float32, what)

    def views(self, images: ImageSet, views: CachedViews, dtype: torch.dtype, what: str) -> Tensor:
        """(N, K, D) embeddings of K crops per image, stored as ``dtype``, float16 or float32."""
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
            "precision": self.context.inference_precision(self.compute),
        }

        def compute(first: int) -> Iterator[Tensor]:
            starts = range(first, count, _AT_ONCE)
            plan = (crops(range(start, min(start + _AT_ONCE, count))) for start in starts)
            batches = self.reader.read(images, plan)
            network = self.compute
            if isinstance(network, nn.Module):
                network = for_inference(network, self.image_size, count, self.context, self.report)
            for _, found in embed_batches(network, batches, self.context, what, is_checked=False):
                rows = found.float().to(dtype)
                check_finite(rows, what, "Use --views-precision fp32, or another teacher.")
                yield rows

        return self.cache(self.folder, facts, (count, self.size), dtype, compute, self.report, what)


@dataclass(frozen=True)
class VectorReader:
    """A ``PixelReader`` of cached vectors: batches have (B, F) features in place of images."""

    vectors: Tensor  # (N, K, F)
    what: str = "cached features"

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """See ``PixelReader``. Only the image and the view of a crop matter."""
        for crops in plan:
            index = torch.tensor([(crop.index, crop.view) for crop in crops]).T
            index = index.to(self.vectors.device, non_blocking=True)
            yield batch_of(images, crops, self.vectors[index[0], index[1]].float())
