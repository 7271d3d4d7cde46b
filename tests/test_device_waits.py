"""Where a training step would wait for a GPU: nowhere, by default. The GPU is simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.cache import PixelCache
from rkd_cli.data.decode import Crop
from rkd_cli.data.loader import Batch, DeviceReader
from rkd_cli.metrics import agreement, recall_at_k
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.embedding_net import expose_stages
from rkd_cli.runtime.context import Context
from rkd_cli.schemas import Position
from rkd_cli.settings import DistillSettings, Sample, TeacherSettings
from rkd_cli.settings.training import Loss
from rkd_cli.training.objective import Objective, View, distill_objective, objectives, teacher_loss
from rkd_cli.training.state import restore, save_state
from rkd_cli.training.step import DistillStep, TeacherStep, update_weights
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher, view_of
from simulated_gpu import CUDA, SimulatedGpu

CONTEXT = Context(CUDA, "fp32")
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
# {case: what waits, and why it stays}; each is one wait a step
ALLOWED = {
    "sample distance-published": {"_local_scalar_dense": 1},  # its NaN weights are an error that names their reason
}
Waits = dict[str, list[str]]
Step = Callable[[Batch, int], dict[str, Tensor]]

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with SimulatedGpu() as gpu:
        yield gpu


SEEN: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda x: float(x.sum()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "index from the CPU": lambda x: x[[0, 1]],
    "multinomial": lambda x: x.abs().multinomial(1),
    "_unique2": lambda x: torch.unique(x),
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "copy from the GPU": lambda x: x.cpu(),
    "copy to the GPU": lambda x: torch.ones(3).to(x),
    "copy": lambda x: x.copy_(torch.ones(4, 3)),
}


@pytest.mark.parametrize("what", SEEN)
def test_the_simulated_gpu_sees_each_wait(gpu: SimulatedGpu, what: str) -> None:
    x = torch.randn(4, 3).to(CUDA, non_blocking=True)
    assert (x.device, (x @ x.T).device, torch.zeros_like(x).device) == (CUDA, CUDA, CUDA)
    assert not gpu.waits
    SEEN[what](x)
    assert what in gpu.waits


def test_the_simulated_gpu_refuses_tensors_of_the_cpu(gpu: SimulatedGpu) -> None:
    x = torch.randn(4, 3).to(CUDA)
    with pytest.raises(AssertionError, match="tensors of the CPU beside those of the GPU"):
        x + torch.ones(4, 3)
    assert (x + torch.ones(())).device == CUDA


def network(stages: bool = False, size: int = 8) -> EmbeddingNet:
    """Small, except with stages."""
    if stages:
        model = build_model("shufflenet_v2_x0_5", size, True)
        assert expose_stages(model)
    else:
        base = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model = EmbeddingNet(base, 6, size, True)
    return model.to(CUDA)


def batch() -> Batch:
    """As the readers give it."""
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    return Batch(images, LABELS, torch.arange(10), torch.zeros(10, dtype=torch.int64))


def adam(*learn: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for module in learn for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def train(gpu: SimulatedGpu, step: Step, optimizer: torch.optim.Optimizer) -> Waits:
    """A step of a batch; gives its {what waits: [file:line]}."""
    gpu.waits.clear()
    given = batch()
    update_weights(optimizer, step(given._replace(images=CONTEXT.to_device(given.images)), 1))
    assert all(gpu.has(p) for group in optimizer.param_groups for p in group["params"])
    return dict(gpu.waits)


def waits_of(gpu: SimulatedGpu, step: Step, *learn: nn.Module) -> Waits:
    """Of the second step: the first makes the optimizer's state."""
    optimizer = adam(*learn)
    train(gpu, step, optimizer)
    return train(gpu, step, optimizer)


def teacher_waits(gpu: SimulatedGpu, **flags: Any) -> Waits:
    settings = TeacherSettings(embedding_size=8, **flags)
    model, loss = network(), teacher_loss(settings, 4).to(CUDA)
    return waits_of(gpu, TeacherStep(model, settings.loss, loss, CONTEXT, settings.chunk), model, loss)


def student_waits(gpu: SimulatedGpu, **flags: Any) -> Waits:
    settings = DistillSettings(teacher="teacher", **flags)
    stages = bool(settings.at_ratio or settings.fitnet_ratio)
    student, teacher = network(stages), network(stages).requires_grad_(False).eval()
    images = CONTEXT.to_device(batch().images)
    seen: list[View] = [view_of(model, images, stages) for model in (student, teacher)]
    learned = objectives(settings, seen[0], seen[1], CUDA)
    losses = nn.ModuleList(objective.losses for objective in learned).to(CUDA)
    step = DistillStep(student, LiveTeacher(teacher, CONTEXT), learned, settings.hint_epochs, CONTEXT)
    return waits_of(gpu, step, student, losses)


