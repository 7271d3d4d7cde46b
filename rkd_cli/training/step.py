"""One step of distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.device import autocast


@dataclass(frozen=True)
class View:
    """What one network makes of a batch: feature maps of its four blocks (where a term needs them), embeddings."""

    maps: list[Tensor]
    embeddings: Tensor


@dataclass(frozen=True)
class Term:
    """A part of the loss: ``loss(student, teacher, labels)`` times ``ratio``."""

    name: str
    ratio: float
    loss: Callable[[View, View, Tensor], Tensor]
    needs_maps: bool = False


def distill_terms(
    student: EmbeddingNet,
    teacher: EmbeddingNet,
    terms: Sequence[Term],
    device: torch.device,
    precision: str,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """{name: ratio * loss} of one batch. The teacher is in evaluation mode and gets no gradient."""
    maps = any(term.needs_maps for term in terms)
    with autocast(device, precision):
        with torch.no_grad():
            taught = _view(teacher, images, maps)
        learned = _view(student, images, maps)
    return {term.name: term.ratio * term.loss(learned, taught, labels) for term in terms}


def _view(network: EmbeddingNet, images: Tensor, with_maps: bool) -> View:
    maps, embeddings = network.with_maps(images) if with_maps else ([], network(images))
    return View([m.float() for m in maps], embeddings.float())
