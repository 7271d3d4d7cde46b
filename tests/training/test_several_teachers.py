"""Several teachers: one space that joins them, losses averaged over them, and the file that names them."""

from __future__ import annotations

import colorsys
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data import load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.embedder import open_embedder
from rkd_cli.embedding.vectors import read_vectors, write_vectors
from rkd_cli.errors import RkdError
from rkd_cli.events import Event, Note, TeacherEvaluated, silent
from rkd_cli.losses import RKDAngle, RKDDistance
from rkd_cli.metrics import recall_at_k
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.models.joined import TEACHERS, JoinedSpace, joined_size, side_by_side
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import DistillSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.plan import plan_run
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher

Flags = dict[str, str | bool]


@pytest.fixture
def flags(quick: Flags, tmp_path: Path) -> Flags:
    """Flags of a student of two networks; the teachers ``a.safetensors`` and ``b.safetensors`` are of other sizes."""
    for name, size in (("a", 6), ("b", 4)):
        torch.manual_seed(size)
        model = build_model("shufflenet_v2_x0_5", size, name == "b")
        header = header_of(model, "shufflenet_v2_x0_5", 36, 32, "cub200")
        save_model(tmp_path / f"{name}.safetensors", model.state_dict(), header)
    shared = {name: value for name, value in quick.items() if name != "sample"}
    more: Flags = {"cache_dir": str(tmp_path / "cache"), "cache": "auto", "keep_state": True}
    return shared | {"teacher": of(tmp_path, "safetensors")} | more


def of(folder: Path, suffix: str) -> str:
    return f"{folder / 'a'}.{suffix},{folder / 'b'}.{suffix}"


def names_of(flags: Flags, *splits: str) -> list[str]:
    found = dict(zip(("train", "eval"), load_dataset("cub200", Path(str(flags["data"]))), strict=True))
    data = Path(str(flags["data"]))
    return [name for split in splits or ("train", "eval") for name in relative_names(found[split].paths, data)]


def write_files(flags: Flags, folder: Path) -> dict[str, np.ndarray]:
    """Vectors files ``a.npz`` and ``b.npz`` of all images, and their rows."""
    names, draws = names_of(flags), np.random.default_rng(0)
    rows = {name: draws.normal(size=(len(names), size)) + 1 for name, size in (("a", 6), ("b", 4))}
    for name, own in rows.items():
        write_vectors(folder / f"{name}.npz", own.astype(np.float32), names)
    return rows


def built(flags: Flags, report: Any = silent, **more: str | bool) -> Run:
    return build_run(resolve(DistillSettings, flags | more), report)


def joined_by_hand(parts: list[np.ndarray], fitted: int, size: int) -> np.ndarray:
    """The joined space of rows, fitted to the first ones, one teacher at a time."""
    scaled = []
    for part in parts:
        unit = part / np.linalg.norm(part, axis=1, keepdims=True)
        centered = unit - unit[:fitted].mean(axis=0)
        scaled.append(centered / np.sqrt((centered[:fitted] ** 2).sum(axis=1).mean()))
    rows = np.concatenate(scaled, axis=1)
    _, _, directions = np.linalg.svd(rows[:fitted], full_matrices=False)
    reduced = rows @ directions[:size].T
    return np.asarray(reduced / np.linalg.norm(reduced, axis=1, keepdims=True))


@pytest.mark.parametrize(("fitted", "size"), [(40, 9), (40, 3), (6, 9)])
def test_the_space_is_rows_side_by_side_that_count_the_same_and_their_pca(fitted: int, size: int) -> None:
    """With fewer images than dimensions, it has the directions in which they differ."""
    draws = np.random.default_rng(3)
    mixing = draws.normal(size=(3, 4, 7))
    parts = [draws.normal(size=(50, 4)) @ mixing[0, :, :5] + 2, draws.normal(size=(50, 7)) * np.arange(1, 8)]
    rows = side_by_side([torch.from_numpy(part) for part in parts])
    space = JoinedSpace((5, 7), min(size, joined_size((5, 7), fitted)))
    space.fit(rows[:fitted])
    expected = joined_by_hand([part.astype(np.float32) for part in parts], fitted, space.size)
    found = space(rows)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-5)  # directions have no sign
    assert space.size == min(size, 12, fitted - 1)


def test_relations_of_the_space_are_those_of_the_teachers() -> None:
    """Whitened rows are about equally far from each other: students of RKD learned nothing from them."""
    parts = [torch.randn(60, 40) * torch.arange(40).add(1).pow(-1.5) for _ in "ab"]
    space = JoinedSpace((40, 40), 59)
    rows = side_by_side(parts)
    space.fit(rows)
    near, far = (torch.pdist(found) for found in (rows.double(), space(rows).double()))
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.95
    assert far.std() / far.mean() > 0.8 * near.std() / near.mean()


