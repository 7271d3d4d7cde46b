"""The balanced batches against their definition."""

from __future__ import annotations

from collections import Counter

import pytest

from rkd_cli.data import BalancedBatchSampler
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
    with pytest.raises(DataError, match=r"needs 13 classes.*has 13, which give 62 images: use --batch 62"):
        BalancedBatchSampler(LABELS, batch=63, images_per_class=5, batches=1, seed=0)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="have no labels"):
        BalancedBatchSampler(None, batch=2, images_per_class=1, batches=1, seed=0)
