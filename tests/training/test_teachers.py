"""Teachers by name, vectors file and cached views; a frozen backbone and its head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from rkd_cli.data import load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import DataError, Interrupted, RkdError, RunError, SettingsError
from rkd_cli.events import Event, Note, Progress, TeacherEvaluated, silent
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.models.sources import open_network
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher

Flags = dict[str, str | bool]
NAME = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture
def flags(tiny_set: Path, tmp_path: Path) -> Flags:
    return {
        "data": str(tiny_set), "cache_dir": str(tmp_path / "cache"), "weights": "none", "base": "shufflenet_v2_x0_5",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "8", "num_image_per_class": "2",
        "iter_per_epoch": "3", "epochs": "2", "lr": "1e-3", "workers": "0", "device": "cpu",
        "keep_state": True, "save_dir": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file as torchvision publishes it, of a network that was pretrained elsewhere."""
    torch.manual_seed(5)
    path = tmp_path / "shufflenet.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=7).state_dict(), path)
    return str(path)


def distill(flags: Flags, report: Any = silent, **more: str | bool) -> Run:
    return build_run(resolve(DistillSettings, flags | more), report)


def teach(flags: Flags, report: Any = silent, **more: str | bool) -> Run:
    return build_run(resolve(TeacherSettings, flags | more), report)


def vectors_of(flags: Flags, path: Path, size: int = 5) -> dict[str, np.ndarray]:
    """A file with a random embedding of each image of the set, and what it holds."""
    splits = load_dataset("cub200", Path(str(flags["data"])))
    names = [name for split in splits for name in relative_names(split.paths, Path(str(flags["data"])))]
    embeddings = np.random.default_rng(0).normal(size=(len(names), size)).astype(np.float32)
    write_vectors(path, embeddings, names)
    return dict(zip(names, embeddings, strict=True))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pretrained_network_teaches_with_its_pooled_features(flags: Flags, weights: str, suffix: str) -> None:
    file = Path(weights).with_suffix(suffix)
    if suffix == ".safetensors":
        save_file(torch.load(weights, weights_only=True), file)
    run = distill(flags, teacher=NAME, teacher_weights=str(file))
    assert isinstance(run.teacher, LiveTeacher)
    batch = next(run.loader.epoch(1))
    taught = run.teacher.view(batch.images, batch, False).embeddings
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network.eval()((batch.images / 255 - mean) / std))
    torch.testing.assert_close(taught, expected, atol=1e-5, rtol=1e-4)
    assert run.started.teacher is not None
    assert (run.started.teacher.base, run.started.teacher.embedding_size) == (NAME, 1024)
    train(run, silent)