def test_equal_rows_of_a_teacher_add_nothing() -> None:
    parts = [torch.randn(20, 3), torch.ones(20, 2)]
    both, alone = JoinedSpace((3, 2), 3), JoinedSpace((3,), 3)
    both.fit(side_by_side(parts))
    alone.fit(side_by_side(parts[:1]))
    found, expected = both(side_by_side(parts)), alone(side_by_side(parts[:1]))
    torch.testing.assert_close(found @ found.T, expected @ expected.T)


def taught(run: Run) -> tuple[Tensor, Tensor]:
    """What the teacher makes of the first batch, and of the evaluation images."""
    assert run.teacher is not None
    batch, images = next(run.loader.epoch(1)), run.evaluation["eval"]
    own = run.teacher.view(batch.images, batch, False).embeddings
    return own, run.teacher.embed(images.images, images, silent, "")[0]


def test_networks_and_their_cached_views_teach_in_one_space(flags: Flags, tmp_path: Path) -> None:
    live = built(flags)
    assert isinstance(live.teacher, LiveTeacher)
    nets = [load_model(tmp_path / f"{name}.safetensors") for name in "ab"]
    with torch.no_grad():
        parts = [
            np.concatenate([torch.cat([net(b.images) for b in live.evaluation[s]]).numpy() for s in ("train", "eval")])
            for net in nets
        ]
    count = len(live.evaluation["train"].images)
    expected = joined_by_hand(parts, count, 10)[count:]
    batch, evaluated = taught(live)
    np.testing.assert_allclose(evaluated @ evaluated.T, expected @ expected.T, atol=5e-3)
    header = read_header(tmp_path / "run" / TEACHERS)
    assert [Path(name).name for name, _ in header.teachers] == ["a.safetensors", "b.safetensors"]
    cached = built(flags, teacher_views="2", views_precision="fp32", save_dir=str(tmp_path / "other"))
    assert isinstance(cached.teacher, CachedTeacher)
    # each run fits its own space: rounding turns components of little variance
    torch.testing.assert_close(taught(cached)[1], evaluated, atol=5e-3, rtol=0)
    assert batch.shape == taught(cached)[0].shape == (8, 10)


def test_the_file_of_teachers_is_itself_a_teacher(flags: Flags, tmp_path: Path) -> None:
    run = built(flags)
    again = built(flags, teacher=str(tmp_path / "run" / TEACHERS), save_dir=str(tmp_path / "other"))
    for found, expected in zip(taught(again), taught(run), strict=True):
        torch.testing.assert_close(found, expected)
    torch.manual_seed(9)
    other = build_model("shufflenet_v2_x0_5", 4, True)
    header = read_header(tmp_path / "b.safetensors")
    save_model(tmp_path / "b.safetensors", other.state_dict(), header)
    with pytest.raises(RkdError, match=r"teachers.safetensors: its teacher .*b.safetensors changed. Restore that"):
        _ = open_embedder(str(tmp_path / "run" / TEACHERS)).network


def test_vectors_files_teach_in_one_space(flags: Flags, tmp_path: Path) -> None:
    rows = write_files(flags, tmp_path)
    run = built(flags, teacher=of(tmp_path, "npz"))
    names, count = names_of(flags), len(names_of(flags, "train"))
    expected = joined_by_hand([own.astype(np.float32) for own in rows.values()], count, 10)
    found = taught(run)[1]
    np.testing.assert_allclose(found @ found.T, expected[count:] @ expected[count:].T, atol=2e-5)
    opened = open_embedder(str(tmp_path / "run" / TEACHERS))
    assert opened.vectors and opened.unit
    own = torch.from_numpy(opened.vectors.embeddings[[opened.vectors.row[name] for name in names[count:]]])
    torch.testing.assert_close(own, found)


