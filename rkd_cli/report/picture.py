"""A picture of retrieval: some queries and their nearest images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli.data.loader import EvalLoader
from rkd_cli.report.gallery import NEAREST, SIDE, draw_queries
from rkd_cli.retrieval import nearest

RIGHT, WRONG = (0x2F, 0x7D, 0x4F), (0xB4, 0x44, 0x2E)  # as in the report; wrong ones are also dashed
_QUERIES = 4
_FRAME, _MARGIN, _DASH = 4, 8, 8  # pixels; the frame is in the margin
_PAPER = 255


def draw_retrieval(loader: EvalLoader, embeddings: Tensor, seed: int) -> Tensor:
    """(H, W, 3) uint8: four random images, each with the five nearest to its right.

    With labels, right and wrong images are framed. ``embeddings`` are (N, D) of the images of ``loader``.
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
    """(B, 3, S, S) uint8 -> (B, s, s, 3) uint8, s at most the side of a thumbnail."""
    side = min(SIDE, images.shape[-1])
    small = F.interpolate(images.float(), size=(side, side), mode="area").round()
    return small.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _framed(image: Tensor, right: bool | None) -> Tensor:
    """(s, s, 3) -> (s + 2 margins, s + 2 margins, 3)."""
    side = len(image) + 2 * _MARGIN
    tile = torch.full((side, side, 3), _PAPER, dtype=torch.uint8)
    if right is not None:
        edge = _MARGIN - _FRAME
        tile[edge:-edge, edge:-edge] = torch.tensor(RIGHT if right else WRONG, dtype=torch.uint8)
    if right is False:
        along = torch.arange(side)
        gaps = torch.minimum(along, side - 1 - along) // _DASH % 2 == 0
        gaps[:_MARGIN] = gaps[-_MARGIN:] = False  # the margins have no gaps of other sides
        tile[gaps] = tile[:, gaps] = _PAPER
    tile[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = image
    return tile