def test_timms_networks_take_their_published_files(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    file = tmp_path / "vit.safetensors"
    save_file(network.state_dict(), file)
    model, header = open_network("timm:vit_tiny_patch16_224", file)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(
            network.forward_head(network.forward_features((images - 0.5) / 0.5), pre_logits=True)
        )
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)
    assert (header.embedding_size, header.image_size, header.l2normalize) == (192, 224, True)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"teacher": "timm:vit_tny_patch16_224"},
            "timm:vit_tny_patch16_224: no such network. Did you mean timm:vit_tiny",
        ),
        ({"teacher": "torchvision:resnet19"}, "resnet19: no such network. Did you mean resnet18"),
        ({"teacher": "there.npz"}, "there.npz: no such file"),
        ({"teacher": "there.safetensors"}, "there.safetensors: no such file"),
        ({"teacher": "a", "teacher_load": "b"}, "--teacher and --teacher-load are the same flag. Give one of them"),
        ({"teacher": "a.npz", "teacher_weights": "w.pth"}, "--teacher-weights: a.npz contains its weights"),
        ({"teacher": NAME, "teacher_views": "2", "at_ratio": "1"}, "--at-ratio: feature maps are not cached"),
        ({"teacher": NAME, "teacher_views": "2", "mixup": "1"}, "--mixup: blended images are not cached"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_one_line(flags: Flags, more: Flags, says: str) -> None:
    with pytest.raises(RkdError, match=says):
        distill(flags, **more)


def test_weights_of_another_network_are_refused(flags: Flags, weights: str) -> None:
    with pytest.raises(RkdError, match=r"shufflenet.pth: not the weights of a resnet18"):
        distill(flags, teacher="torchvision:resnet18", teacher_weights=weights)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_vectors_alone_teach(flags: Flags, tmp_path: Path, suffix: str) -> None:
    row = vectors_of(flags, tmp_path / f"vectors{suffix}")
    events: list[Event] = []
    run = distill(flags, events.append, teacher=str(tmp_path / f"vectors{suffix}"))
    assert isinstance(run.teacher, CachedTeacher)
    batch = next(run.loader.epoch(1))
    paths = load_dataset("cub200", Path(str(flags["data"])))[0].paths
    expected = [row[relative_names([paths[i]], Path(str(flags["data"])))[0]] for i in batch.index.tolist()]
    assert np.array_equal(run.teacher.view(batch.images, batch, False).embeddings.numpy(), np.array(expected))
    train(run, events.append)
    (told,) = (event for event in events if isinstance(event, TeacherEvaluated))
    assert told.figures["train"] and told.figures["eval"]
    assert not any(isinstance(event, Note) and "embedding" in event.text for event in events)


def test_images_without_a_vector_are_named_and_left_out(flags: Flags, tmp_path: Path) -> None:
    row = vectors_of(flags, tmp_path / "all.npz")
    train_set, eval_set = load_dataset("cub200", Path(str(flags["data"])))
    gone = relative_names([train_set.paths[3], eval_set.paths[0]], Path(str(flags["data"])))
    found = {name: vector for name, vector in row.items() if name not in gone} | {"no/such.jpg": row[gone[0]]}
    write_vectors(tmp_path / "some.npz", np.array(list(found.values())), list(found))
    events: list[Event] = []
    run = distill(flags, events.append, teacher=str(tmp_path / "some.npz"))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("no embedding of 1 train image," in note and gone[0] in note for note in notes)
    assert any("no embedding of 1 eval image," in note and gone[1] in note for note in notes)
    assert any("1 embeddings match no image, such as no/such.jpg" in note for note in notes)
    assert [split.images for split in run.started.splits] == [len(train_set) - 1, len(eval_set)]
    assert run.teacher is not None
    assert (run.teacher.has("train"), run.teacher.has("eval")) == (True, False)
    train(run, silent)


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        (np.eye, {}, 1),
        (lambda count: np.random.default_rng(0).normal(size=(count, 8)), {}, 0),
        (np.eye, {"dist_ratio": "0", "pkt_ratio": "1"}, 0),
        (lambda count: np.diag(np.linspace(1, 3, count)), {"pkt_ratio": "1"}, 1),  # which has no use for lengths
    ],
)
def test_a_teacher_without_relations_is_told(
    flags: Flags, tmp_path: Path, rows: Callable[[int], np.ndarray], more: dict[str, str], told: int
) -> None:
    names = list(vectors_of(flags, tmp_path / "v.npz"))
    write_vectors(tmp_path / "v.npz", rows(len(names)).astype(np.float32), names)
    events: list[Event] = []
    ratios = {"angle_ratio": "0"} | more
    distill(flags, events.append, teacher=str(tmp_path / "v.npz"), **ratios)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len([note for note in notes if "nearly equal (their standard deviation is 0.0%" in note]) == told


def test_images_whose_row_is_zeros_are_named_and_left_out(flags: Flags, tmp_path: Path) -> None:
    row = vectors_of(flags, tmp_path / "v.npz")
    train_set, eval_set = load_dataset("cub200", Path(str(flags["data"])))
    blank = relative_names([train_set.paths[3], eval_set.paths[0]], Path(str(flags["data"])))
    zeros = {name: np.zeros_like(row[name]) for name in blank}
    write_vectors(tmp_path / "v.npz", np.array(list((row | zeros).values())), list(row))
    events: list[Event] = []
    run = distill(flags, events.append, teacher=str(tmp_path / "v.npz"))
    notes = [event.text for event in events if isinstance(event, Note)]
    why = f"{tmp_path}/v.npz: a row of zeros, which has no direction, for"
    assert f"{why} 1 train image, first {blank[0]}: they are left out" in notes
    assert f"{why} 1 eval image, first {blank[1]}: the teacher is not measured there" in notes
    assert [split.images for split in run.started.splits] == [len(train_set) - 1, len(eval_set)]
    taught = [run.teacher.view(b.images, b, False).embeddings for b in run.loader.epoch(1) if run.teacher]
    assert all(bool(rows.any(dim=1).all()) for rows in taught)