CASES: dict[str, Callable[[SimulatedGpu], Waits]] = {
    **{f"loss {name}": lambda gpu, name=name: teacher_waits(gpu, loss=name) for name in get_args(Loss)},  # type: ignore[misc]
    **{f"sample {name}": lambda gpu, name=name: teacher_waits(gpu, sample=name) for name in get_args(Sample)},  # type: ignore[misc]
    "prefixes": lambda gpu: teacher_waits(gpu, matryoshka=(2, 4)),
    "distill": student_waits,
    **{
        name: lambda gpu, name=name: student_waits(gpu, **{"dist_ratio": 0.0, "angle_ratio": 0.0, name: 1.0})  # type: ignore[misc]
        for name in DistillSettings.ratios
    },
    "d3_ratio with a queue": lambda gpu: student_waits(gpu, d3_ratio=1.0, queue_size=20),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_waits_nowhere(gpu: SimulatedGpu, case: str) -> None:
    waits = CASES[case](gpu)
    assert {what: len(lines) for what, lines in waits.items()} == ALLOWED.get(case, {}), waits


@pytest.mark.parametrize("fits", [True, False])
def test_cached_views_are_read_without_a_wait(gpu: SimulatedGpu, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(10, 2, 8).half()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * views.nbytes + fits, 10**9))
    teacher = CachedTeacher(CONTEXT.store(views), {}, CONTEXT)
    assert gpu.has(teacher.training) == fits
    student, settings = network(), DistillSettings(teacher="teacher")
    learned = Objective(distill_objective(settings, 8, 8).terms)
    assert waits_of(gpu, DistillStep(student, teacher, [learned], 0, CONTEXT), student) == {}
    given = batch()
    gpu.waits.clear()
    found = teacher.view(given.images, given._replace(view=torch.arange(10) % 2), False).embeddings
    assert not gpu.waits
    assert gpu.has(found)
    assert found.tolist() == [views[row, row % 2].tolist() for row in range(10)]


def test_on_a_cpu_views_stay_where_they_are() -> None:
    views = torch.randn(3, 2, 8)
    assert Context(torch.device("cpu"), "fp32").store(views) is views


@pytest.mark.parametrize("size", [None, (6, 5)])
def test_pixels_on_the_gpu_are_read_without_a_wait(gpu: SimulatedGpu, size: tuple[int, int] | None) -> None:
    paths = tuple(Path(f"{number}.png") for number in range(10))
    pixels = torch.randint(0, 256, (10, 9, 9, 3), dtype=torch.uint8)
    cache = PixelCache(pixels, {path: row for row, path in enumerate(paths)}, Path("cache"))
    reader = DeviceReader(cache, 8, CUDA)
    gpu.waits.clear()
    crops = [Crop(index, 1, 0, bool(index % 2), size) for index in range(10)]
    (found,) = reader.read(ImageSet(paths, tuple(LABELS.tolist()), ("a",)), [crops])
    assert not gpu.waits
    assert [gpu.has(tensor) for tensor in found] == [True, False, False, False]
    assert gpu.has(network()(found.images))


def test_a_resumed_run_waits_once_for_its_queue(gpu: SimulatedGpu, tmp_path: Path) -> None:
    def made() -> tuple[nn.ModuleList, torch.optim.Optimizer, Step]:
        student, teacher = network(), network().requires_grad_(False).eval()
        objective = distill_objective(DistillSettings(teacher="teacher", queue_ratio=1.0, match_ratio=1.0), 8, 8)
        step = DistillStep(student, LiveTeacher(teacher, CONTEXT), [objective], 0, CONTEXT)
        learn = nn.ModuleList([student, objective.losses.to(CUDA)])
        return learn, adam(learn), step

    learn, optimizer, step = made()
    train(gpu, step, optimizer)
    save_state(tmp_path / "state.safetensors", Position(), learn, optimizer)
    learn, optimizer, step = made()
    restore(tmp_path / "state.safetensors", learn, optimizer)
    assert {what: len(lines) for what, lines in train(gpu, step, optimizer).items()} == {"_local_scalar_dense": 1}
    assert train(gpu, step, optimizer) == {}


def test_an_evaluation_waits_a_few_times(gpu: SimulatedGpu) -> None:
    """Once for all images: for the classes, and to read what it found."""
    embeddings, labels = (tensor.to(CUDA) for tensor in (torch.randn(10, 8), LABELS))
    for figures in (lambda: recall_at_k(embeddings, labels), lambda: agreement(embeddings, embeddings[:, :4])):
        gpu.waits.clear()
        figures()
        assert 0 < sum(map(len, gpu.waits.values())) < 20, gpu.waits
