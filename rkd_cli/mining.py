"""Miners: pick the triplets of a batch that a loss uses.

Call each as ``miner(embeddings, labels)`` with (N, D) floating embeddings and (N,) integer labels. It returns three
(T,) index tensors on the device of the embeddings: anchor, positive, negative. T depends on the labels: with labels on
the CPU, a GPU is not synchronized. Every ordered pair of two rows of one class is an (anchor, positive);
miners differ in the negatives. An anchor without a negative gives no triplet. Embeddings and labels whose shapes do
not match raise a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_cli.geometry import check_rows, exact_products, in_range, normalized, pairwise_distances

Triplets = tuple[Tensor, Tensor, Tensor]


def _pairs_on_cpu(embeddings: Tensor, labels: Tensor) -> Triplets:
    """(P,) anchors and (P,) positives of all pairs whose anchor has a negative, and the (N, N) mask of negatives."""
    check_rows(embeddings, labels=labels)
    labels = labels.cpu()  # a sync if they are on CUDA
    same = labels[:, None] == labels[None, :]
    negatives = ~same
    positives = same & ~torch.eye(len(labels), dtype=torch.bool)
    anchor, positive = (positives & negatives.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
    return anchor, positive, negatives


def _to_device_of(embeddings: Tensor, tensors: tuple[Tensor, ...]) -> Triplets:
    """Copies on the device of the embeddings, without a sync."""
    if embeddings.is_cuda:  # from pinned memory a copy does not wait
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    first, second, third = (tensor.to(embeddings.device, non_blocking=True) for tensor in tensors)
    return first, second, third


def _pairs_and_negatives(embeddings: Tensor, labels: Tensor) -> Triplets:
    return _to_device_of(embeddings, _pairs_on_cpu(embeddings, labels))


class AllPairs:
    """Every negative for every pair."""

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        anchor, positive, negatives = _pairs_on_cpu(embeddings, labels)
        pair, negative = negatives[anchor].nonzero(as_tuple=True)
        return _to_device_of(embeddings, (anchor[pair], positive[pair], negative))


class RandomNegative:
    """One negative for each pair, drawn uniformly."""

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        anchor, positive, negatives = _pairs_and_negatives(embeddings, labels)
        return anchor, positive, _draw(negatives[anchor].float())


class HardNegative:
    """The nearest negative of the anchor."""

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        anchor, positive, negatives = _pairs_and_negatives(embeddings, labels)
        distances = pairwise_distances(in_range(embeddings)).masked_fill(~negatives, torch.inf)
        return anchor, positive, distances.argmin(dim=1)[anchor]


class SemiHardNegative:
    """The nearest negative that is farther away than the positive; without one, the farthest negative.

    Schroff et al., CVPR 2015, section 3.2.
    """

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        anchor, positive, negatives = _pairs_and_negatives(embeddings, labels)
        distances = pairwise_distances(in_range(embeddings))
        to_negative = distances[anchor]  # (P, N)
        farther = negatives[anchor] & (to_negative > distances[anchor, positive][:, None])
        nearest = to_negative.masked_fill(~farther, torch.inf).argmin(dim=1)
        farthest = to_negative.masked_fill(~negatives[anchor], -torch.inf).argmax(dim=1)
        return anchor, positive, torch.where(farther.any(dim=1), nearest, farthest)


class DistanceWeighted:
    """One negative for each pair, drawn so that distances on the unit sphere are about uniform.

    Wu et al., ICCV 2017, equation 3: the weight of a negative at distance d is 1/q(d), where

        log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4),   d at least 0.5,

    and negatives at 1.4 or more, which a margin of 0.2 rarely reaches, are not drawn. An anchor without a nearer
    negative draws uniformly from all of its negatives. Embeddings are scaled to unit length first.

    Args:
        published: use the float32 arithmetic of the published RKD experiments. It divides each row by its largest
            weight *before* it masks entries of the same class, so at D = 512 all weights of negatives can underflow
            to 0 and the draw becomes uniform; two opposite embeddings give NaN, which raises. The default computes
            weights in log space over the valid negatives only.
    """

    nearest = 0.5
    farthest = 1.4

    def __init__(self, published: bool = False) -> None:
        self.published = published

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        """Return the triplets of one batch.

        Args:
            embeddings: (N, D), any floating dtype.
            labels: (N,) integers.
        Returns:
            (T,) anchors, positives and negatives.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
            FloatingPointError: the published arithmetic gave a NaN weight.
        """
        anchor, positive, negatives = _pairs_and_negatives(embeddings, labels)
        weights_of = self._published_weights if self.published else self._weights
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        weights = weights_of(normalized(wide), negatives)[anchor]
        if self.published and not bool(torch.isfinite(weights).all()):  # a sync on CUDA
            finite = bool(embeddings.isfinite().all())
            why = (
                "two embeddings are opposite. Use --sample distance"
                if finite
                else "embeddings are not finite. Lower --lr"
            )
            raise FloatingPointError(f"--sample distance-published: weights are NaN because {why}.")
        return anchor, positive, _draw(weights)

    def _weights(self, embeddings: Tensor, negatives: Tensor) -> Tensor:
        distances = pairwise_distances(embeddings).clamp(min=self.nearest)
        valid = negatives & (distances < self.farthest)
        log_weights = self._log_weights(distances, embeddings.shape[1])
        # softmax subtracts the maximum over the valid entries, so the largest weight never underflows
        weights = log_weights.masked_fill(~valid, -torch.inf).softmax(dim=1)
        return torch.where(valid.any(dim=1, keepdim=True), weights, negatives.double())

    def _published_weights(self, embeddings: Tensor, negatives: Tensor) -> Tensor:
        x = embeddings.float()
        squared_norms = x.square().sum(dim=1)
        with exact_products(x.device):
            squared = (squared_norms[:, None] + squared_norms[None, :] - 2 * (x @ x.T)).clamp(min=1e-12)
        distances = squared.fill_diagonal_(1.0).sqrt().clamp(min=self.nearest)
        log_weights = self._log_weights(distances, embeddings.shape[1])
        weights = (log_weights - log_weights.amax(dim=1, keepdim=True)).exp()
        weights = weights * (negatives & (distances < self.farthest))
        return weights + (weights.sum(dim=1, keepdim=True) == 0) * negatives

    @staticmethod
    def _log_weights(distances: Tensor, dim: int) -> Tensor:
        return (2.0 - dim) * distances.log() - (dim - 3.0) / 2.0 * (1.0 - 0.25 * distances.square()).log()


def _draw(weights: Tensor) -> Tensor:
    """(P,) one column of each row of (P, N) weights, drawn in proportion to them."""
    # as torch.multinomial draws, which synchronizes CUDA to check the weights
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1)
