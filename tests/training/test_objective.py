"""The terms that the ratio flags mix, the stages of FitNet, and the validation split."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli import mining
from rkd_cli.errors import SettingsError
from rkd_cli.events import silent
from rkd_cli.losses import (
    PKT,
    ArcFace,
    AttentionTransfer,
    ContextualSimilarity,
    ContrastiveLoss,
    D3still,
    EmbeddingMatching,
    HardDarkRank,
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
from rkd_cli.losses.pairs import Miner
from rkd_cli.models import load_model
from rkd_cli.models.embedding_net import expose_stages
from rkd_cli.settings import DistillSettings, Sample, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.objective import MINERS, View, distill_objective, objectives, teacher_loss
from rkd_cli.training.open import build_run

NONE = {"dist_ratio": "0", "angle_ratio": "0"}
Flags = dict[str, str | bool]


@pytest.fixture(scope="module")
def flags(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """Of a distillation whose teacher is trained."""
    root = tmp_path_factory.mktemp("terms")
    common: Flags = {
        "data": str(tiny_set), "weights": "none", "base": "timm:test_resnet", "embedding_size": "8", "resize": "36",
        "image_size": "32", "batch": "8", "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1",
        "workers": "0", "device": "cpu", "overwrite": True,
    }  # fmt: skip
    save: Flags = {"save_dir": str(root / "teacher"), "embedding_size": "16"}
    train(build_run(resolve(TeacherSettings, common | save), silent), silent)
    return common | {"teacher_load": str(root / "teacher/last.safetensors"), "save_dir": str(root / "student")}


def distill_run(flags: Flags, **more: str | bool) -> Run:
    return build_run(resolve(DistillSettings, flags | more), silent)


def test_each_ratio_adds_its_term(flags: Flags) -> None:
    ratios = {"dark_ratio": "2", "at_ratio": "50", "relaxed_ratio": "3", "pkt_ratio": "4", "dark_alpha": "2"}
    run = distill_run(flags, **NONE, **ratios)
    batch = next(run.loader.epoch(1))
    run.model.eval()
    terms = run.step(batch, 1)
    teacher = load_model(str(flags["teacher_load"]))
    assert expose_stages(teacher)
    with torch.no_grad():
        student, maps = run.model(batch.images, with_features=True)
        taught, taught_maps = teacher(batch.images, with_features=True)
        attention = sum(AttentionTransfer()(maps[block], taught_maps[block]) for block in (1, 2, 3))
        expected = {
            "dark": 2 * HardDarkRank(2, 3, 4)(student, taught),
            "relaxed": 3 * RelaxedContrastive()(student, taught),
            "pkt": 4 * PKT()(student, taught),
            "attention": 50 * attention,
        }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: float(term) for name, term in expected.items()},
        rel=1e-4,  # folded batch norms round otherwise
    )


class Made(NamedTuple):
    """What student and teacher make of a batch of eight, and its labels: drawn."""

    student: View
    teacher: View
    labels: Tensor


@pytest.fixture
def made() -> Made:
    def view(width: int, channels: list[int]) -> View:
        sides = [9, 5, 3, 2]
        stages = [torch.rand(8, count, side, side) for count, side in zip(channels, sides, strict=True)]
        return View(torch.randn(8, width), stages)

    return Made(view(5, [4, 6, 8, 10]), view(7, [3, 5, 7, 9]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))


def distances(points: Tensor) -> Tensor:
    """(N, N), pair by pair."""
    return torch.stack([torch.stack([(one - other).norm() for other in points]) for one in points])


def dark_rank(made: Made, alpha: float, beta: float) -> float:
    """Minus the logarithm of the probability of the teacher's four nearest, in their order, under the student."""
    theirs, ours = distances(made.teacher.embeddings), distances(made.student.embeddings)
    total = 0.0
    for row in range(8):
        others = sorted((other for other in range(8) if other != row), key=lambda other: float(theirs[row, other]))
        scores = [-alpha * float(ours[row, other]) ** beta for other in others[:4]]
        for place, score in enumerate(scores):
            total -= score - math.log(sum(math.exp(rest) for rest in scores[place:]))
    return total / 8


