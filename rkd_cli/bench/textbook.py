"""Formulas and loops as in published research code, for tests and ``rkd bench`` to compare with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

Triplets = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Tensor]  # (images, labels) -> loss
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def pairwise_distances(x: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """(N, N) distances from the Gram matrix, in the type of ``x``."""
    squares = x.pow(2).sum(dim=1)
    result = (squares[:, None] + squares[None, :] - 2 * (x @ x.t())).clamp(min=eps)
    if not squared:
        result = result.sqrt()
    result = result.clone()
    result[range(len(x)), range(len(x))] = 0
    return result


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D, equations 4 to 6 of the paper."""
    with torch.no_grad():
        target = pairwise_distances(teacher)
        target = target / target[target > 0].mean()
    distances = pairwise_distances(student)
    distances = distances / distances[distances > 0].mean()
    return F.smooth_l1_loss(distances, target)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A, equations 7 to 9 of the paper, with (N, N, D) differences and (N, N, N) cosines."""
    with torch.no_grad():
        teacher_differences = teacher[None, :] - teacher[:, None]  # (N, N, D)
        teacher_directions = F.normalize(teacher_differences, p=2, dim=2)
        target = torch.bmm(teacher_directions, teacher_directions.transpose(1, 2)).view(-1)  # (N, N, N) -> (N N N,)
    differences = student[None, :] - student[:, None]
    directions = F.normalize(differences, p=2, dim=2)
    cosines = torch.bmm(directions, directions.transpose(1, 2)).view(-1)
    return F.smooth_l1_loss(cosines, target)


def recall(embeddings: Tensor, labels: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Recall@K from the whole (N, N) matrix of distances, assuming that the nearest row is the query itself."""
    nearest = pairwise_distances(embeddings, squared=True).topk(1 + max(ks), dim=1, largest=False)[1][:, 1:]
    correct = labels[nearest] == labels[:, None]
    return {k: (correct[:, :k].sum(dim=1) > 0).float().mean().item() for k in ks}


def semihard_triplets(embeddings: Tensor, labels: Tensor) -> Triplets:
    """Schroff et al., CVPR 2015, with an (N^2, N) matrix of all pairs of distances in a row."""
    n = len(labels)
    distances = pairwise_distances(embeddings)
    negatives = labels[:, None] != labels[None, :]
    tiled = distances.repeat_interleave(n, dim=0)  # (N, N) -> (N N, N): the row of the anchor, for each positive
    candidates = negatives.repeat_interleave(n, dim=0)
    outside = candidates & (tiled > distances.view(-1, 1))
    nearest = tiled.masked_fill(~outside, torch.inf).argmin(dim=1)
    farthest = tiled.masked_fill(~candidates, -torch.inf).argmax(dim=1)
    chosen = torch.where(outside.any(dim=1), nearest, farthest).view(n, n)
    anchor, positive = (~negatives & ~torch.eye(n, dtype=torch.bool, device=labels.device)).nonzero(as_tuple=True)
    return anchor, positive, chosen[anchor, positive]


def all_triplets(embeddings: Tensor, labels: Tensor) -> Triplets:
    """Every triplet, with an (N, N, N) mask."""
    same = labels[:, None] == labels[None, :]
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    anchor, positive, negative = (positives[:, :, None] & ~same[:, None, :]).nonzero(as_tuple=True)
    return anchor, positive, negative


def triplet_loss(embeddings: Tensor, triplets: Triplets, margin: float) -> Tensor:
    """With three (T, D) tensors of gathered rows."""
    anchor, positive, negative = triplets
    return F.triplet_margin_loss(embeddings[anchor], embeddings[positive], embeddings[negative], margin=margin, p=2)


class UnitLength(nn.Module):
    """l2 normalization as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, p=2, dim=1)


class Images(Dataset[tuple[Tensor, int]]):
    """Decode, resize, crop, flip and normalize each image each time."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        resize: int,
        image_size: int,
        train: bool,
        as_bytes: bool = False,
    ) -> None:
        self.paths, self.labels = paths, labels
        crop = [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()]
        to_floats = [
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
        self.transform = transforms.Compose(
            [
                transforms.Lambda(_rgb),
                transforms.Resize((resize, resize)),
                *(crop if train else [transforms.CenterCrop(image_size)]),
                *([transforms.PILToTensor()] if as_bytes else to_floats),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image), self.labels[index]


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class ClassBatches(Sampler[list[int]]):
    """Random classes without replacement, a few random images of each, from the global random generator."""

    def __init__(self, labels: Sequence[int], batch: int, images_per_class: int, batches: int) -> None:
        self.batch, self.images_per_class, self.batches = batch, images_per_class, batches
        self.images_of: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self.images_of.setdefault(label, []).append(index)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.batches):
            classes = list(self.images_of)
            random.shuffle(classes)
            batch: list[int] = []
            while len(batch) < self.batch:
                images = self.images_of[classes.pop()]
                batch.extend(random.sample(images, min(self.images_per_class, len(images))))
            yield batch[: self.batch]


def rkd_step(student: nn.Module, teacher: nn.Module) -> Step:
    """RKD-DA with the paper's ratios, 1 and 2."""
    teacher.eval()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(images)
        learned = student(images)
        return distance_loss(learned, taught) + 2 * angle_loss(learned, taught)

    return step


def triplet_step(network: nn.Module, miner: Callable[[Tensor, Tensor], Triplets], margin: float) -> Step:
    """The triplet loss of mined triplets."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        embeddings = network(images)
        return triplet_loss(embeddings, miner(embeddings, labels), margin)

    return step


def train_epoch(
    network: nn.Module,
    step: Step,
    loader: DataLoader[Tensor],
    optimizer: torch.optim.Optimizer,
    freeze_bn: bool = False,
) -> float:
    """One epoch; returns the mean loss. The loss is read after every step, as for a progress bar."""
    device = next(network.parameters()).device
    network.train()
    if freeze_bn:
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    total = 0.0
    for images, labels in loader:
        loss = step(images.to(device), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def evaluate(network: nn.Module, loader: DataLoader[Tensor], ks: Sequence[int]) -> dict[int, float]:
    """Recall@K of a split."""
    device = next(network.parameters()).device
    network.eval()
    embeddings, labels = [], []
    with torch.no_grad():
        for images, batch_labels in loader:
            embeddings.append(network(images.to(device)))
            labels.append(batch_labels.to(device))
    return recall(torch.cat(embeddings), torch.cat(labels), ks)