def spoil(path: Path, what: str) -> None:
    with np.load(path) as file:
        embeddings, names = file["embeddings"], file["paths"]
    match what:
        case "count":
            embeddings = embeddings[1:]
        case "nan":
            embeddings[2, 1] = np.nan
        case "twice":
            names[1] = names[0]
        case "foreign":
            names = np.array([f"elsewhere/{name}" for name in names])
        case "form":
            embeddings = embeddings[0]
        case "whole":
            embeddings = embeddings.astype(np.int64)
    np.savez(path, embeddings=embeddings, paths=names)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    if what == "empty":
        np.savez(path, embeddings=embeddings)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("count", "embeddings and 4. paths"),
        ("nan", r"1 embeddings are not finite, first that of images/"),
        ("twice", "1 paths are duplicates, first images/"),
        ("foreign", "has no embedding of the train images. Its paths must be relative to"),
        ("form", r"float32 of shape \(5,\)"),
        ("whole", "int64 of shape"),
        ("truncated", "cannot be read as npz"),
        ("empty", "contains no paths"),
    ],
)
def test_damaged_vectors_are_one_line(flags: Flags, tmp_path: Path, what: str, says: str) -> None:
    path = tmp_path / "vectors.npz"
    vectors_of(flags, path)
    spoil(path, what)
    with pytest.raises(DataError, match=says) as caught:
        distill(flags, teacher=str(path))
    assert len(caught.value.problems) == 1


def test_a_flipped_bit_of_vectors_is_noticed(flags: Flags, tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    vectors_of(flags, path)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="wrong checksum"):
        distill(flags, teacher=str(path))


def test_vectors_have_no_feature_maps(flags: Flags, tmp_path: Path) -> None:
    vectors_of(flags, tmp_path / "vectors.npz")
    with pytest.raises(SettingsError, match=r"--at-ratio: .*vectors.npz is a vectors file without feature maps"):
        distill(flags, teacher=str(tmp_path / "vectors.npz"), at_ratio="1")


def test_vectors_know_no_blends(flags: Flags, tmp_path: Path) -> None:
    vectors_of(flags, tmp_path / "vectors.npz")
    with pytest.raises(SettingsError, match=r"--mixup: .*vectors.npz is a vectors file"):
        distill(flags, teacher=str(tmp_path / "vectors.npz"), mixup="1")


def test_a_run_does_not_resume_with_another_vectors_file(flags: Flags, tmp_path: Path) -> None:
    path = tmp_path / "vectors.npz"
    row = vectors_of(flags, path)
    train(distill(flags, teacher=str(path)), silent)
    write_vectors(path, np.array(list(row.values())) + 1, list(row))
    with pytest.raises(RkdError, match="the teacher changed since"):
        distill({"save_dir": flags["save_dir"], "resume": True, "epochs": "3"})


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp16", 2e-3)])
def test_cached_views_equal_a_live_teacher_on_the_same_crops(
    flags: Flags, weights: str, precision: str, tolerance: float
) -> None:
    more: Flags = {"teacher": NAME, "teacher_weights": weights}
    run = distill(flags, teacher_views="3", views_precision=precision, **more)
    assert isinstance(run.teacher, CachedTeacher)
    live = distill(flags | {"save_dir": str(flags["save_dir"]) + "-live"}, **more)
    assert isinstance(live.teacher, LiveTeacher)
    drawn = set()
    for batch in run.loader.epoch(1):
        cached, fresh = (teacher.view(batch.images, batch, False).embeddings for teacher in (run.teacher, live.teacher))
        torch.testing.assert_close(cached, fresh, atol=tolerance, rtol=0)
        drawn |= set(batch.view.tolist())
    assert drawn == {0, 1, 2}
    events: list[Event] = []
    train(run, events.append)
    whole: list[Event] = []
    train(live, whole.append)
    told, expected = (next(e for e in es if isinstance(e, TeacherEvaluated)) for es in (events, whole))
    assert told == expected