def triplet(made: Made, margin: float) -> float:
    """Of every triplet there is, by eps-shifted distances as torch has them."""
    x, labels = made.student.embeddings, made.labels.tolist()
    costs = [
        max(0.0, float(F.pairwise_distance(x[a], x[p]) - F.pairwise_distance(x[a], x[n])) + margin)
        for a, p, n in itertools.product(range(8), repeat=3)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    return sum(costs) / len(costs)


def attention(made: Made) -> float:
    """The stages 2 to 4 of four: where in the image the squared activations are."""
    total = 0.0
    for ours, theirs in list(zip(made.student.stages, made.teacher.stages, strict=True))[1:]:
        unit = [F.normalize(maps.square().mean(1).flatten(1), dim=1) for maps in (ours, theirs)]
        total += float((unit[0] - unit[1]).square().mean())
    return total


def of_embeddings(loss: torch.nn.Module) -> Callable[[Made], float]:
    """Losses that have tests of their own."""
    return lambda made: float(loss(made.student.embeddings, made.teacher.embeddings))


ALL_PAIRS = {"triplet_sample": "all"}
TERMS: dict[str, tuple[str, dict[str, str], Callable[[Made], float]]] = {
    "dist": ("dist_ratio", {}, of_embeddings(RKDDistance())),
    "angle": ("angle_ratio", {}, of_embeddings(RKDAngle())),
    "relaxed": ("relaxed_ratio", {}, of_embeddings(RelaxedContrastive())),
    "pkt": ("pkt_ratio", {}, of_embeddings(PKT())),
    "dark": ("dark_ratio", {"dark_alpha": "0.7", "dark_beta": "1.5"}, lambda made: dark_rank(made, 0.7, 1.5)),
    "triplet": ("triplet_ratio", ALL_PAIRS | {"triplet_margin": "0.9"}, lambda made: triplet(made, 0.9)),
    "attention": ("at_ratio", {}, attention),
}
STUDENT = {"teacher_load": "t.safetensors"}


@pytest.mark.parametrize("name", TERMS)
def test_a_ratio_is_the_weight_of_its_term_alone(made: Made, name: str) -> None:
    flag, more, by_hand = TERMS[name]
    expected = by_hand(made)
    assert expected > 0
    for ratio in ("1", "2.5"):
        objective = distill_objective(resolve(DistillSettings, STUDENT | NONE | more | {flag: ratio}), 64, 64)
        found = objective(*made)
        assert list(found) == [name]
        assert float(found[name]) == pytest.approx(float(ratio) * expected, rel=1e-4)
        assert objective.ratios == {name: float(ratio)}
        assert objective.needs_stages == (name == "attention")


def test_the_defaults_are_the_papers_terms(made: Made) -> None:
    objective = distill_objective(resolve(DistillSettings, STUDENT), 64, 64)
    assert objective.ratios == {"dist": 1.0, "angle": 2.0}
    more = {flag: "3" for flag, _, _ in TERMS.values()}
    assert distill_objective(resolve(DistillSettings, STUDENT | more), 64, 64).ratios == dict.fromkeys(TERMS, 3.0)


def test_the_defaults_of_a_term_are_those_of_its_loss(made: Made) -> None:
    ratios = {"dark_ratio": "1", "triplet_ratio": "1"}
    found = distill_objective(resolve(DistillSettings, STUDENT | NONE | ALL_PAIRS | ratios), 64, 64)(*made)
    assert float(found["dark"]) == pytest.approx(dark_rank(made, 3, 3), rel=1e-4)
    assert float(found["triplet"]) == pytest.approx(triplet(made, 0.2), rel=1e-4)


SPACE: dict[str, tuple[dict[str, str], torch.nn.Module]] = {
    "match": ({"match_kind": "squared"}, EmbeddingMatching("squared", 5, 5)),
    "csd": (
        {"csd_temperature": "0.2", "csd_teacher_temperature": "0.1", "csd_neighbors": "3", "queue_size": "16"},
        ContextualSimilarity(0.2, 0.1, 3, 16, 5),
    ),
    "queue": ({"queue_temperature": "0.3", "queue_size": "12"}, QueueKL(0.3, 12, 5)),
    "d3": (
        {"d3_neighbors": "4", "d3_feature": "3", "d3_inconsistent": "2", "d3_consistent": "0.5", "queue_size": "16"},
        D3still(4, 3.0, 2.0, 0.5, 16, 5),
    ),
}


@pytest.mark.parametrize("name", SPACE)
def test_a_term_in_the_teachers_space_is_its_loss_batch_after_batch(made: Made, name: str) -> None:
    more, loss = SPACE[name]
    settings = resolve(DistillSettings, STUDENT | NONE | more | {f"{name}_ratio": "2.5"})
    objective = distill_objective(settings, 5, 5)
    for seed in range(3):
        torch.manual_seed(seed)
        student, teacher = View(torch.randn(8, 5), []), View(torch.randn(8, 5), [])
        (found,) = objective(student, teacher, made.labels).values()
        assert float(found) == pytest.approx(2.5 * float(loss(student.embeddings, teacher.embeddings)), rel=1e-6)
    stored = objective.losses.state_dict()
    assert bool(stored) == (name != "match"), "queues are in the state"


@pytest.mark.parametrize("name", ["csd", "queue", "d3"])
def test_a_loss_in_the_teachers_space_wants_its_size(name: str) -> None:
    settings = resolve(DistillSettings, STUDENT | NONE | {f"{name}_ratio": "1"})
    with pytest.raises(
        SettingsError, match=f"--{name}-ratio: .* 5 dimensions, teacher embeddings 7. Pass --embedding-size 7"
    ):
        distill_objective(settings, 5, 7)


def test_matching_another_size_learns_a_projection() -> None:
    objective = distill_objective(resolve(DistillSettings, STUDENT | NONE | {"match_ratio": "1"}), 5, 7)
    assert [p.shape for p in objective.losses.parameters() if p.requires_grad] == [(7, 5)]


@pytest.mark.parametrize("unit", [False, True])
def test_matryoshka_is_the_mean_over_prefixes(made: Made, unit: bool) -> None:
    more: dict[str, str | bool] = {"matryoshka": "2,4", "l2normalize": unit, "dist_ratio": "1", "match_ratio": "3"}
    torch.manual_seed(1)
    flags: dict[str, str | bool] = {**STUDENT, **NONE, **more}
    objective = distill_objective(resolve(DistillSettings, flags), 5, 7)
    found = objective(*made)
    x, prefixes = made.student.embeddings, []
    for length in (2, 4, 5):
        prefix = x[:, :length]
        prefixes.append(prefix / prefix.norm(dim=1, keepdim=True) if unit else prefix)
    mean = sum(float(RKDDistance()(prefix, made.teacher.embeddings)) for prefix in prefixes) / 3
    assert float(found["dist"]) == pytest.approx(mean, rel=1e-5)
    projections = list(objective.losses.parameters())
    assert [p.shape for p in projections] == [(7, 2), (7, 4), (7, 5)]
    cosines = [
        F.cosine_similarity(prefix @ w.T, made.teacher.embeddings).mean()
        for prefix, w in zip(prefixes, projections, strict=True)
    ]
    assert found["match"].item() == pytest.approx(3 * sum(1 - float(c.detach()) for c in cosines) / 3, rel=1e-4)


def test_in_the_teachers_space_a_prefix_is_compared_with_as_long_a_teacher(made: Made) -> None:
    more = {"matryoshka": "2", "queue_ratio": "1", "queue_size": "12", "queue_temperature": "0.3"}
    objective = distill_objective(resolve(DistillSettings, STUDENT | NONE | more), 5, 5)
    x, y = made.student.embeddings, torch.randn(8, 5)
    found = objective(View(x, []), View(y, []), made.labels)["queue"]
    expected = [QueueKL(0.3, 12, size)(x[:, :size], y[:, :size]) for size in (2, 5)]
    assert float(found) == pytest.approx(float(sum(expected)) / 2, rel=1e-5)


SAMPLES: dict[str, Miner] = {
    "random": mining.RandomNegative(),
    "hard": mining.HardNegative(),
    "all": mining.AllPairs(),
    "semihard": mining.SemiHardNegative(),
    "distance": mining.DistanceWeighted(),
    "distance-published": mining.DistanceWeighted(published=True),
}


def drawn(loss: Callable[[], Tensor]) -> float:
    torch.manual_seed(4)
    return float(loss())


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_sample_flags_name_the_miners(made: Made, sample: str) -> None:
    x, labels = made.student.embeddings, made.labels
    expected = drawn(lambda: TripletLoss(2, 0.9, SAMPLES[sample])(x, labels))
    more = {"triplet_ratio": "1", "triplet_sample": sample, "triplet_margin": "0.9"}
    objective = distill_objective(resolve(DistillSettings, STUDENT | NONE | more), 64, 64)
    assert drawn(lambda: objective(*made)["triplet"]) == expected
    loss = teacher_loss(resolve(TeacherSettings, {"sample": sample, "margin": "0.9"}), 3)
    assert drawn(lambda: loss(x, labels)) == expected


def test_every_sample_has_a_miner_of_its_own() -> None:
    assert set(MINERS) == set(get_args(Sample)) == set(SAMPLES)
    assert [type(MINERS[name]) for name in SAMPLES] == [type(miner) for miner in SAMPLES.values()]


@pytest.mark.parametrize("margin", ["0.2", "0.9"])
def test_the_losses_of_a_teacher(made: Made, margin: str) -> None:
    x, labels = made.student.embeddings, made.labels
    expected = {
        "l2_triplet": TripletLoss(2, float(margin), mining.AllPairs())(x, labels),
        "l1_triplet": TripletLoss(1, float(margin), mining.AllPairs())(x, labels),
        "contrastive": ContrastiveLoss(float(margin), mining.AllPairs())(x, labels),
    }
    for name, value in expected.items():
        loss = teacher_loss(resolve(TeacherSettings, {"loss": name, "sample": "all", "margin": margin}), 3)
        assert torch.equal(loss(x, labels), value)
    assert len({float(value) for value in expected.values()}) == 3


def test_the_other_losses_of_a_teacher(made: Made) -> None:
    x, labels = made.student.embeddings, made.labels
    made_by: dict[str, tuple[dict[str, str], Callable[[], torch.nn.Module]]] = {
        "multi_similarity": (
            {"ms_alpha": "3", "ms_beta": "40", "ms_base": "0.5", "ms_epsilon": "0.2"},
            lambda: MultiSimilarity(3, 40, 0.5, 0.2),
        ),
        "proxy_anchor": ({"proxy_alpha": "16", "proxy_margin": "0.2"}, lambda: ProxyAnchor(4, 5, 16, 0.2)),
        "softmax": ({"softmax_temperature": "0.1"}, lambda: NormalizedSoftmax(4, 5, 0.1)),
        "arcface": ({"arcface_scale": "32", "arcface_margin": "0.3"}, lambda: ArcFace(4, 5, 32, 0.3)),
        "smooth_ap": ({"ap_temperature": "0.05"}, lambda: SmoothAP(0.05)),
    }
    for name, (more, build) in made_by.items():
        torch.manual_seed(3)
        expected = build()(x, labels)
        torch.manual_seed(3)
        loss = teacher_loss(resolve(TeacherSettings, {"loss": name, "embedding_size": "5"} | more), 4)
        assert torch.equal(loss(x, labels), expected)
        (default,) = {teacher_loss(resolve(TeacherSettings, {"loss": name}), 4)(x.new_ones(8, 512), labels).item()}
        assert math.isfinite(default)


def fitnet(made: Made, ratio: str = "1") -> Tensor:
    torch.manual_seed(6)
    settings = resolve(DistillSettings, STUDENT | NONE | {"fitnet_ratio": ratio})
    (objective,) = objectives(settings, made.student, made.teacher, torch.device("cpu"))
    assert objective.ratios == {"fitnet": float(ratio)}
    assert objective.needs_stages
    (loss,) = objective(*made).values()
    return loss.detach()


def test_fitnet_is_of_three_stages_and_the_embedding(made: Made) -> None:
    """A matrix for each, drawn one after another, that takes a student's channels to the teacher's."""
    torch.manual_seed(6)
    matrices = []
    for ours, theirs in ((6, 5), (8, 7), (10, 9), (5, 7)):
        weight = torch.nn.Conv2d(ours, theirs, 1, bias=False).weight  # its own draw comes first
        matrices.append(torch.nn.init.uniform_(weight.detach(), -0.005, 0.005)[:, :, 0, 0])
    pairs = [(made.student.stages[n], made.teacher.stages[n]) for n in (1, 2, 3)]
    by_hand = sum(
        float((torch.einsum("ts,nshw->nthw", matrix, ours) - theirs).square().mean())
        for matrix, (ours, theirs) in zip(matrices, pairs, strict=False)
    )
    by_hand += float((made.student.embeddings @ matrices[3].T - made.teacher.embeddings).square().mean())
    assert float(fitnet(made)) == pytest.approx(by_hand, rel=1e-5)
    assert float(fitnet(made, "2.5")) == pytest.approx(2.5 * by_hand, rel=1e-5)


def test_hints_and_the_other_terms_are_apart_or_together(made: Made) -> None:
    def ratios(**more: str) -> list[dict[str, float]]:
        settings = resolve(DistillSettings, STUDENT | more)
        found = objectives(settings, made.student, made.teacher, torch.device("cpu"))
        return [objective.ratios for objective in found]

    others = {"dist": 1.0, "angle": 2.0}
    assert ratios() == [others]
    assert ratios(fitnet_ratio="3") == [{"fitnet": 3.0} | others]
    assert ratios(fitnet_ratio="3", hint_epochs="2") == [{"fitnet": 3.0}, others]


def test_hints_come_first_then_the_triplet_loss(flags: Flags) -> None:
    run = distill_run(flags, **NONE, fitnet_ratio="1", hint_epochs="2", triplet_ratio="1", epochs="3")
    train(run, silent)
    rows = [json.loads(line) for line in (run.directory.path / "metrics.jsonl").read_text().splitlines()]
    assert [set(row["losses"]) for row in rows] == [set(), {"fitnet"}, {"fitnet"}, {"triplet"}]
    mixed = distill_run(flags, fitnet_ratio="1")
    assert set(mixed.step(next(mixed.loader.epoch(1)), 1)) == {"fitnet", "dist", "angle"}


def test_fitnets_convolutions_stay_as_they_were_drawn(flags: Flags) -> None:
    """The published code gives them to no optimizer; the same seed draws the same ones."""
    run, again = (distill_run(flags, **NONE, fitnet_ratio="1") for _ in range(2))
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters()}
    batch = next(run.loader.epoch(1))
    first, second = (r.step(batch, 1)["fitnet"] for r in (run, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("ratio", ["at_ratio", "fitnet_ratio"])
@pytest.mark.parametrize(
    ("student", "says"),
    [
        ({"base": "vit_b_16", "resize": "224", "image_size": "224"}, "the student vit_b_16 does not have four stages"),
        (
            {"base": "squeezenet1_1", "resize": "64", "image_size": "64"},
            "stage 2 are 15 x 15 in the student and 8 x 8 in",
        ),
    ],
)
def test_networks_without_stages_or_of_other_sizes_are_refused(
    flags: Flags, ratio: str, student: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        distill_run(flags, **student, **{ratio: "1"})


@pytest.mark.parametrize("ratio", ["at_ratio", "fitnet_ratio"])
def test_feature_maps_of_networks_other_than_resnets(flags: Flags, ratio: str) -> None:
    run = distill_run(flags, **NONE, base="mobilenet_v3_small", **{ratio: "1"})
    (loss,) = run.step(next(run.loader.epoch(1)), 1).values()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    first = gradients["base.features.0.0.weight"]
    assert first is not None
    assert first.abs().sum() > 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"hint_epochs": "1"}, "needs --fitnet-ratio"),
        (NONE | {"fitnet_ratio": "1", "hint_epochs": "1", "epochs": "2"}, "no loss remains"),
        (NONE, "--dist-ratio, --angle-ratio, .* are 0. Set at least one"),
    ],
)
def test_stages_that_make_no_sense(flags: Flags, more: Flags, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        resolve(DistillSettings, flags | more)


def test_the_best_epoch_can_be_picked_on_the_validation_split(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # per epoch: val, train, eval
    recalls = iter([0.1, 0.9, 0.9, 0.5, 0.8, 0.3, 0.2, 0.7, 0.8])
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(recalls)})
    monkeypatch.setattr("rkd_cli.training.images.hold_out", lambda images, *_: (images, images))
    teacher = {name: value for name, value in flags.items() if name != "teacher_load"}
    more: Flags = {"select_on": "val", "epochs": "2", "save_dir": str(tmp_path / "run")}
    result = train(build_run(resolve(TeacherSettings, teacher | more), silent), silent).result
    assert (result.selected_on, result.best_epoch, result.best["eval"]) == ("val", 1, {"R@1": 0.3})
    saved = json.loads((tmp_path / "run/result.json").read_text())
    assert (saved["selected_on"], saved["best"]["eval"]) == ("val", {"R@1": 0.3})
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["figures"]["val"]["R@1"] for row in rows] == [0.1, 0.5, 0.2]
    assert [row["is_best"] for row in rows] == [True, True, False]
