"""Many processes compute what one does: losses, gradients, draws, embeddings and recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranks import Found, everything, together
from rkd_cli.data import BalancedBatchSampler, ImageSet
from rkd_cli.data.decode import random_crops
from rkd_cli.data.loader import EvalLoader, StreamReader, TrainLoader
from rkd_cli.runtime.distributed import ALONE, Ranks

ROUNDED = ("of_terms", "of_teachers", "of_sync_norm", "of_training")  # sums in another order
SIZES = (2, 3)  # 16, and 11 and 10 images of 32 each


@pytest.fixture(scope="module")
def alone() -> Found:
    return everything(ALONE)


@pytest.fixture(scope="module", params=SIZES)
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return together(request.param, tmp_path_factory.mktemp("ranks"))


def test_losses_and_gradients_are_those_of_one_process(alone: Found, many: list[Found]) -> None:
    names = [name for name in alone if name.startswith(ROUNDED)]
    assert len(names) == 11 + 6 + 5 + 3 * 6 + 2 + 1
    for name in names:
        for found in many:
            for one, other in zip(alone[name], found[name], strict=True):
                near = 1e-7 if name.startswith("of_training") else 1e-10  # Adam enlarges differences
                assert torch.allclose(other, one, rtol=near, atol=near), name


def test_all_ranks_hold_one_network(many: list[Found]) -> None:
    for found in many[1:]:
        for name, tensors in many[0].items():
            assert all(torch.equal(*pair) for pair in zip(tensors, found[name], strict=True)), name


def test_draws_embeddings_and_recall_are_those_of_one_process_to_the_bit(alone: Found, many: list[Found]) -> None:
    names = [name for name in alone if not name.startswith(ROUNDED)]
    assert len(names) == 1 + 2 + 3 + 1
    for name in names:
        for found in many:
            assert all(torch.equal(*pair) for pair in zip(alone[name], found[name], strict=True)), name


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_of_batches_are_the_batches_of_one_process(tiny_set: Path, size: int) -> None:
    paths = tuple(sorted((tiny_set / "images").rglob("*.jpg")))
    images = ImageSet(paths, tuple(index // 6 for index in range(len(paths))), ("a",) * 8)
    reader = StreamReader(36, 32, 0)

    def epoch(ranks: Ranks) -> list[list[torch.Tensor]]:
        sampler = BalancedBatchSampler(images.labels, 8, 2, 3, 1)
        loader = TrainLoader(images, sampler, 36, 32, reader, random_crops, ranks)
        assert loader.batch == 8
        return [list(batch) for batch in loader.epoch(2, 1)]

    shares = [epoch(Ranks(rank, size)) for rank in range(size)]
    for whole, *parts in zip(epoch(ALONE), *shares, strict=True):
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for tensor, *cut in zip(whole, *parts, strict=True):
            assert torch.equal(tensor, torch.cat(cut))
    loaders = [EvalLoader(images, 5, 36, 32, reader, ranks=Ranks(rank, size)) for rank in range(size)]
    seen = [index for loader in loaders for batch in loader for index in batch.index.tolist()]
    assert sorted(seen) == list(range(len(images)))
    assert {loader.rounds for loader in loaders} == {max(len(list(loader)) for loader in loaders)}


@pytest.mark.parametrize("total", range(40))
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_follow_each_other(total: int, size: int) -> None:
    shares = [list(range(total))[Ranks(rank, size).own_rows(total)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
