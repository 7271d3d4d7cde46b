"""Two-dimensional maps of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rkd_cli.errors import SettingsError
from rkd_cli.runtime.seeds import derive_seed

_NEEDS = {"tsne": ("sklearn", "scikit-learn"), "umap": ("umap", "umap-learn")}
_POINTS = 1500  # of a map; more would overlap
_CLASSES = 48  # six shapes in eight colors


@dataclass(frozen=True)
class Plane:
    """A model's points within -1 to 1, and for principal components the explained fraction of the variance."""

    name: str
    points: tuple[tuple[float, float], ...]
    variance: float | None


def check_map(kind: str) -> None:
    """Raise a SettingsError if the package for a map is not installed."""
    module, package = _NEEDS.get(kind, ("torch", ""))
    if find_spec(module) is None:
        raise SettingsError(f"--map {kind}: {package} is not installed. Run `pip install {package}`, or use --map pca.")


def draw_points(labels: Tensor | None, total: int, seed: int) -> list[int]:
    """Sorted rows of at most 1,500 random images of at most 48 random classes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "map"))
    order = torch.randperm(total, generator=generator)
    if labels is not None:
        classes = torch.tensor(sorted({*labels.tolist()}))
        chosen = classes[torch.randperm(len(classes), generator=generator)[:_CLASSES]]
        order = order[torch.isin(labels[order], chosen)]
    rows: list[int] = order[:_POINTS].sort().values.tolist()
    return rows


def project(kind: str, spaces: Sequence[tuple[str, Tensor]], seed: int) -> list[Plane]:
    """A plane for each (name, (N, D) embeddings), rotated and mirrored to match the first one."""
    planes: list[Plane] = []
    target: Tensor | None = None
    for name, embeddings in spaces:
        x = embeddings.double().cpu()
        points, variance = _MAPS[kind](x - x.mean(dim=0), seed)
        points = points - points.mean(dim=0)
        points = points / points.norm().clamp(min=torch.finfo(points.dtype).tiny)
        if target is None:
            target = points
        else:  # orthogonal Procrustes: the rotation U V' of points' target = U S V'
            u, _, v = torch.linalg.svd(points.T @ target)
            points = points @ (u @ v)
        points = points - (points.amin(dim=0) + points.amax(dim=0)) / 2
        points = points / points.abs().max().clamp(min=torch.finfo(points.dtype).tiny)
        planes.append(Plane(name, tuple((a, b) for a, b in points.tolist()), variance))
    return planes


def _pca(x: Tensor, seed: int) -> tuple[Tensor, float | None]:
    u, s, _ = torch.linalg.svd(x, full_matrices=False)  # x = U S V': U S are the coordinates
    total = float(s.square().sum())
    points = torch.zeros(len(x), 2, dtype=x.dtype)
    points[:, : min(2, len(s))] = u[:, :2] * s[:2]
    return points, float(s[:2].square().sum()) / total if total else None


def _tsne(x: Tensor, seed: int) -> tuple[Tensor, float | None]:
    from sklearn.manifold import TSNE

    perplexity = max(1.0, min(30.0, (len(x) - 1) / 3))  # scikit-learn uses three times as many neighbors
    init = "pca" if min(x.shape) > 1 else "random"
    found = TSNE(perplexity=perplexity, init=init, random_state=_state(seed)).fit_transform(x.numpy())
    return _as_tensor(found), None


def _umap(x: Tensor, seed: int) -> tuple[Tensor, float | None]:
    from umap import UMAP

    neighbors = max(2, min(15, len(x) - 1))
    found = UMAP(n_neighbors=neighbors, random_state=_state(seed)).fit_transform(x.numpy())
    return _as_tensor(found), None


def _state(seed: int) -> int:
    return seed % 2**32  # numpy takes 32 bits


def _as_tensor(points: Any) -> Tensor:
    return torch.from_numpy(points).double()


_MAPS: dict[str, Callable[[Tensor, int], tuple[Tensor, float | None]]] = {"pca": _pca, "tsne": _tsne, "umap": _umap}