def files_of(flags: Flags) -> list[Path]:
    return sorted(Path(str(flags["cache_dir"])).glob("*.vectors"))


def test_views_are_computed_once_and_resumed(flags: Flags, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more: Flags = {"teacher": NAME, "teacher_weights": weights, "teacher_views": "3"}
    monkeypatch.setattr("rkd_cli.embedding.views._AT_ONCE", 10)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "views" in event.what and event.done >= 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        distill(flags, stop, **more)
    assert not files_of(flags)
    (unfinished,) = Path(str(flags["cache_dir"])).glob(".*.rows.part")
    with unfinished.open("ab") as file:
        file.write(b"half a row")
    events: list[Event] = []
    distill(flags, events.append, **more)
    done = [event.done for event in events if isinstance(event, Progress) and "views" in event.what]
    assert done[0] == 30, "resumes after the 20 complete ones"
    first = [path.read_bytes() for path in files_of(flags)]
    assert len(first) == 3 and not list(Path(str(flags["cache_dir"])).glob(".*.rows.part"))

    again: list[Event] = []
    distill(flags, again.append, **more)
    assert not any(isinstance(event, Progress) and "views" in event.what for event in again)
    for path in files_of(flags):
        path.unlink()
    distill(flags, silent, **more)
    assert [path.read_bytes() for path in files_of(flags)] == first


def test_views_of_another_teacher_are_others(flags: Flags, weights: str, tmp_path: Path) -> None:
    more: Flags = {"teacher": NAME, "teacher_views": "2"}
    distill(flags, teacher_weights=weights, **more)
    torch.manual_seed(6)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "other.pth")
    distill(flags, teacher_weights=str(tmp_path / "other.pth"), **more)
    assert len(files_of(flags)) == 6


def test_views_of_another_name_with_the_same_weights_are_others(flags: Flags, tmp_path: Path) -> None:
    one, other = "timm:tf_efficientnet_lite0", "timm:efficientnet_lite0"  # which have other means
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model(one.removeprefix("timm:")).state_dict(), file)
    more: Flags = {"teacher_weights": str(file), "teacher_views": "1"}
    for name, files in ((one, 3), (other, 6), (one, 6)):
        run = distill(flags, teacher=name, **more)
        assert len(files_of(flags)) == files
    assert distill(flags, teacher=other, **more).directory.inputs["teacher"] != run.directory.inputs["teacher"]


def test_features_serve_heads_of_any_size_and_no_other_backbone(flags: Flags, tmp_path: Path) -> None:
    more: Flags = {"freeze_base": True, "views": "1"}
    run = teach(flags, embedding_size="8", **more)
    assert len(files_of(flags)) == 3
    header = header_of(run.model, "shufflenet_v2_x0_5", 36, 32, "cub200")
    for name, mean in (("same", header.mean), ("other", (0.5, 0.5, 0.5))):
        save_model(tmp_path / name, run.model.state_dict(), header.model_copy(update={"mean": mean}))
    size = build_model("shufflenet_v2_x0_5", 4, False)
    size.base.load_state_dict(run.model.base.state_dict())
    save_model(tmp_path / "size", size.state_dict(), header_of(size, "shufflenet_v2_x0_5", 36, 32, "cub200"))
    for name, files in (("same", 3), ("size", 3), ("other", 6)):
        start: Flags = {"load": str(tmp_path / name), "save_dir": str(tmp_path / f"run-{name}")}
        start |= {"embedding_size": "4", "l2normalize": False} if name == "size" else {}
        teach(flags | start, **more)
        assert len(files_of(flags)) == files


def test_views_that_fp16_cannot_hold_are_refused(flags: Flags, tmp_path: Path) -> None:
    train(teach(flags, l2normalize=False), silent)
    teacher = tmp_path / "run/last.safetensors"
    model = load_model(teacher)
    with torch.no_grad():
        model.linear.get_parameter("weight").mul_(1e7)
    save_model(tmp_path / "large.safetensors", model.state_dict(), read_header(teacher))
    more: Flags = {
        "teacher": str(tmp_path / "large.safetensors"),
        "teacher_views": "2",
        "save_dir": str(tmp_path / "s"),
    }
    with pytest.raises(RunError, match=r"are not finite. Use --views-precision fp32"):
        distill(flags, **more)
    distill(flags, views_precision="fp32", **more)


