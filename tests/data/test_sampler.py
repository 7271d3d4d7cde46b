"""The balanced batches against their definition, and those of photos without labels."""

from __future__ import annotations

from collections import Counter

import pytest

from rkd_cli.data import BalancedBatchSampler, UniformBatchSampler
from rkd_cli.errors import DataError

LABELS = [label for label in range(12) for _ in range(9)] + [12, 12]  # the last class has two images


def test_batches_are_full_and_balanced() -> None:
    sampler = BalancedBatchSampler(LABELS, batch=32, images_per_class=5, batches=50, seed=0)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 50
    for batch in batches:
        assert len(batch) == len(set(batch)) == 32
        classes = [LABELS[i] for i in batch]
        counts = Counter(classes)
        order = list(dict.fromkeys(classes))
        assert classes == [label for label in order for _ in range(counts[label])]  # class by class
        for label in order[:-1]:
            assert counts[label] == (2 if label == 12 else 5)


def test_every_image_and_class_is_drawn_alike() -> None:
    sampler = BalancedBatchSampler(LABELS, batch=30, images_per_class=5, batches=2000, seed=0)
    drawn = Counter(i for batch in sampler for i in batch)
    expected = [drawn[i] for i in range(12 * 9)]
    mean = sum(expected) / len(expected)
    assert max(abs(count - mean) for count in expected) < 5 * mean**0.5


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = BalancedBatchSampler(LABELS, 20, 5, 3, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2) == list(BalancedBatchSampler(LABELS, 20, 5, 3, 1).batches_of(2))
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)


def test_too_few_classes_for_a_batch() -> None:
    BalancedBatchSampler(LABELS, batch=62, images_per_class=5, batches=1, seed=0)
    with pytest.raises(
        DataError, match=r"needs 13 classes.*the 13 of the training split give 62 images. Use --batch 62"
    ):
        BalancedBatchSampler(LABELS, batch=63, images_per_class=5, batches=1, seed=0)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="these images have none"):
        BalancedBatchSampler(None, batch=2, images_per_class=1, batches=1, seed=0)


@pytest.mark.parametrize(("images", "batch"), [(20, 20), (20, 19), (23, 7), (24, 8), (100, 30), (5, 2)])
def test_each_photo_comes_once_before_any_comes_again(images: int, batch: int) -> None:
    sampler = UniformBatchSampler(images, batch, batches=60, seed=3)
    batches = list(sampler.batches_of(1))
    assert len(batches) == len(sampler) == 60
    assert all(len(found) == len(set(found)) == batch for found in batches)
    drawn = [index for found in batches for index in found]
    for start in range(0, len(drawn) - images + 1, images):
        assert sorted(drawn[start : start + images]) == list(range(images))


def test_every_photo_is_drawn_alike_and_with_any_other() -> None:
    batches = [found for epoch in range(400) for found in UniformBatchSampler(12, 5, 3, 0).batches_of(epoch)]
    drawn = Counter(index for found in batches for index in found)
    assert max(abs(drawn[index] - 500) for index in range(12)) < 5 * 500**0.5
    pairs = Counter((i, j) for found in batches for i in found for j in found if i < j)
    mean = 1200 * 10 / 66
    assert len(pairs) == 66 and max(abs(count - mean) for count in pairs.values()) < 5 * mean**0.5


def test_an_epoch_of_photos_is_a_function_of_seed_and_number() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        return list(UniformBatchSampler(50, 20, 6, seed).batches_of(epoch))

    sampler = UniformBatchSampler(50, 20, 6, 1)
    list(sampler.batches_of(9))
    assert batches(1, 2) == batches(1, 2) == list(sampler.batches_of(2))
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)


def test_too_few_photos_for_a_batch() -> None:
    UniformBatchSampler(128, 128, 1, 0)
    with pytest.raises(DataError, match=r"--batch 128: .* has only 127 images. Use --batch 127 or less"):
        UniformBatchSampler(127, 128, 1, 0)
