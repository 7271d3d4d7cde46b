"""Leading dimensions, principal components, bytes and bits against loops and their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largest import LargestTensor
from rkd_cli import compress
from rkd_cli.compress import apply_pca, fit_pca, leading, to_int8, to_signs, vector_bytes

DTYPES = [torch.float32, torch.float64]


def test_leading_dimensions_are_of_unit_length_again() -> None:
    x = F.normalize(torch.randn(7, 6), dim=1)
    assert torch.equal(leading(x, 4, False), x[:, :4])
    for row, short in zip(x.tolist(), leading(x, 4, True).tolist(), strict=True):
        length = math.hypot(*row[:4])
        assert short == pytest.approx([value / length for value in row[:4]], rel=1e-5)
    assert torch.equal(leading(x, 6, True), x)


@pytest.mark.parametrize(("vectors", "size", "count"), [("float", 64, 256), ("int8", 64, 64), ("binary", 65, 9)])
def test_bytes_of_a_vector(vectors: str, size: int, count: int) -> None:
    assert vector_bytes(vectors, size) == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_within_half_a_step_of_their_dimension(dtype: torch.dtype) -> None:
    x = torch.randn(50, 6, dtype=dtype) * torch.tensor([1e-6, 1e-3, 1, 10, 1e3, 0], dtype=dtype)
    codes, scales = to_int8(x)
    assert codes.dtype == torch.int8
    for dimension in range(5):
        column = x[:, dimension].tolist()
        step = max(map(abs, column)) / 127
        assert codes[:, dimension].tolist() == [round(value / step) for value in column]
        assert codes[:, dimension].abs().max() == 127
        assert (codes * scales)[:, dimension].tolist() == pytest.approx(column, abs=0.501 * step)
    assert not codes[:, 5].any()
    assert bool((scales > 0).all())


def test_signs_count_differing_bits() -> None:
    x, threshold = torch.randn(9, 13) + 2, torch.randn(13) + 2
    signs = to_signs(x, threshold)
    bits = [[value > limit for value, limit in zip(row, threshold, strict=True)] for row in x]
    for i in range(9):
        for j in range(9):
            hamming = sum(a != b for a, b in zip(bits[i], bits[j], strict=True))
            assert (signs[i] - signs[j]).square().sum() == 4 * hamming
    assert torch.equal(to_signs(threshold[None], threshold), -torch.ones(1, 13))  # the threshold itself is below


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 60, 10**9])
def test_principal_components_are_those_of_the_singular_values(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "_BLOCK_ELEMENTS", block)
    x = torch.randn(40, 7, dtype=dtype) @ torch.randn(7, 7, dtype=dtype) + 5
    mean, components = fit_pca(x, 3)
    rows = x.double().numpy()
    _, _, expected = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    assert mean.numpy() == pytest.approx(rows.mean(axis=0))
    for found, direction in zip(components.numpy(), expected, strict=False):
        assert found == pytest.approx(direction * np.sign(direction[np.abs(direction).argmax()]), abs=1e-9)
    reduced = apply_pca(x, mean, components, False)
    assert reduced.dtype == torch.float32
    assert reduced.numpy() == pytest.approx((rows - rows.mean(axis=0)) @ components.numpy().T, abs=1e-4)
    assert apply_pca(x, mean, components, True).norm(dim=1).tolist() == pytest.approx([1.0] * 40)


def test_all_components_keep_all_distances() -> None:
    x = torch.randn(30, 5)
    torch.testing.assert_close(
        torch.cdist(apply_pca(x, *fit_pca(x, 5), False), torch.zeros(1, 5))[:, 0], (x - x.mean(dim=0)).norm(dim=1)
    )
    same = torch.ones(4, 3)
    assert not apply_pca(same, *fit_pca(same, 2), True).any()  # no direction, and no NaN


def test_components_take_no_wide_copy_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "_BLOCK_ELEMENTS", 100 * 8)
    x = torch.randn(5000, 8)
    with LargestTensor() as largest:
        fit_pca(x, 2)
    assert largest.elements <= 100 * 8
