"""Start the embedding layer and the class proxies from the features of the training images, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rkd_cli.compress import Rows, blocks_of, column_mean, fit_half_whitened, scatter
from rkd_cli.geometry import normalized

_ROWS = 1 << 12  # converted to float64 at once


def principal_layer(features: Rows, size: int) -> tuple[Tensor, Tensor]:
    """The (D, F) weight and (D,) bias that map (N, F) features to their first D principal components, half whitened.

    D is ``size``, or less where there are not so many: N - 1, or F.
    """
    count, width = features.shape
    mean, components = fit_half_whitened(features, min(size, count - 1, width))
    return components, -components @ mean


def least_squares_layer(features: Rows, targets: Rows) -> tuple[Tensor, Tensor]:
    """The (D, F) weight and (D,) bias that map (N, F) features nearest to (N, D) targets (ridge regression).

    The penalty on the weights is the mean square of a centered feature, summed over the images::

        W = T'X (X'X + tr(X'X) / F I)^-1, X and T centered
    """
    mean, products = scatter(features)
    aim = column_mean(targets)
    mixed = mean.new_zeros(len(aim), len(mean))
    for start in range(0, features.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        mixed.addmm_((targets[rows].double() - aim).T, features[rows].double() - mean)
    penalty = products.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(products + penalty * torch.eye(len(mean)).double(), mixed, left=False)
    return weight, aim - weight @ mean


def class_directions(features: Rows, weight: Tensor, bias: Tensor, labels: Sequence[int], classes: int) -> Tensor:
    """(C, D) means of the (N, F) images' embeddings at unit length by class, at unit length."""
    weight, bias = weight.double(), bias.double()
    embeddings = torch.cat([normalized(rows.double() @ weight.T + bias) for rows in blocks_of(features)])
    sums = embeddings.new_zeros(classes, len(bias)).index_add_(0, torch.tensor(labels), embeddings)
    return normalized(sums)