def test_a_student_shares_the_space_at_its_own_size(flags: Flags, tmp_path: Path) -> None:
    run = built(flags, d3_ratio="1", embedding_size="5")
    assert run.model.teacher_space is not None
    assert run.model.teacher_space.size == 5 == read_header(tmp_path / "run" / TEACHERS).embedding_size
    with pytest.raises(RkdError, match="--d3-ratio: student embeddings have 16 dimensions, teacher embeddings 10"):
        built(flags, d3_ratio="1", embedding_size="16", save_dir=str(tmp_path / "other"))


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_student_searches_the_index_of_its_teachers(
    flags: Flags, tmp_path: Path, rkd: Callable[..., tuple[int, str, str]], kind: str
) -> None:
    write_files(flags, tmp_path)
    space = {"dist_ratio": "0", "angle_ratio": "0", "d3_ratio": "1", "embedding_size": "5"}
    train(built(flags, teacher=of(tmp_path, kind), **space), silent)
    student, teachers, data = tmp_path / "run", tmp_path / "run" / TEACHERS, str(flags["data"])
    code, out, err = rkd("evaluate", student, "--gallery", teachers, "--data", data, "--dataset", "cub200", "--json")
    assert code == 0, err
    own, joint = map(json.loads, out.splitlines())
    assert own["variants"] and joint["checkpoint"] == str(teachers)
    code, _, err = rkd("embed", teachers, "--data", data, "--dataset", "cub200", "--out", tmp_path / "index.npz")
    assert code == 0, err
    query = Path(data) / names_of(flags, "eval")[0]
    code, out, err = rkd(
        "search", student, "--gallery", tmp_path / "index.npz", "--data", data, "--query", query, "--asymmetric"
    )
    assert code == 0, err
    code, out, err = rkd("report", student, "--out", tmp_path / "report.html")
    assert code == 0, err
    assert "left out" not in err and "not measured" not in err


def test_averaged_losses_are_the_mean_of_each_teachers(flags: Flags, tmp_path: Path) -> None:
    rows = write_files(flags, tmp_path)
    run = built(flags, teacher=of(tmp_path, "npz"), combine="averaged")
    assert not (tmp_path / "run" / TEACHERS).exists()
    batch = next(run.loader.epoch(1))
    found = run.step(batch, 1)
    student = run.model(batch.images).detach()
    for name, loss, ratio in (("dist", RKDDistance(), 1), ("angle", RKDAngle(), 2)):
        each = [float(loss(student, torch.from_numpy(own[batch.index]).float())) for own in unit(rows)]
        assert float(found[name].detach()) == pytest.approx(ratio * sum(each) / 2, rel=1e-4)


