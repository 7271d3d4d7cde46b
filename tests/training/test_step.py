"""What one step computes: precision inside and outside the networks, objectives in their turn, who gets gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.losses import RKDAngle, RKDDistance, TripletLoss
from rkd_cli.mining import AllPairs
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.embedding_net import expose_stages, freeze
from rkd_cli.runtime.context import Context
from rkd_cli.training.objective import STAGES, Objective, OnEmbeddings, OnStages, Term, View
from rkd_cli.training.step import DistillStep, TeacherStep, update_weights, views
from rkd_cli.training.teachers import LiveTeacher

CPU = torch.device("cpu")
FP32 = Context(CPU, "fp32")


@dataclass(frozen=True)
class Recorded:
    """A term that keeps what it is given."""

    seen: list[tuple[View, View, Tensor]]

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        self.seen.append((student, teacher, labels))
        return student.embeddings.sum()


def network(seed: int, size: int, stages: bool = False) -> EmbeddingNet:
    torch.manual_seed(seed)
    model = build_model("resnet18", size, True)
    assert not stages or expose_stages(model)
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    return Batch(images, torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6), torch.zeros(6, dtype=torch.int64))


def dtypes_inside(model: EmbeddingNet) -> list[torch.dtype]:
    """Filled with the type that the first convolution gives, each time it runs."""
    found: list[torch.dtype] = []
    model.base.get_submodule("conv1").register_forward_hook(lambda layer, given, made: found.append(made.dtype))
    return found


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_teachers_network_is_in_bf16_and_its_loss_in_fp32(batch: Batch, precision: str, inside: torch.dtype) -> None:
    model, found = network(1, 8), list[torch.dtype]()
    ran = dtypes_inside(model)

    class Loss(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            found.append(embeddings.dtype)
            assert not torch.is_autocast_enabled("cpu")
            loss: Tensor = TripletLoss(2, 0.2, AllPairs())(embeddings, labels)
            return loss

    (name, loss), *others = TeacherStep(model, "l2_triplet", Loss(), Context(CPU, precision))(batch, 1).items()
    assert (name, loss.dtype, others) == ("l2_triplet", torch.float32, [])
    assert (ran, found) == ([inside], [torch.float32])
    by_hand = TripletLoss(2, 0.2, AllPairs())(model(batch.images), batch.labels)
    assert torch.equal(loss, by_hand) == (precision == "fp32")
    assert loss.item() == pytest.approx(by_hand.item(), rel=0.1)


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("with_stages", [True, False])
def test_both_networks_are_in_bf16_and_what_they_make_in_fp32(
    batch: Batch, precision: str, inside: torch.dtype, with_stages: bool
) -> None:
    student, teacher = network(1, 8, with_stages), network(2, 16, with_stages)  # not frozen
    ran = dtypes_inside(student), dtypes_inside(teacher)
    context = Context(CPU, precision)
    learned, taught = views(student, LiveTeacher(teacher, context), batch, with_stages, context)
    assert ran == ([inside], [inside])
    for view, width in ((learned, 8), (taught, 16)):
        assert (view.embeddings.dtype, view.embeddings.shape) == (torch.float32, (6, width))
        assert [stage.dtype for stage in view.stages] == [torch.float32] * (4 if with_stages else 0)
        assert [stage.shape[1] for stage in view.stages] == ([64, 128, 256, 512] if with_stages else [])
        rounded = [torch.equal(stage, stage.bfloat16().float()) for stage in view.stages]
        assert rounded == [precision == "bf16"] * len(view.stages)
    assert learned.embeddings.requires_grad
    assert not any(tensor.requires_grad for tensor in (taught.embeddings, *taught.stages))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_distillation_is_its_objective_of_what_both_make(batch: Batch, precision: str) -> None:
    student, teacher, context = network(1, 8), freeze(network(2, 16)), Context(CPU, precision)
    terms: dict[str, tuple[float, Term]] = {
        "dist": (1.5, OnEmbeddings(RKDDistance())),
        "angle": (0.5, OnEmbeddings(RKDAngle())),
    }
    found = DistillStep(student, LiveTeacher(teacher, context), [Objective(terms)], 0, context)(batch, 1)
    with context.autocast(), torch.no_grad():
        learned, taught = student(batch.images).float(), teacher(batch.images).float()
    assert {name: term.dtype for name, term in found.items()} == {"dist": torch.float32, "angle": torch.float32}
    assert found["dist"].item() == pytest.approx(1.5 * RKDDistance()(learned, taught).item(), rel=1e-6)
    assert found["angle"].item() == pytest.approx(0.5 * RKDAngle()(learned, taught).item(), rel=1e-6)


@pytest.mark.parametrize(("hint_epochs", "first"), [(0, []), (1, [1]), (3, [1, 2, 3])])
def test_hints_hold_for_just_so_many_epochs(batch: Batch, hint_epochs: int, first: list[int]) -> None:
    student, teacher = network(1, 8), network(2, 8)
    objectives = [Objective({name: (1.0, Recorded([]))}) for name in ("hints", "after")]
    step = DistillStep(student, LiveTeacher(teacher, FP32), objectives, hint_epochs, FP32)
    names = {epoch: list(step(batch, epoch)) for epoch in range(1, 6)}
    assert [epoch for epoch in names if names[epoch] == ["hints"]] == first
    assert [epoch for epoch in names if names[epoch] == ["after"]] == [n for n in range(1, 6) if n not in first]


def test_one_objective_holds_for_all_epochs(batch: Batch) -> None:
    only = Objective({"only": (1.0, Recorded([]))})
    step = DistillStep(network(1, 8), LiveTeacher(network(2, 8), FP32), [only], 0, FP32)
    assert [list(step(batch, epoch)) for epoch in (1, 2, 99)] == [["only"]] * 3


@pytest.mark.parametrize("with_stages", [True, False])
def test_feature_maps_are_made_only_for_terms_that_compare_them(batch: Batch, with_stages: bool) -> None:
    recorded = Recorded([])
    terms: dict[str, tuple[float, Term]] = {"recorded": (1.0, recorded)}
    if with_stages:
        terms["maps"] = (1.0, OnStages([nn.MSELoss() for _ in STAGES]))
    student, teacher = network(1, 8, stages=True), network(2, 8, stages=True)
    DistillStep(student, LiveTeacher(teacher, FP32), [Objective(terms)], 0, FP32)(batch, 1)
    ((learned, taught, labels),) = recorded.seen
    assert [len(learned.stages), len(taught.stages)] == [4 * with_stages] * 2
    assert torch.equal(labels, batch.labels)
    assert torch.allclose(taught.embeddings, teacher(batch.images), atol=1e-6)


def test_weights_follow_the_sum_of_the_losses() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    sgd = torch.optim.SGD([weight], lr=0.5)
    for _ in range(2):  # the second time: no gradient of the first is left
        before = weight.detach().clone()
        update_weights(sgd, {"one": weight.square().sum(), "three": 3 * weight.sum()})
        assert torch.equal(weight.detach(), before - 0.5 * (2 * before + 3))
