"""Smooth-AP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows

_ELEMENTS = 1 << 20  # entries of a block of sigmoids: 8 MB, a few of which exist at once


class SmoothAP(nn.Module):
    """One minus the average precision of each row's ranking of the batch, with sigmoids instead of steps.

    Brown et al., ECCV 2020; arXiv 2007.12163. With s_j the cosine of the query to row j, G(x) = sigmoid(x /
    temperature), P the rows of the query's class and R_i(S) = 1 + sum_{j in S, j != i} G(s_j - s_i) the rank of i in S,
    the loss is the mean over the queries of

        1 - 1/|P| sum_{i in P} R_i(P) / R_i(all rows).

    As in the authors' code, the query is part of the ranking and of P, first at cosine 1. A query alone in its class
    always has average precision 1 and is left out. Classes may have any size (equal sizes in their code). The paper
    sets the temperature to 0.01. The cost is N |P| N sigmoids, in blocks; memory is O(N^2).

    Args:
        temperature: width of the sigmoid, in units of the cosine.
    """

    def __init__(self, temperature: float = 0.01) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype and any norm.
            labels: (N,) integers; on the CPU, a GPU is not synchronized.
        Returns:
            () loss in the embeddings' dtype; 0 with zero gradient if no two rows have one class.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(embeddings, labels=labels)
        unit = unit_rows(embeddings)
        loss: Tensor = _SmoothAPLoss.apply(unit @ unit.T, labels, self.temperature)
        return loss.to(embeddings.dtype)


class _SmoothAPLoss(torch.autograd.Function):
    """The loss of (N, N) cosines; the gradient comes from the same loop over the classes."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, labels: Tensor, temperature: float) -> Tensor:
        total, queries = 0 * cosines.sum(), 0  # a NaN anywhere makes the loss NaN
        grad = torch.zeros_like(cosines)
        labels = labels.cpu()  # a sync if they are on CUDA
        for label in torch.unique(labels):
            members = (labels == label).nonzero().squeeze(1).to(cosines.device, non_blocking=True)
            count = len(members)
            if count == 1:
                continue
            for block in members.split(max(1, _ELEMENTS // (count * len(labels)))):
                s = cosines[block] / temperature  # (Q, N)
                steps = (s[:, None, :] - s[:, members, None]).sigmoid_()  # (Q, P, N)
                # each sum includes G(0) = 1/2 for the row itself
                among_all = 0.5 + steps.sum(dim=2)
                among_positives = 0.5 + steps[:, :, members].sum(dim=2)
                precision = among_positives / among_all  # (Q, P), at each positive
                total += (1 - precision.mean(dim=1)).sum()

                # d precision / d step: -precision / among_all, plus 1 / among_all for a positive
                slope = steps.mul_(1 - steps).mul_(1 / (count * among_all * temperature)[:, :, None])
                pull = slope * precision[:, :, None]
                pull[:, :, members] -= slope[:, :, members]
                grad[block] += pull.sum(dim=1)
                grad[block[:, None], members] -= pull.sum(dim=2)
            queries += count
        ctx.save_for_backward(grad / max(1, queries))
        return total / max(1, queries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None
