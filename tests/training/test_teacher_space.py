"""One space for student and teacher: how the teacher's embeddings are scaled, what is measured, what a file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rkd_cli.data import load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.vectors import read_vectors, write_vectors
from rkd_cli.events import Event, Note, silent
from rkd_cli.metrics import agreement
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run

Flags = dict[str, str | bool]
NONE: Flags = {"dist_ratio": "0", "angle_ratio": "0"}
SCALED = "scaled to unit length for all losses and figures"
OPEN = "--no-l2normalize: only directions count"
UNIT = "--l2normalize: student embeddings get unit length, because only directions count for"


@pytest.fixture
def student(quick: Flags, tmp_path: Path) -> Flags:
    """Flags of a student of ``tmp_path / "v.npz"``."""
    shared = {name: value for name, value in quick.items() if name != "sample"}
    return shared | NONE | {"teacher": str(tmp_path / "v.npz"), "save_dir": str(tmp_path / "student")}


def rows_at(path: Path, data: str | bool, size: int = 8, unit: bool = False) -> np.ndarray:
    """(N, size) rows of very different lengths, or of 1; in a file, the training images first."""
    splits = load_dataset("cub200", Path(str(data)))
    names = [name for split in splits for name in relative_names(split.paths, Path(str(data)))]
    rows = np.random.default_rng(0).normal(size=(len(names), size)).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows *= 1 / lengths if unit else np.random.default_rng(1).uniform(0.2, 9, (len(names), 1)).astype(np.float32)
    write_vectors(path, rows, names)
    return rows


def built(flags: Flags, **more: str | bool) -> tuple[Run, list[str]]:
    events: list[Event] = []
    run = build_run(resolve(DistillSettings, flags | more), events.append)
    return run, [event.text for event in events if isinstance(event, Note)]


def taught(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """What the teacher makes of the first batch, and of the training images as they are measured."""
    assert run.teacher is not None
    batch, images = next(run.loader.epoch(1)), run.evaluation["train"]
    return run.teacher.view(batch.images, batch, False).embeddings, run.teacher.embed(
        images.images, images, silent, ""
    )[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"csd_ratio": "1"}, "--csd-ratio"),
        ({"queue_ratio": "1", "pkt_ratio": "1"}, "--pkt-ratio, --queue-ratio"),
        ({"d3_ratio": "1", "dist_ratio": "1"}, "--d3-ratio"),
        ({"match_ratio": "1"}, "--match-ratio"),
        ({"relaxed_ratio": "1"}, "--relaxed-ratio"),
        ({"match_ratio": "1", "match_kind": "squared"}, None),
        ({"dist_ratio": "1"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_losses_of_directions_have_the_teacher_at_unit_length_throughout(
    student: Flags, tmp_path: Path, more: Flags, says: str | None
) -> None:
    rows = rows_at(tmp_path / "v.npz", student["data"])
    run, notes = built(student, **more)
    expected = rows[: len(run.evaluation["train"].images)]
    if says:
        expected = (expected / np.linalg.norm(expected.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    batch = next(run.loader.epoch(1))
    view, measured = taught(run)
    assert np.array_equal(view.numpy(), expected[batch.index])
    assert np.array_equal(measured.numpy(), expected)
    assert [note for note in notes if SCALED in note] == (
        [f"the teacher's embeddings are {SCALED}, because only directions count for {says}"] if says else []
    )
    in_space = "match_ratio" in more or not {"dist_ratio", "relaxed_ratio"} >= more.keys()
    assert run.header.teacher_space == (None if not in_space else "unit" if says else "given")
    assert run.header.teacher_size == (8 if in_space else None)


def test_rows_of_unit_length_stay_as_they_are(student: Flags, tmp_path: Path) -> None:
    rows = rows_at(tmp_path / "v.npz", student["data"], unit=True)
    run, notes = built(student, csd_ratio="1")
    assert np.array_equal(taught(run)[1].numpy(), rows[: len(run.evaluation["train"].images)])
    assert not [note for note in notes if SCALED in note]


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_smaller_rows_of_unit_length_are_a_teacher_of_unit_length(student: Flags, tmp_path: Path, kind: str) -> None:
    rows = rows_at(tmp_path / "v.npz", student["data"], unit=True)
    write_vectors(tmp_path / "v.npz", rows, list(read_vectors(tmp_path / "v.npz").row), None, kind, unit=True)
    run, notes = built(student, csd_ratio="1")
    measured = taught(run)[1]
    assert measured.norm(dim=1) == pytest.approx(1, abs=1e-3)
    assert measured.numpy() == pytest.approx(rows[: len(measured)], abs=0.01)
    assert not [note for note in notes if SCALED in note]
    assert run.started.teacher
    assert run.started.teacher.l2normalize


@pytest.mark.parametrize("views", ["0", "2"])
def test_a_network_without_unit_length_teaches_directions_too(student: Flags, tmp_path: Path, views: str) -> None:
    model = build_model("shufflenet_v2_x0_5", 8, l2normalize=False)
    save_model(tmp_path / "t.safetensors", model.state_dict(), header_of(model, "shufflenet_v2_x0_5", 36, 32, "cub200"))
    more: Flags = {"teacher": str(tmp_path / "t.safetensors"), "teacher_views": views}
    scaled, raw = taught(built(student, **more, d3_ratio="1")[0]), taught(built(student, **more, dist_ratio="1")[0])
    for ours, theirs in zip(scaled, raw, strict=True):
        assert not torch.allclose(theirs.norm(dim=1), torch.ones(len(theirs)), atol=0.1)
        torch.testing.assert_close(ours, F.normalize(theirs), atol=1e-6, rtol=1e-5)


def test_a_perfect_student_agrees_wholly(student: Flags, tmp_path: Path) -> None:
    """With the directions of the teacher, which are all that CSD sees."""
    rows = torch.from_numpy(rows_at(tmp_path / "v.npz", student["data"]))
    run, _ = built(student, csd_ratio="1", labels=False)
    perfect, target = F.normalize(rows[: len(run.evaluation["train"].images)]), taught(run)[1]
    assert agreement(perfect, target)["overlap@10"] == 1
    assert agreement(perfect, rows[: len(perfect)])["overlap@10"] < 0.8


@pytest.mark.parametrize(
    ("more", "unit", "says"),
    [
        ({"csd_ratio": "1"}, True, f"{UNIT} --csd-ratio"),
        ({"match_ratio": "1", "pkt_ratio": "1"}, True, f"{UNIT} --pkt-ratio, --match-ratio"),
        ({"csd_ratio": "1", "l2normalize": False}, False, f"{OPEN} for --csd-ratio"),
        ({"csd_ratio": "1", "dist_ratio": "1"}, False, f"{OPEN} for --csd-ratio"),
        ({"csd_ratio": "1", "triplet_ratio": "1"}, False, f"{OPEN} for --csd-ratio"),
        ({"csd_ratio": "1", "l2normalize": True}, True, None),
        ({"match_ratio": "1", "match_kind": "squared"}, False, None),
        ({"relaxed_ratio": "1"}, False, None),
        ({"dist_ratio": "1"}, False, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_student_of_directions_alone_has_unit_length_unless_a_flag_says_otherwise(
    student: Flags, tmp_path: Path, more: Flags, unit: bool, says: str | None
) -> None:
    rows_at(tmp_path / "v.npz", student["data"])
    run, notes = built(student, **more)
    assert run.model.l2normalize == run.header.l2normalize == unit
    told = [note for note in notes if "l2normalize" in note]
    assert len(told) == bool(says)
    assert all(note.startswith(says or "") for note in told)


@pytest.mark.parametrize("loss", ["proxy_anchor", "l2_triplet"])
def test_a_teacher_without_unit_length_is_told_what_its_figures_are(quick: Flags, loss: str) -> None:
    events: list[Event] = []
    build_run(resolve(TeacherSettings, quick | {"loss": loss, "l2normalize": False}), events.append)
    told = [event.text for event in events if isinstance(event, Note) and OPEN in event.text]
    assert len(told) == (loss == "proxy_anchor")


@pytest.mark.parametrize("kind", ["cosine", "squared"])
def test_the_projection_is_measured_through_and_stored(student: Flags, tmp_path: Path, kind: str) -> None:
    rows = rows_at(tmp_path / "v.npz", student["data"], size=5)
    more: Flags = {"match_ratio": "1", "match_kind": kind, "labels": False, "matryoshka": "4", "iter_per_epoch": "3"}
    run, _ = built(student, **more)
    events: list[Event] = []
    train(run, events.append)
    file = tmp_path / "student/last.safetensors"
    header, model = read_header(file), load_model(file)
    how = "unit" if kind == "cosine" else "given"
    assert (header.teacher_space, header.teacher_size, header.projections) == (how, 5, (4, 8))
    of_loss = {weight.shape[1]: weight.detach() for weight in run.losses.parameters()}
    assert model.teacher_space is not None
    assert {*of_loss} == {*model.teacher_space.projections} == {4, 8}
    assert all(torch.equal(model.teacher_space.projections[size], weight) for size, weight in of_loss.items())
    assert "projection.8" not in model.state_dict()

    images = run.evaluation["eval"]
    own, _ = embed(model, images, len(images.images), run.context, silent, "")
    queries, gallery = (
        (own.double() @ of_loss[8].double().T).numpy(),
        rows[len(run.evaluation["train"].images) :].astype(np.float64),
    )
    if kind == "cosine":
        queries, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery))
    hits = {1: 0, 10: 0}
    for i in range(len(gallery)):
        others = [j for j in range(len(gallery)) if j != i]
        (wanted,) = sorted(others, key=lambda j: np.linalg.norm(gallery[j] - gallery[i]))[:1]
        found = sorted(others, key=lambda j: np.linalg.norm(gallery[j] - queries[i]))
        for k in hits:
            hits[k] += wanted in found[:k]
    last = [event for event in events if isinstance(event, EpochDone)][-1].figures["eval"]
    assert {name: last[name] for name in last if "asym" in name} == {
        f"asymmetric@{k}": count / len(gallery) for k, count in hits.items()
    }


def test_a_student_that_starts_from_another_takes_its_network_alone(student: Flags, tmp_path: Path) -> None:
    rows_at(tmp_path / "v.npz", student["data"], size=5)
    train(built(student, match_ratio="1")[0], silent)
    load: Flags = {"load": str(tmp_path / "student/last.safetensors"), "save_dir": str(tmp_path / "next")}
    run, _ = built(student, **load, l2normalize=True, dist_ratio="1")
    assert (run.model.teacher_space, run.header.teacher_space, run.header.projections) == (None, None, ())
