"""Losses without arguments are those of their papers or the code beside them, and so are the flags."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from rkd_cli.losses import (
    PKT,
    ArcFace,
    AttentionTransfer,
    ContextualSimilarity,
    ContrastiveLoss,
    D3still,
    EmbeddingMatching,
    HardDarkRank,
    Matryoshka,
    MultiSimilarity,
    NormalizedSoftmax,
    ProxyAnchor,
    QueueKL,
    RelaxedContrastive,
    RKDAngle,
    RKDDistance,
    SmoothAP,
    TripletLoss,
)
from rkd_cli.mining import DistanceWeighted
from rkd_cli.settings import DistillSettings, TeacherSettings

# as the papers, or the code beside them, have them; the docstrings name which
PUBLISHED: dict[type[nn.Module], dict[str, Any]] = {
    ArcFace: {"scale": 64, "margin": 0.5},
    ContextualSimilarity: {
        "student_temperature": 1, "teacher_temperature": 0.01, "neighbors": 255, "queue_size": 2048, "size": None,
    },
    ContrastiveLoss: {"margin": 0.2, "miner": None},
    D3still: {
        "neighbors": 9, "feature": 100, "inconsistent": 5, "consistent": 1, "queue_size": 0, "size": None,
    },
    EmbeddingMatching: {"kind": "cosine", "student_size": None, "teacher_size": None},
    HardDarkRank: {"alpha": 3, "beta": 3, "permute_len": 4},
    Matryoshka: {"truncate_teacher": False, "renormalize": False},
    MultiSimilarity: {"alpha": 2, "beta": 50, "base": 0.5, "epsilon": 0.1},
    NormalizedSoftmax: {"temperature": 0.05},
    ProxyAnchor: {"alpha": 32, "margin": 0.1},
    QueueKL: {"temperature": 0.07, "queue_size": 2048, "size": None},
    RelaxedContrastive: {"sigma": 1, "delta": 1},
    SmoothAP: {"temperature": 0.01},
    TripletLoss: {"p": 2, "margin": 0.2, "miner": None},
}  # fmt: skip
FLAGS: dict[str, tuple[type[nn.Module], str]] = {
    "margin": (TripletLoss, "margin"),
    "ms_alpha": (MultiSimilarity, "alpha"),
    "ms_beta": (MultiSimilarity, "beta"),
    "ms_base": (MultiSimilarity, "base"),
    "ms_epsilon": (MultiSimilarity, "epsilon"),
    "proxy_alpha": (ProxyAnchor, "alpha"),
    "proxy_margin": (ProxyAnchor, "margin"),
    "softmax_temperature": (NormalizedSoftmax, "temperature"),
    "arcface_scale": (ArcFace, "scale"),
    "arcface_margin": (ArcFace, "margin"),
    "ap_temperature": (SmoothAP, "temperature"),
    "triplet_margin": (TripletLoss, "margin"),
    "dark_alpha": (HardDarkRank, "alpha"),
    "dark_beta": (HardDarkRank, "beta"),
    "match_kind": (EmbeddingMatching, "kind"),
    "csd_temperature": (ContextualSimilarity, "student_temperature"),
    "csd_teacher_temperature": (ContextualSimilarity, "teacher_temperature"),
    "csd_neighbors": (ContextualSimilarity, "neighbors"),
    "queue_temperature": (QueueKL, "temperature"),
    "d3_neighbors": (D3still, "neighbors"),
    "d3_feature": (D3still, "feature"),
    "d3_inconsistent": (D3still, "inconsistent"),
    "d3_consistent": (D3still, "consistent"),
}


def defaults_of(loss: type[nn.Module]) -> dict[str, Any]:
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("loss", PUBLISHED)
def test_defaults_are_the_published_ones(loss: type[nn.Module]) -> None:
    assert defaults_of(loss) == PUBLISHED[loss]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_has_the_default_of_its_loss(flag: str) -> None:
    fields = {**TeacherSettings.model_fields, **DistillSettings.model_fields}
    loss, argument = FLAGS[flag]
    assert fields[flag].default == defaults_of(loss)[argument]


def test_every_flag_of_a_loss_is_compared() -> None:
    """But for what is no argument of a loss: its weight, how it is mined, and the queue that three losses share."""
    prefixes = ("ms_", "proxy_", "softmax_", "arcface_", "ap_", "dark_", "match_", "csd_", "queue_", "d3_", "triplet_")
    fields = TeacherSettings.model_fields | DistillSettings.model_fields
    flags = {name for name in fields if name.startswith(prefixes) and not name.endswith(("_ratio", "_sample"))}
    assert flags | {"margin"} == {*FLAGS, "queue_size"}
    assert DistillSettings.model_fields["queue_size"].default is None


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (MultiSimilarity, "MultiSimilarityLoss", {"alpha": "alpha", "beta": "beta", "base": "base"}),
        (ProxyAnchor, "ProxyAnchorLoss", {"alpha": "alpha", "margin": "margin"}),
        (NormalizedSoftmax, "NormalizedSoftmaxLoss", {"temperature": "temperature"}),
        (SmoothAP, "SmoothAPLoss", {"temperature": "temperature"}),
        (ArcFace, "ArcFaceLoss", {"scale": "scale"}),
    ],
)
def test_defaults_are_those_of_pytorch_metric_learning(
    ours: type[nn.Module], theirs: str, names: dict[str, str]
) -> None:
    other = defaults_of(getattr(pytest.importorskip("pytorch_metric_learning.losses"), theirs))
    assert {name: defaults_of(ours)[name] for name in names} == {name: other[them] for name, them in names.items()}


def test_arcface_has_the_margin_of_pytorch_metric_learning_in_radians() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    assert defaults_of(ArcFace)["margin"] == pytest.approx(
        math.radians(defaults_of(losses.ArcFaceLoss)["margin"]), abs=1e-3
    )


@pytest.mark.parametrize(
    "loss",
    [
        RKDDistance,
        RKDAngle,
        HardDarkRank,
        PKT,
        RelaxedContrastive,
        EmbeddingMatching,
        ContextualSimilarity,
        QueueKL,
        D3still,
    ],
)
def test_distillation_needs_no_argument(loss: type[nn.Module]) -> None:
    made = loss()
    for _ in range(2):  # the second batch meets what the first one left in a queue
        student, teacher = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
        value = made(student, teacher)
        value.backward()
        assert value > 0
        assert student.grad is not None
        assert bool(student.grad.isfinite().all())


def test_attention_transfer_needs_no_argument() -> None:
    assert AttentionTransfer()(torch.randn(3, 4, 2, 2), torch.randn(3, 8, 2, 2)) > 0


@pytest.mark.parametrize("loss", [TripletLoss, ContrastiveLoss, MultiSimilarity, SmoothAP])
def test_labelled_losses_need_no_argument(loss: type[nn.Module]) -> None:
    assert loss()(torch.nn.functional.normalize(torch.randn(9, 6)), torch.arange(9) // 3) > 0


@pytest.mark.parametrize("loss", [ProxyAnchor, NormalizedSoftmax, ArcFace])
def test_losses_with_proxies_need_classes_and_size_alone(loss: type[nn.Module]) -> None:
    assert loss(3, 6)(torch.randn(9, 6), torch.arange(9) // 3) > 0


def test_triplets_and_pairs_are_distance_weighted_by_default() -> None:
    assert isinstance(TripletLoss().miner, DistanceWeighted)
    assert isinstance(ContrastiveLoss().miner, DistanceWeighted)


@pytest.mark.parametrize("loss", [ContextualSimilarity, QueueKL, D3still])
def test_a_queue_without_a_size_takes_that_of_the_first_batch(loss: Any) -> None:
    sized, lazy = loss(queue_size=20, size=6), loss(queue_size=20)
    for _ in range(3):
        batch = torch.randn(9, 6), torch.randn(9, 6)
        assert torch.equal(sized(*batch), lazy(*batch))
    assert torch.equal(sized.queue.rows, lazy.queue.rows)
    with pytest.raises(ValueError, match=r"the queue has 6 dimensions, the embeddings have 5"):
        lazy(torch.randn(9, 5), torch.randn(9, 5))
    loaded = loss(queue_size=20)
    loaded.load_state_dict(lazy.state_dict())
    batch = torch.randn(9, 6), torch.randn(9, 6)
    assert torch.equal(loaded(*batch), lazy(*batch))


@pytest.mark.parametrize("loss", [ContextualSimilarity, D3still])
def test_a_queue_of_another_size_is_refused_in_evaluation_too(loss: type[nn.Module]) -> None:
    made = loss(queue_size=20, size=6).eval()
    with pytest.raises(ValueError, match=r"the queue has 6 dimensions, the embeddings have 5"):
        made(torch.randn(9, 5), torch.randn(9, 5))


def test_matching_needs_both_sizes_or_none() -> None:
    assert EmbeddingMatching().projection is None
    with pytest.raises(ValueError, match="both student_size and teacher_size"):
        EmbeddingMatching(student_size=4)


def test_the_recipes_of_d3still_train_as_they_were_tuned() -> None:
    """With 0.1 of the weights 200, 10 and 2, which were the defaults: to the last bit 0.2 of 100, 5 and 1."""
    student, teacher = torch.randn(40, 16), torch.randn(40, 16)
    found = []
    for ratio, weights in ((0.1, (200.0, 10.0, 2.0)), (0.2, (100.0, 5.0, 1.0))):
        x = student.clone().requires_grad_()
        loss = D3still(9, *weights, 2048, 16)
        loss(student, teacher)
        value = ratio * loss(x, teacher)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
