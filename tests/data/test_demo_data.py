"""The drawn birds: the same everywhere, laid out as CUB, hard for pixels, and never half written."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rkd_cli.data.sets import birds, demo
from rkd_cli.data.sets.birds import VERSION, draw_bird, make_species
from rkd_cli.data.sets.cub200 import load_listed
from rkd_cli.data.sets.demo import load_demo, make_demo
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Event, Progress

DIGEST = "3e2558f293fc7cbc"  # of digest() at VERSION 1, Pillow 13


def digest() -> str:
    pixels = [draw_bird(make_species(i), random.Random(f"test {i}"), 24).tobytes() for i in range(6)]
    return hashlib.sha256(b"".join(pixels)).hexdigest()[:16]


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_layout_is_that_of_cub(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "demo"
    events: list[Event] = []
    assert make_demo(root, species=6, images=3, size=16, report=events.append) == root

    images = (root / "images.txt").read_text().splitlines()
    labels = (root / "image_class_labels.txt").read_text().splitlines()
    classes = (root / "classes.txt").read_text().splitlines()
    name = make_species(0).name.replace(" ", "_")
    assert (len(images), len(labels), len(classes)) == (18, 18, 6)
    assert images[0] == f"1 001.{name}/{name}_0001.jpg"
    assert (labels[0], labels[3], labels[-1]) == ("1 1", "4 2", "18 6")
    assert classes[0] == f"1 001.{name}"
    for line, label in zip(images, labels, strict=True):
        path = line.split(" ")[1]
        assert int(path[:3]) == int(label.split(" ")[1])
        with Image.open(root / "images" / path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (16, 16))
    assert {path.name for path in root.iterdir()} == demo.OURS
    assert {path.name for path in root.parent.iterdir() if path.suffix != ".lock"} == {"demo"}
    assert all(isinstance(event, Progress) for event in events)
    assert events[-1] == Progress(what="Drawing", done=18, total=18, unit="images")


def test_the_halves_share_no_species(tmp_path: Path) -> None:
    root = make_demo(tmp_path / "demo", species=6, images=2, size=16)
    train, evaluation = load_listed(root, "")
    assert (len(train), len(evaluation)) == (6, 6)
    assert not set(train.classes) & set(evaluation.classes)


def test_names_do_not_repeat() -> None:
    most = len(birds.ADJECTIVES) * len(birds.FAMILIES)
    assert len({make_species(index).name for index in range(most)}) == most


def test_every_process_draws_the_same_pixels() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_demo_data as t; print(t.digest())"
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert digest() == other


def test_the_pixels_are_those_on_record() -> None:
    assert digest() == DIGEST, "the pictures changed: raise demo.VERSION, then record the new digest"


def test_a_picture_does_not_depend_on_the_size_of_the_set(tmp_path: Path) -> None:
    few = make_demo(tmp_path / "few", species=2, images=1, size=16)
    many = make_demo(tmp_path / "many", species=4, images=2, size=16)
    for path in few.rglob("*.jpg"):
        assert path.read_bytes() == (many / path.relative_to(few)).read_bytes()


def test_pixels_alone_retrieve_poorly() -> None:
    species, images = 24, 10
    drawn = [
        draw_bird(make_species(24 + s), random.Random(f"test {s} {i}"), 32)
        for s in range(species)
        for i in range(images)
    ]
    x = np.stack([np.asarray(image, dtype=np.float64).ravel() for image in drawn])  # (240, 3072)
    squares = (x * x).sum(1)
    distance = squares[:, None] + squares - 2 * x @ x.T  # (240, 240)
    np.fill_diagonal(distance, np.inf)
    label = np.arange(species * images) // images
    assert (label[distance.argmin(1)] == label).mean() < 0.15  # chance is 0.04


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    root = make_demo(tmp_path / "demo", species=2, images=2, size=16)
    before, events = times(tmp_path), list[Event]()
    make_demo(root, species=2, images=2, size=16, report=events.append)
    assert times(tmp_path) == before
    assert events == []


@pytest.mark.parametrize("other", [{"species": 4}, {"images": 1}, {"size": 12}])
def test_another_request_rebuilds(tmp_path: Path, other: dict[str, Any]) -> None:
    first: dict[str, Any] = {"species": 2, "images": 2, "size": 16}
    root = make_demo(tmp_path / "demo", **first)
    make_demo(root, **(first | other))
    assert json.loads((root / "demo.json").read_text()) == first | other | {"version": VERSION}
    assert len(list(root.rglob("*.jpg"))) == (first | other)["species"] * (first | other)["images"]
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"demo"}


def test_another_version_rebuilds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_demo(tmp_path / "demo", species=2, images=1, size=16)
    monkeypatch.setattr(demo, "VERSION", VERSION + 1)
    make_demo(root, species=2, images=1, size=16)
    assert json.loads((root / "demo.json").read_text())["version"] == VERSION + 1


@pytest.mark.parametrize("name, text", [("thesis.tex", "years"), ("demo.json", "no json"), ("demo.json", "{}")])
def test_a_strangers_folder_is_refused(tmp_path: Path, name: str, text: str) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    (root / name).write_text(text)
    with pytest.raises(DataError, match="another folder"):
        make_demo(root, species=2, images=1, size=16)
    assert (root / name).read_text() == text
    assert len(list(tmp_path.rglob("*"))) == 2


def test_a_strangers_file_within_the_set_is_kept(tmp_path: Path) -> None:
    root = make_demo(tmp_path / "demo", species=2, images=1, size=16)
    (root / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="another folder"):
        make_demo(root, species=4, images=1, size=16)
    assert (root / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(DataError, match="another folder"):
        make_demo(tmp_path / "demo", species=2, images=1, size=16)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert len(list(make_demo(tmp_path / "demo", species=2, images=1, size=16).rglob("*.jpg"))) == 2


@pytest.mark.parametrize("error, raised", [(OSError("full"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    root = make_demo(tmp_path / "demo", species=2, images=1, size=16)
    before = times(root)

    def fail(*_: object) -> Image.Image:
        raise error

    monkeypatch.setattr(demo, "draw_bird", fail)
    for place in (root, tmp_path / "new"):
        with pytest.raises(raised):
            make_demo(place, species=4, images=1, size=16)
    assert times(root) == before
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"demo"}


@pytest.mark.parametrize("wrong", [{"species": 1}, {"species": 10_000}, {"images": 0}, {"size": 4}])
def test_a_set_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="species"):
        make_demo(tmp_path / "demo", **wrong)
    assert not list(tmp_path.iterdir())


def test_the_set_is_drawn_where_the_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "draw_bird", lambda species, rng, size: Image.new("RGB", (8, 8)))
    train, evaluation = load_demo(tmp_path)
    assert (len(train), len(evaluation), len(train.classes)) == (1280, 1280, 40)
    assert train.paths[0].is_relative_to(tmp_path / "demo-birds")
