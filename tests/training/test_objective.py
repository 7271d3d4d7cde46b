"""The terms that the ratio flags mix, the stages of FitNet, and the held-out classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rkd_cli.config.resolve import resolve
from rkd_cli.errors import SettingsError
from rkd_cli.events import silent
from rkd_cli.losses import PKT, AttentionTransfer, HardDarkRank, RelaxedContrastive
from rkd_cli.models import load_model
from rkd_cli.models.embedding_net import expose_stages
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.training.build import build_distill_run, build_teacher_run
from rkd_cli.training.loop import Run, train

NONE = {"dist_ratio": "0", "angle_ratio": "0"}
Flags = dict[str, str | bool]


@pytest.fixture(scope="module")
def flags(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """Of a distillation whose teacher is trained."""
    root = tmp_path_factory.mktemp("terms")
    common: Flags = {
        "data": str(tiny_set), "weights": "none", "base": "resnet18", "embedding_size": "8", "resize": "36",
        "image_size": "32", "batch": "8", "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1",
        "workers": "0", "device": "cpu", "overwrite": True,
    }  # fmt: skip
    save = {"save_dir": str(root / "teacher"), "embedding_size": "16"}
    train(build_teacher_run(resolve(TeacherSettings, common | save), silent), silent)
    return common | {"teacher_load": str(root / "teacher/last.safetensors"), "save_dir": str(root / "student")}


def distill_run(flags: Flags, **more: str) -> Run:
    return build_distill_run(resolve(DistillSettings, flags | more), silent)


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
        ({"base": "vit_b_16", "resize": "224", "image_size": "224"}, "the student, vit_b_16, has no four stages"),
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
    loss.backward()
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    first = gradients["base.features.0.0.weight"]
    assert first is not None
    assert first.abs().sum() > 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"hint_epochs": "1"}, "no hints without --fitnet-ratio"),
        (NONE | {"fitnet_ratio": "1", "hint_epochs": "1", "epochs": "2"}, "no term is left"),
        (NONE, "--dist-ratio, --angle-ratio, .* are 0: nothing to learn"),
    ],
)
def test_stages_that_make_no_sense(flags: Flags, more: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        resolve(DistillSettings, flags | more)


def test_the_best_epoch_can_be_picked_on_held_out_classes(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # per epoch: held-out, training, unseen classes
    recalls = iter([0.1, 0.9, 0.9, 0.5, 0.8, 0.3, 0.2, 0.7, 0.8])
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(recalls)})
    monkeypatch.setattr("rkd_cli.training.build.hold_out", lambda images: (images, images))
    teacher = {name: value for name, value in flags.items() if name != "teacher_load"}
    more = {"select_on": "val", "epochs": "2", "save_dir": str(tmp_path / "run")}
    result = train(build_teacher_run(resolve(TeacherSettings, teacher | more), silent), silent)
    assert (result.selected_on, result.best_epoch, result.best_eval_recall) == ("val", 1, 0.3)
    saved = json.loads((tmp_path / "run/result.json").read_text())
    assert (saved["selected_on"], saved["best_eval_recall"]) == ("val", 0.3)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["val_recall"]["1"] for row in rows] == [0.1, 0.5, 0.2]
    assert [row["is_best"] for row in rows] == [True, True, False]