def unit(rows: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [own / np.linalg.norm(own, axis=1, keepdims=True) for own in rows.values()]


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_resumed_run_reads_the_space(flags: Flags, tmp_path: Path, kind: str) -> None:
    write_files(flags, tmp_path)
    more = {"teacher": of(tmp_path, kind), "epochs": "2", "d3_ratio": "1"}
    train(built(flags, **more), silent)
    half = tmp_path / "half"
    train(built(flags, **more | {"epochs": "1", "save_dir": str(half)}), silent)
    resumed = {"resume": True, "save_dir": str(half), "epochs": "2"}
    train(build_run(resolve(DistillSettings, resumed), silent), silent)
    whole, parts = load_model(tmp_path / "run/last.safetensors"), load_model(half / "last.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    resumed |= {"epochs": "3"}
    if kind == "npz":
        vectors = read_vectors(tmp_path / "b.npz")
        write_vectors(tmp_path / "b.npz", vectors.embeddings[:, ::-1].copy(), list(vectors.row))
        with pytest.raises(RkdError, match=r"half: the teacher changed since the run was stopped"):
            plan_run(resolve(DistillSettings, resumed), silent)
        return
    (tmp_path / "c").write_bytes((half / TEACHERS).read_bytes())
    (half / TEACHERS).write_bytes((tmp_path / "run" / TEACHERS).read_bytes()[:-8] + bytes(8))
    with pytest.raises(RkdError, match=r"teachers.safetensors: damaged \(wrong checksum\)"):
        plan_run(resolve(DistillSettings, resumed), silent)
    (half / TEACHERS).unlink()
    with pytest.raises(RkdError, match=r"teachers.safetensors: is missing and cannot be recomputed. Put it back"):
        plan_run(resolve(DistillSettings, resumed), silent)


def test_an_image_that_one_file_lacks_is_named_and_left_out(flags: Flags, tmp_path: Path) -> None:
    write_files(flags, tmp_path)
    vectors, gone = read_vectors(tmp_path / "b.npz"), names_of(flags)[1]
    kept = [name for name in vectors.row if name != gone]
    write_vectors(tmp_path / "b.npz", vectors.embeddings[[vectors.row[name] for name in kept]], kept)
    events: list[Event] = []
    run = built(flags, events.append, teacher=of(tmp_path, "npz"))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert f"{tmp_path}/b.npz: no embedding of 1 train image, first {gone}: they are left out" in notes
    assert run.started.splits[0].images == len(names_of(flags, "train")) - 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"teacher": "{a}.npz,{b}.safetensors"}, r"b.safetensors: is a network, and .*a.npz is a vectors file. Write"),
        ({"teacher": "{a}.npz,{b}.npz", "mixup": "1"}, r"--mixup: .*a.npz is a vectors file"),
        ({"teacher": "{a}.npz,{a}.npz"}, "a.npz is given twice"),
        ({"at_ratio": "1"}, "--at-ratio: compares feature maps, of one teacher only. Omit the others"),
        ({"combine": "averaged", "csd_ratio": "1"}, "--csd-ratio: needs one space of all teachers"),
        ({"teacher_weights": "w.pth"}, "--teacher-weights: there are several teachers"),
        ({"teacher": "{a}.npz,{run}/c.npz"}, "--save-dir .*run: contains the teacher .*c.npz"),
        ({"teacher": "{a}.npz,there"}, "there: no such file or folder"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be_combined_are_one_line(flags: Flags, tmp_path: Path, more: Flags, says: str) -> None:
    write_files(flags, tmp_path)
    places = {name: str(tmp_path / name) for name in ("a", "b", "run")}
    with pytest.raises(RkdError, match=says):
        built(flags, **{name: str(value).format(**places) for name, value in more.items()})


def test_files_of_different_images_are_one_line(flags: Flags, tmp_path: Path) -> None:
    write_files(flags, tmp_path)
    train_names, eval_names = names_of(flags, "train"), names_of(flags, "eval")
    half = len(train_names) // 2
    for name, own in (("a", train_names[:half]), ("b", train_names[half:])):
        own = [*own, *eval_names]
        write_vectors(tmp_path / f"{name}.npz", np.random.default_rng(1).normal(size=(len(own), 4)), own)
    with pytest.raises(RkdError, match=r"b.npz: has no embedding of the train images"):
        built(flags, teacher=of(tmp_path, "npz"))


def test_a_file_may_have_a_comma_in_its_name(flags: Flags, tmp_path: Path) -> None:
    write_files(flags, tmp_path)
    (tmp_path / "a.npz").rename(tmp_path / "a,b.npz")
    settings = resolve(DistillSettings, flags | {"teacher": str(tmp_path / "a,b.npz")})
    assert settings.teachers == (str(tmp_path / "a,b.npz"),)
    (config := tmp_path / "run.toml").write_text('teacher = ["x.npz", "y.npz"]\n')
    assert resolve(DistillSettings, {}, config).teachers == ("x.npz", "y.npz")
    assert resolve(DistillSettings, {"teacher": " x.npz, y.npz,"}).teacher == "x.npz,y.npz"


def blind_teachers(folder: Path) -> list[float]:
    """Photos whose class is the hue of their left part, and two teachers that each tell half of the hues apart.

    Returns the Recall@1 of each teacher on the evaluation classes.
    """
    draws = np.random.default_rng(0)
    names: list[str] = []
    rows: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for split, count, shift in (("train", 16, 0.0), ("eval", 8, 0.25)):
        for label, number in itertools.product(range(count), range(6)):
            hue, names = (label + shift) / count, [*names, f"{split}/{split}{label:02d}/{number}.png"]
            pixels = np.empty((32, 32, 3), np.uint8)
            pixels[:, :24] = 255 * np.array(colorsys.hsv_to_rgb(hue, 1, 1))
            pixels[:, 24:] = 255 * np.array(colorsys.hsv_to_rgb(draws.random(), 1, 1))
            path = folder / "photos" / names[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            for name, sees in (("a", hue < 0.5), ("b", hue >= 0.5)):
                angle = 2 * np.pi * hue
                row = np.array([np.cos(angle), np.sin(angle), 0] if sees else [0, 0, 1])
                rows[name].append(row + 0.03 * draws.normal(size=3))
    found = []
    for name, own in rows.items():
        write_vectors(folder / f"{name}.npz", np.array(own, np.float32), names)
        evaluated = torch.tensor(np.array(own[-48:]))
        found.append(recall_at_k(evaluated, torch.arange(48) // 6, [1])[1])
    return found


def test_a_student_beats_two_teachers_that_are_blind_to_half_of_the_classes(tmp_path: Path) -> None:
    each = blind_teachers(tmp_path)
    flags: Flags = {
        "data": str(tmp_path / "photos"), "dataset": "folder", "teacher": of(tmp_path, "npz"), "weights": "none",
        "base": "shufflenet_v2_x0_5", "embedding_size": "8", "resize": "32", "image_size": "32", "batch": "36",
        "num_image_per_class": "3", "iter_per_epoch": "45", "epochs": "2", "eval_every": "2", "eval_train": False,
        "lr": "3e-3", "workers": "0", "device": "cpu", "cache": "device",
        "cache_dir": str(tmp_path / "cache"), "save_dir": str(tmp_path / "run"),
    }  # fmt: skip
    events: list[Event] = []
    train(built(flags), events.append)
    (joint,) = (event.figures["eval"]["R@1"] for event in events if isinstance(event, TeacherEvaluated))
    first, last = (e.figures["eval"]["R@1"] for e in events if isinstance(e, EpochDone) and e.figures)
    assert max(*each, first) < 0.8 < 0.9 < last
    assert joint > 0.95
