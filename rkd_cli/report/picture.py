"""One picture of what a network finds: some queries and the images nearest to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli.data.loader import EvalLoader
from rkd_cli.report.gallery import NEAREST, SIDE, draw_queries
from rkd_cli.retrieval import nearest

RIGHT, WRONG = (0x2F, 0x7D, 0x4F), (0xB4, 0x44, 0x2E)  # the report's; a wrong one's frame is dashed too
_QUERIES = 4
_FRAME, _MARGIN, _DASH = 4, 8, 8  # pixels; the margin holds the frame
_PAPER = 255


def draw_retrieval(loader: EvalLoader, embeddings: Tensor, seed: int) -> Tensor:
    """Four images drawn by the seed, each at the left of the five nearest to it, right and wrong ones framed.

    Without labels nobody says what is right, and nothing is framed.

    Args:
        loader: of the images.
        embeddings: (N, D), on any device.
        seed: of the queries.
    Returns:
        (H, W, 3) uint8, on the CPU.
    Raises:
        DataError: a damaged image.
    """
    images = loader.images
    queries = draw_queries(images.labels, len(images), _QUERIES, seed)
    own = torch.tensor(queries, device=embeddings.device)
    near = [[] for _ in queries] if len(images) == 1 else nearest(embeddings[own], embeddings, NEAREST, own)[1].tolist()
    shown = list(dict.fromkeys([*queries, *(answer for answers in near for answer in answers)]))
    pictures = dict(zip(shown, _thumbnails(loader.pixels(shown)), strict=True))
    blank = torch.full_like(_framed(pictures[queries[0]], None), _PAPER)
    lines = []
    for query, answers in zip(queries, near, strict=True):
        rights = [None if images.labels is None else images.labels[a] == images.labels[query] for a in answers]
        found = [_framed(pictures[answer], right) for answer, right in zip(answers, rights, strict=True)]
        space = blank[:, : 2 * _MARGIN]
        missing = [blank] * (NEAREST - len(found))
        lines.append(torch.cat([_framed(pictures[query], None), space, *found, *missing], dim=1))
    return torch.cat(lines)


def _thumbnails(images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, s, s, 3) uint8 of no more than a thumbnail's side."""
    side = min(SIDE, images.shape[-1])
    small = F.interpolate(images.float(), size=(side, side), mode="area").round()
    return small.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _framed(image: Tensor, right: bool | None) -> Tensor:
    """(s, s, 3) -> (s + 2 margins, likewise, 3)."""
    side = len(image) + 2 * _MARGIN
    tile = torch.full((side, side, 3), _PAPER, dtype=torch.uint8)
    if right is not None:
        edge = _MARGIN - _FRAME
        tile[edge:-edge, edge:-edge] = torch.tensor(RIGHT if right else WRONG, dtype=torch.uint8)
    if right is False:
        along = torch.arange(side)
        gaps = torch.minimum(along, side - 1 - along) // _DASH % 2 == 0
        gaps[:_MARGIN] = gaps[-_MARGIN:] = False  # corners, and with them the sides, are no gaps of the others
        tile[gaps] = tile[:, gaps] = _PAPER
    tile[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = image
    return tile