@pytest.mark.parametrize("loss", ["proxy_anchor", "softmax", "arcface", "multi_similarity", "smooth_ap"])
@pytest.mark.parametrize("freeze", [False, True])
def test_losses_with_weights_learn_and_resume(flags: Flags, tmp_path: Path, loss: str, freeze: bool) -> None:
    more: Flags = {"loss": loss, "freeze_base": freeze, "views": "2"}
    whole = teach(flags, **more)
    before = {name: tensor.clone() for name, tensor in whole.losses.state_dict().items()}
    train(whole, silent)
    assert bool(before) == (loss in ("proxy_anchor", "softmax", "arcface"))
    for name, tensor in whole.losses.state_dict().items():
        assert not torch.equal(before[name], tensor), "proxies learn"
    ratios = {group["lr_ratio"] for group in whole.optimizer.param_groups}
    assert ratios == ({1.0, 100.0} if before else {1.0})

    parted = flags | more | {"save_dir": str(tmp_path / "parted")}
    train(teach(parted, epochs="1"), silent)
    resumed: Flags = {"save_dir": parted["save_dir"], "resume": True, "epochs": "2"}
    train(build_run(resolve(TeacherSettings, resumed), silent), silent)
    ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("run", "parted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_frozen_backbone_stays_and_its_head_learns(flags: Flags, tmp_path: Path) -> None:
    run = teach(flags, freeze_base=True, views="3")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    batch = next(run.loader.epoch(1))
    assert batch.images.shape == (8, 1024)
    train(run, silent)
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"linear.weight", "linear.bias"}
    # what was measured on features is what the saved network reaches on images
    saved = load_model(tmp_path / "run/last.safetensors")
    pixels = teach(flags | {"save_dir": str(tmp_path / "other")})
    images = next(iter(pixels.evaluation["eval"]))
    features = next(iter(run.evaluation["eval"]))
    with torch.no_grad():
        torch.testing.assert_close(
            saved(images.images), run.embedder.eval()(features.images)[: len(images.images)], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("views", ["0", "2"])
def test_queues_and_projections_are_resumed(flags: Flags, weights: str, tmp_path: Path, views: str) -> None:
    more: Flags = {
        "teacher": NAME, "teacher_weights": weights, "teacher_views": views, "embedding_size": "1024",
        "matryoshka": "8", "match_ratio": "1", "csd_ratio": "1", "queue_ratio": "1", "d3_ratio": "0.01",
        "queue_size": "20",
    }  # fmt: skip
    whole = distill(flags, **more)
    before = {name: tensor.clone() for name, tensor in whole.losses.state_dict().items()}
    train(whole, silent)
    assert {name.rsplit(".", 1)[1] for name in before} == {"rows", "pushed", "weight"}
    assert all(not torch.equal(before[name], tensor) for name, tensor in whole.losses.state_dict().items())
    parted = flags | more | {"save_dir": str(tmp_path / "parted")}
    train(distill(parted, epochs="1"), silent)
    train(distill({"save_dir": parted["save_dir"], "resume": True, "epochs": "2"}), silent)
    ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("run", "parted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_directory_of_a_run_teaches_with_its_best_model(flags: Flags, tmp_path: Path) -> None:
    train(teach(flags), silent)
    student: Flags = {"teacher": str(tmp_path / "run"), "save_dir": str(tmp_path / "student")}
    run = distill(flags, **student)
    assert run.started.teacher is not None
    assert run.started.teacher.path == tmp_path / "run/best.safetensors"
    with pytest.raises(SettingsError, match="contains the teacher"):
        distill(flags, teacher=str(tmp_path / "run"), overwrite=True)


def test_views_of_a_teacher_that_is_a_file_are_noted_to_have_no_effect(flags: Flags, tmp_path: Path) -> None:
    vectors_of(flags, tmp_path / "v.npz")
    events: list[Event] = []
    distill(flags, events.append, teacher=str(tmp_path / "v.npz"), teacher_views="2")
    assert Note(f"{tmp_path / 'v.npz'} is a vectors file: --teacher-views 2 is not used") in events
