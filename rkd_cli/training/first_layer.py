"""Start the embedding layer from the features of the training images, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_cli.compress import Rows, column_mean, fit_pca, scatter

_ROWS = 1 << 12  # converted to float64 at once


def principal_layer(features: Rows, size: int) -> tuple[Tensor, Tensor]:
    """The (D, F) weight and (D,) bias that map (N, F) features to their first D principal components.

    D is ``size``, or less where there are not so many: N - 1, or F.
    """
    count, width = features.shape
    mean, components = fit_pca(features, min(size, count - 1, width))
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
