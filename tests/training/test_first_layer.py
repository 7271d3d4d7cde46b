"""The embedding layer's start: principal components, and the least-squares fit to a teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from rkd_cli.data import load_dataset
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import check_effect, resolve
from rkd_cli.training import loop
from rkd_cli.training.dry_run import dry_run
from rkd_cli.training.first_layer import least_squares_layer, principal_layer
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import _start_proxies, build_run
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher

SIZE = 4
Flags = dict[str, str | bool]


def drawn(rows: int = 60, columns: int = 7) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) @ torch.randn(columns, columns) + 5


def half_whitened(x: Tensor, size: int) -> Tensor:
    """Written out: principal components of a singular value decomposition, divided by roots of relative deviations."""
    centered = x.double() - x.double().mean(0)
    _, lengths, directions = torch.linalg.svd(centered, full_matrices=False)
    variances = lengths[:size] ** 2 / len(x)
    found: Tensor = centered @ directions[:size].T / (variances / variances.mean() + 0.1).sqrt().sqrt()
    return found


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    x = drawn().double()
    weight, bias = principal_layer(x, 3)
    due = half_whitened(x, 3)
    found = x @ weight.T + bias
    assert found.abs() == pytest.approx(due.abs(), abs=1e-9)
    assert principal_layer(x[:3], 5)[0].shape == (2, 7)
    assert principal_layer(x, 9)[0].shape == (7, 7)


def test_components_without_variance_stay_bounded() -> None:
    assert principal_layer(torch.full((6, 7), 0.5), 3)[0].norm(dim=1) == pytest.approx(
        torch.full((3,), 0.1**-0.25).double()
    )
    x = drawn()
    x[:, 3:] = x[:, :1]  # three directions
    assert principal_layer(x, 5)[0][3:].norm(dim=1) == pytest.approx(torch.full((2,), 0.1**-0.25).double(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_minimize_the_written_out_sum(dtype: torch.dtype) -> None:
    x, t = drawn().to(dtype), drawn(60, 3).flip(0).to(dtype)
    weight, bias = (value.requires_grad_() for value in least_squares_layer(x, t))
    penalty = (x.double() - x.double().mean(0)).square().sum() / x.shape[1]
    loss = (x.double() @ weight.T + bias - t.double()).square().sum() + penalty * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert all(gradient == pytest.approx(torch.zeros_like(gradient), abs=1e-6 * loss.item()) for gradient in gradients)


def test_equal_features_give_the_mean_target() -> None:
    t = drawn(6, 3)
    weight, bias = least_squares_layer(torch.full((6, 7), 0.5), t)
    assert torch.equal(weight, torch.zeros(3, 7).double())
    assert bias == pytest.approx(t.double().mean(0))


def test_more_rows_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = drawn(), drawn(60, 3)
    due = least_squares_layer(x, t)
    monkeypatch.setattr("rkd_cli.training.first_layer._ROWS", 7)
    assert all(a == pytest.approx(b) for a, b in zip(least_squares_layer(x, t), due, strict=True))


@pytest.fixture
def pretrained(quick: Flags, tmp_path: Path) -> Flags:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    more: Flags = {"base": "resnet18", "weights": str(tmp_path / "weights.pth"), "embedding_size": str(SIZE)}
    return quick | more | {"cache_dir": str(tmp_path / "cache")}


def features_of(run: Run) -> Tensor:
    """Of the training images, in order."""
    run.model.eval()
    with torch.no_grad():
        return torch.cat([run.model.features(batch.images) for batch in run.evaluation["train"]])


def test_a_run_starts_with_the_principal_components(pretrained: Flags) -> None:
    run = build_run(resolve(TeacherSettings, pretrained | {"init": "pca"}), silent)
    features = features_of(run)
    found = features @ run.model.linear.weight.T + run.model.linear.bias  # type: ignore[operator]
    due = half_whitened(features, SIZE)
    assert found.detach().abs() == pytest.approx(due.abs(), abs=1e-3 * float(due.abs().max()))


@pytest.mark.parametrize(
    ("loss", "prefixes"), [("proxy_anchor", ""), ("softmax", ""), ("arcface", ""), ("proxy_anchor", "2")]
)
def test_proxies_start_at_the_mean_embedding_of_their_class(loss: str, prefixes: str, pretrained: Flags) -> None:
    flags = {name: value for name, value in pretrained.items() if name != "sample"} | {"loss": loss}
    flags |= {"matryoshka": prefixes} if prefixes else {}
    random = build_run(resolve(TeacherSettings, flags | {"save_dir": f"{flags['save_dir']}-random"}), silent)
    run = build_run(resolve(TeacherSettings, flags | {"init": "pca"}), silent)
    features, labels = features_of(run), torch.tensor(run.evaluation["train"].images.labels)
    found = features @ run.model.linear.weight.T + run.model.linear.bias  # type: ignore[operator]
    proxies = [(name, value.detach().double()) for name, value in run.losses.named_parameters()]
    assert [value.shape[1] for _, value in proxies] == ([2, SIZE] if prefixes else [SIZE])
    for name, value in proxies:
        unit = torch.nn.functional.normalize(found.detach().double()[:, : value.shape[1]], dim=1)
        means = torch.stack([unit[labels == label].mean(0) for label in range(len(value))])
        due = torch.nn.functional.normalize(means, dim=1) * random.losses.get_parameter(name).norm(dim=1)[:, None]
        assert value == pytest.approx(due.detach().double(), abs=1e-4)


def test_a_proxy_whose_class_has_no_mean_direction_stays_random() -> None:
    layer, proxies = torch.nn.Linear(3, 2), torch.randn(2, 2)
    random = proxies.clone()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2, 3))
        layer.bias.zero_()
        opposite = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0]])
        _start_proxies(proxies, opposite, layer, [0, 0, 1])
    assert torch.equal(proxies[0], random[0])
    assert proxies[1] == pytest.approx(random[1].norm() * torch.tensor([0.0, 1.0]))


def vectors(flags: Flags, size: int) -> str:
    data = Path(str(flags["data"]))
    paths = [path for images in load_dataset("cub200", data) for path in images.paths]
    rows = np.random.default_rng(0).standard_normal((len(paths), size)).astype(np.float32)
    write_vectors(data / f"{size}.npz", rows, [str(path.relative_to(data)) for path in paths])
    return str(data / f"{size}.npz")


def distilling(flags: Flags, size: int = SIZE) -> Flags:
    return {name: value for name, value in flags.items() if name != "sample"} | {"teacher": vectors(flags, size)}


def test_a_student_starts_near_its_teacher_and_a_resumed_one_where_it_stopped(pretrained: Flags) -> None:
    flags = distilling(pretrained) | {"init": "teacher", "keep_state": True}
    run = build_run(resolve(DistillSettings, flags), silent)
    assert isinstance(run.teacher, CachedTeacher)
    weight, bias = least_squares_layer(features_of(run), run.teacher.center["train"])
    state = run.model.state_dict()
    assert state["linear.weight"] == pytest.approx(weight.float(), abs=1e-4)
    assert state["linear.bias"] == pytest.approx(bias.float(), abs=1e-4)
    train(run, silent)
    again: Flags = {"resume": True, "save_dir": flags["save_dir"], "epochs": "3"}
    resumed = build_run(resolve(DistillSettings, again), silent)
    assert torch.equal(resumed.model.get_parameter("linear.weight"), run.model.get_parameter("linear.weight"))


def test_where_a_start_is_not_possible(pretrained: Flags) -> None:
    with pytest.raises(SettingsError, match=r"^--init teacher: needs .* an embedding of its 6 dimensions"):
        build_run(resolve(DistillSettings, distilling(pretrained, 6) | {"init": "teacher"}), silent)
    for settings, words, says in (
        (TeacherSettings(weights="none", init="pca"), ["weights", "init"], "with --weights none"),
        (TeacherSettings(load=Path("a"), init="pca"), ["load", "init"], "with --load"),
    ):
        with pytest.raises(SettingsError, match=f"--init: has no effect {says}"):
            check_effect(settings, words)


def test_a_recipe_for_pretrained_networks_starts_randomly_from_random_weights(quick: Flags) -> None:
    events: list[Event] = []
    run = build_run(resolve(TeacherSettings, quick | {"init": "pca"}), events.append)
    weight = run.model.get_parameter("linear.weight")
    assert weight.abs().max() <= weight.shape[1] ** -0.5  # torch's random start; a component is longer
    assert not [event for event in events if isinstance(event, Note) and "init" in event.text]


def test_a_live_teacher_of_any_length_is_embedded_first_also_in_a_dry_run(pretrained: Flags, tmp_path: Path) -> None:
    teacher = build_model("timm:test_resnet", SIZE, False).eval()
    header = header_of(teacher, "timm:test_resnet", 36, 32, "")
    save_model(tmp_path / "teacher.safetensors", teacher.state_dict(), header)
    flags = {name: value for name, value in pretrained.items() if name != "sample"}
    flags |= {"teacher": str(tmp_path / "teacher.safetensors"), "init": "teacher", "match_ratio": "1"}
    settings = resolve(DistillSettings, flags)
    assert dry_run([settings], silent).once
    run = build_run(settings, silent)
    assert isinstance(run.teacher, LiveTeacher) and run.teacher.form
    targets = run.teacher.embed(run.evaluation["train"].images, run.evaluation["train"], silent, "")[0]
    assert targets.norm(dim=1) == pytest.approx(torch.ones(len(targets)))
    weight, _ = least_squares_layer(features_of(run), targets)
    assert run.model.state_dict()["linear.weight"] == pytest.approx(weight.float(), abs=1e-4)


def test_ranks_start_with_the_weights_of_the_main_process() -> None:
    main, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    due = iter(main.state_dict().values())

    def total(tensor: Tensor) -> Tensor:
        assert not tensor.any()  # this rank adds nothing
        return torch.add(tensor, next(due))

    ranks = SimpleNamespace(size=2, is_first=False, sum=total)
    run: Any = SimpleNamespace(context=SimpleNamespace(ranks=ranks), learner=other)
    loop._share_weights(run)
    assert all(torch.equal(a, b) for a, b in zip(main.parameters(), other.parameters(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("frozen", [True, False])
def test_features_are_computed_on_the_device(frozen: bool, pretrained: Flags) -> None:
    flags: Flags = pretrained | {"init": "pca", "device": "cuda", "freeze_base": frozen, "loss": "proxy_anchor"}
    flags = {name: value for name, value in flags.items() if name != "sample"}
    assert train(build_run(resolve(TeacherSettings, flags), silent), silent).result.best_epoch >= 0
