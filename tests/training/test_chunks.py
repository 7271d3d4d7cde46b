"""A batch that passes in chunks: what is learned is that of the whole, and no more than a chunk is in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.errors import SettingsError
from rkd_cli.losses import RKDAngle, RKDDistance
from rkd_cli.models import build_model
from rkd_cli.runtime.context import Context
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.chunks import in_chunks
from rkd_cli.training.objective import Objective, OnEmbeddings, View, objectives, teacher_loss
from rkd_cli.training.step import DistillStep, TeacherStep, update_weights
from rkd_cli.training.teachers import LiveTeacher

CPU = torch.device("cpu")
TERMS = ("dist", "angle", "relaxed", "pkt", "dark", "match", "csd", "queue", "d3", "triplet", "at", "fitnet")
LOSSES = ("l2_triplet", "contrastive", "multi_similarity", "proxy_anchor", "softmax", "arcface", "smooth_ap")
LABELS = torch.arange(13) // 3


class Staged(nn.Module):
    """Four stages and an embedding, in float64, without batch norm; ``between`` follows the first convolution."""

    def __init__(self, seed: int, width: int, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolutions = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1) for n in (3, width, width, width))
        self.between, self.linear = between or nn.Identity(), nn.Linear(width, 6)
        self.double()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = [self.between(torch.tanh(self.convolutions[0](images)))]
        for convolution in self.convolutions[1:]:
            maps.append(torch.tanh(convolution(maps[-1])))
        return self.linear(maps[-1].mean(dim=(2, 3))), maps

    def run(self, images: Tensor) -> list[Tensor]:
        embeddings, maps = self(images)
        return [embeddings, *maps]


def view(network: Staged, images: Tensor, chunk: int) -> View:
    embeddings, *stages = in_chunks(network, network.run, images, chunk)
    return View(embeddings, stages)


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


WAYS: list[Callable[[Staged, Tensor], Tensor]] = [
    lambda model, images: in_chunks(model, model.run, images, 4)[0],
    lambda model, images: torch.cat([model.run(part)[0] for part in images.tensor_split(4)]),  # stores all activations
]


@pytest.mark.parametrize("chunk", [4, 5, 12])
@pytest.mark.parametrize("term", TERMS)
def test_gradients_of_every_term_are_those_of_the_whole_batch(term: str, chunk: int) -> None:
    ratios = dict.fromkeys(("dist_ratio", "angle_ratio"), "0") | {f"{term}_ratio": "1.5", "queue_size": "20"}
    settings = resolve(DistillSettings, {"teacher": "t", "embedding_size": "6", "triplet_sample": "random"} | ratios)
    images = torch.randn(13, 3, 5, 5, dtype=torch.float64)
    found = []
    for size in (0, chunk):
        student, teacher = Staged(1, 4), Staged(2, 5)
        learned, (taught, *maps) = view(student, images, size), teacher.run(images)
        torch.manual_seed(3)  # FitNet's convolution
        (objective,) = objectives(settings, learned, View(taught, maps), CPU)
        objective.losses.double()
        torch.manual_seed(4)  # the miner
        (loss,) = objective(learned, View(taught.detach(), [m.detach() for m in maps]), LABELS).values()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), learned.embeddings.detach(), *gradients(student, objective.losses)])
    for whole, chunked in zip(*found, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_every_teachers_loss_are_those_of_the_whole_batch(name: str) -> None:
    loss = teacher_loss(resolve(TeacherSettings, {"loss": name, "embedding_size": "6", "sample": "random"}), 5).double()
    images, found = torch.randn(13, 3, 5, 5, dtype=torch.float64), []
    for chunk in (0, 4):
        model = Staged(1, 4)
        loss.zero_grad()
        embeddings = in_chunks(model, model.run, images, chunk)[0]
        torch.manual_seed(4)
        value = loss(embeddings, LABELS)
        value.backward()
        found.append([value.detach(), *gradients(model, loss)])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_chunk_passes_again_with_the_random_state_that_it_had(device: str) -> None:
    images, found = torch.randn(13, 3, 5, 5, dtype=torch.float64, device=device), []
    for embed in WAYS:
        model = Staged(1, 4, nn.Dropout(0.5)).to(device)
        torch.manual_seed(5)
        embeddings = embed(model, images)
        drawn = torch.rand(1, device=device)  # a miner's draw, and what backward must not change
        embeddings.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([embeddings.detach(), *gradients(model), drawn, torch.rand(1, device=device)])
    rounding = 0.0 if device == "cpu" else 1e-12  # a GPU may add up in any order
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


def test_running_statistics_move_once_a_chunk() -> None:
    images, found = torch.randn(13, 3, 5, 5, dtype=torch.float64), []
    for embed in WAYS:
        model = Staged(1, 4, nn.BatchNorm2d(4))
        embed(model, images).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([*(buffer.clone() for buffer in model.buffers()), *gradients(model)])
        assert int(model.get_buffer("between.num_batches_tracked")) == 4
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def counted(model: nn.Module) -> list[int]:
    """Filled with how many images pass, each time some do."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    return seen


def test_no_more_than_a_chunk_passes_a_network_at_once() -> None:
    student, teacher = build_model("resnet18", 8, False), build_model("resnet18", 16, True).eval()
    passed = counted(student), counted(teacher)
    images, index = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)
    batch, context = Batch(images, index // 2, index, index * 0), Context(CPU, "fp32")
    objective = Objective({"dist": (1.0, OnEmbeddings(RKDDistance())), "angle": (1.0, OnEmbeddings(RKDAngle()))})
    step = DistillStep(student, LiveTeacher(teacher, context, 4), [objective], 0, context, 4)
    update_weights(torch.optim.SGD(student.parameters()), step(batch, 1))
    assert passed == ([4, 3, 3, 3, 3, 4], [4, 3, 3])  # the student's first chunk is last in the backward pass
    student.eval()
    teach = TeacherStep(student, "square", Square(), context, 4)
    passed[0].clear()
    update_weights(torch.optim.SGD(student.parameters()), teach(batch, 1))
    assert passed[0] == [4, 3, 3, 3, 3, 4]


class Square(nn.Module):
    """A loss of labelled embeddings."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.square().mean() * labels.float().mean()


@pytest.mark.parametrize("count", range(4, 40))
def test_no_chunk_is_one_image(count: int) -> None:
    sizes: list[int] = []

    def run(images: Tensor) -> list[Tensor]:
        sizes.append(len(images))
        return [images]

    for chunk in range(4, 12):
        sizes.clear()
        (made,) = in_chunks(nn.Identity(), run, torch.arange(float(count)), chunk)
        assert torch.equal(made, torch.arange(float(count)))
        assert min(sizes) >= 2
        assert max(sizes) <= chunk


@pytest.mark.parametrize(("chunk", "refused"), [("1", True), ("3", True), ("0", False), ("4", False)])
def test_a_chunk_is_some_images(chunk: str, refused: bool) -> None:
    ask: Callable[[], object] = lambda: resolve(DistillSettings, {"teacher": "t", "chunk": chunk})  # noqa: E731
    if refused:
        with pytest.raises(SettingsError, match=rf"--chunk {chunk}: must be at least 4"):
            ask()
    else:
        ask()
