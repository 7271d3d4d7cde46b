"""Lists with queries, gallery, cameras and boxes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_cli.data import ImageSet, hold_out, load_dataset
from rkd_cli.data.cache import cache_path, read_cache
from rkd_cli.data.decode import load_resized
from rkd_cli.data.sets.pair import load_pair
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note, silent

Rkd = Callable[..., tuple[int, str, str]]
COLUMNS = ("path", "label", "split", "role", "camera")
ROWS: list[tuple[object, ...]] = [
    ("0.png", "a", "train", "", 1), ("1.png", "a", "train", "", 2), ("2.png", "b", "train", "", 1),
    ("3.png", "b", "train", "", 2), ("4.png", "x", "eval", "query", 1), ("5.png", "x", "eval", "gallery", 1),
    ("6.png", "x", "eval", "gallery", 2), ("7.png", "y", "eval", "both", 1), ("8.png", "y", "eval", "Gallery", 3),
    ("9.png", "z", "eval", "query", 2), ("10.png", "-1", "eval", "gallery", 2),
]  # fmt: skip


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    else:
        quoted = [",".join(f'"{value}"' for value in row) for row in rows]
        path.write_text("\n".join([",".join(columns), *quoted]) + "\n")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(12):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def notes_of(path: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    events: list[Event] = []
    train, evaluation = load_dataset("list", path, events.append)
    return train, evaluation, [event.text.partition(": ")[2] for event in events if isinstance(event, Note)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("group", ["camera", "group"])
def test_roles_and_cameras_are_those_of_the_list(photos: Path, suffix: str, group: str) -> None:
    path = write(photos / f"list{suffix}", (*COLUMNS[:4], group), ROWS)
    train, evaluation, notes = notes_of(path)
    assert (train.roles, train.cameras) == (None, (0, 1, 0, 1))
    assert evaluation.roles == ("query", "gallery", "gallery", "both", "gallery", "query")
    assert (evaluation.cameras, evaluation.classes) == ((0, 0, 1, 0, 2, 1), ("x", "y", "z"))
    assert notes == [
        "1 images with the label -1 (junk) are left out",
        "1 of 3 eval queries have no image of their label in the gallery from another camera and are left out, first "
        f"line {11 if suffix == '.csv' else 10}",
    ]
    protocol = evaluation.protocol
    assert protocol and protocol.cameras is not None
    assert (protocol.queries.tolist(), protocol.gallery.tolist()) == ([0, 3, 5], [1, 2, 3, 4])


def test_roles_stay_with_their_images(photos: Path) -> None:
    train, evaluation, _ = notes_of(write(photos / "list.csv", COLUMNS, ROWS))
    left = evaluation.without(evaluation.paths[:2])
    assert (left.roles, left.cameras) == (("gallery", "both", "gallery", "query"), (1, 0, 2, 1))
    assert evaluation.without_labels().protocol is None
    assert load_dataset("list", write(photos / "plain.csv", COLUMNS[:3], [r[:3] for r in ROWS]))[1].protocol is None
    wide = replace(train, labels=(0, 1, 2, 3), classes=("a", "b", "c", "d"))
    assert hold_out(wide)[1].cameras == (0, 1)


BAD: dict[str, tuple[tuple[str, ...], list[tuple[object, ...]], str]] = {
    "role": (COLUMNS, [*ROWS[:4], ("4.png", "x", "eval", "probe", 1)], "line 6: unknown role 'probe'. Use query"),
    "hole": (COLUMNS, [*ROWS[:4], ("4.png", "x", "eval", "query", "")], "line 6: no camera. Fill it"),
    "both": ((*COLUMNS, "group"), [(*r, 1) for r in ROWS], "has the columns camera and group"),
    "label": (("path", "role"), [("0.png", "query")], "no column label"),
    "answers": (COLUMNS, [*ROWS[:4], ROWS[4], ROWS[5]], "line 6: 1 of 1 eval queries have no image of their label"),
    "queries": (COLUMNS, [*ROWS[:4], ROWS[5], ROWS[6]], "line 1: 0 of 0 eval queries"),
    "box": (("path", "label", "box"), [("0.png", "a", "1,2,3")], "line 2: box '1,2,3' is not x1,y1,x2,y2"),
    "turned": (("path", "label", "box"), [("0.png", "a", "9,2,3,8")], "line 2: box '9,2,3,8' is not"),
    "left": (("path", "label", "box"), [("0.png", "a", "-1,2,3,8")], "line 2: box '-1,2,3,8' is not"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_list_lacks_is_named_with_its_line(photos: Path, what: str) -> None:
    columns, rows, says = BAD[what]
    with pytest.raises(DataError, match=says) as error:
        load_dataset("list", write(photos / "list.csv", columns, rows))
    assert len(error.value.problems) == 1


BOXES: list[tuple[object, ...]] = [
    (f"{n}.png", n // 2, "train" if n < 4 else "eval", "3,2,13,12" if n == 0 else "") for n in range(8)
]


def test_a_box_is_the_part_of_the_upright_image(photos: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(photos / "0.png", exif=exif)
    path = write(photos / "list.csv", ("path", "label", "split", "box"), BOXES)
    train, evaluation = load_dataset("list", path)
    upright = np.rot90(pixels, -1)
    assert np.array_equal(load_resized(train.paths[0], 10, train.decoding), upright[2:12, 3:13])
    assert np.array_equal(load_resized(train.paths[1], 8, train.decoding), load_resized(train.paths[1], 8))
    assert train.decoding == evaluation.decoding
    without = replace(train.decoding, boxes={})
    assert cache_path(tmp_path, train.paths, 8, train.decoding) != cache_path(tmp_path, train.paths, 8, without)
    assert read_cache(tmp_path, train.paths, 8, train.decoding) is None


def test_a_large_jpeg_is_cut_before_it_is_made_smaller(photos: Path) -> None:
    Image.linear_gradient("L").resize((2048, 2048)).save(photos / "0.png", "JPEG", quality=95)
    rows = [("0.png", 0, "train", "0,1024,2048,2048"), *BOXES[1:]]
    train, _ = load_dataset("list", write(photos / "list.csv", ("path", "label", "split", "box"), rows))
    found = load_resized(train.paths[0], 8, train.decoding)
    assert 125 < found.min() < 140


@pytest.mark.parametrize("box", [[3, 2, 13, 12], [3.2, 1.9, 13.0, 12.4], "3, 2, 13, 12"])
def test_a_box_is_text_or_numbers(photos: Path, box: object) -> None:
    rows = [(*BOXES[0][:3], box), *((*row[:3], None) for row in BOXES[1:])]
    train, _ = load_dataset("list", write(photos / "list.jsonl", ("path", "label", "split", "box"), rows))
    assert {path.name: found[:4] for path, found in train.decoding.boxes.items()} == {"0.png": (3, 2, 13, 12)}


def test_a_box_outside_its_image_is_named_with_its_line_when_it_is_decoded(photos: Path, rkd: Rkd) -> None:
    rows = [*BOXES[:5], ("5.png", 2, "eval", "3,2,31,12"), *BOXES[6:]]
    path = write(photos / "list.csv", ("path", "label", "split", "box"), rows)
    code, _, err = rkd("check-data", "--data", path, "--workers", "0", "--quiet")
    assert code == 2
    assert "5.png: cannot be used (its box 3,2,31,12 is outside of its 30 x 20 pixels). Correct line 7" in err


def pair_of(photos: Path, queries: dict[str, str], gallery: dict[str, str]) -> tuple[Path, Path]:
    """Folders ``q`` and ``g`` of class folders: {file: class}."""
    for folder, files in (("q", queries), ("g", gallery)):
        for name, label in files.items():
            (photos / folder / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(photos / folder / label / name)
    return photos / "q", photos / "g"


def test_queries_and_gallery_are_two_folders(photos: Path, rkd: Rkd) -> None:
    q, g = pair_of(photos, {"1.png": "a", "2.png": "b"}, {"3.png": "a", "4.png": "c", "5.png": "b"})
    images = load_pair(q, g)
    assert images.roles == ("query", "query", "gallery", "gallery", "gallery")
    paths = [str(path.relative_to(photos)) for path in images.paths]
    values = {"1": 0, "2": 10, "3": 2, "4": 1, "5": 9}
    write_vectors(photos / "v.npz", np.array([[values[Path(p).stem]] for p in paths], np.float32) + 5, paths)
    flags = ("--query", q, "--gallery", g, "--data", photos, "--workers", "0")
    code, out, err = rkd("evaluate", photos / "v.npz", *flags, "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert (found["eval_recall"]["1"], found["eval_recall"]["2"], found["eval_map"]) == (0.5, 1.0, 0.75)
    assert (found["eval_queries"], found["eval_gallery"], found["train_recall"]) == (2, 3, None)
    code, out, err = rkd("evaluate", photos / "v.npz", *flags)
    assert code == 0, err
    assert "5 images of 3 classes evaluate (2 queries, 3 in the gallery)" in out + err


def test_an_image_in_both_lists_is_not_its_own_answer(photos: Path) -> None:
    path = write(photos / "list.csv", COLUMNS, ROWS)
    images = load_pair(path, path)
    names = dict(zip((p.name for p in images.paths), images.roles or (), strict=True))
    assert names["4.png"] == "query"
    assert names["7.png"] == "both"
    assert names["0.png"] == "both"
    assert len(images) == 10


def test_junk_of_a_pair_is_left_out(photos: Path) -> None:
    q, g = pair_of(photos, {"1.png": "a", "2.png": "-1"}, {"3.png": "a", "4.png": "-1", "5.png": "c"})
    events: list[Event] = []
    images = load_pair(q, g, events.append)
    assert [path.name for path in images.paths] == ["1.png", "3.png", "5.png"]
    assert [event.text for event in events if isinstance(event, Note)] == [
        f"{folder}: 1 images with the label -1 (junk) are left out" for folder in (q, g)
    ]
    rows = [("3.png", "a"), ("4.png", "-1")]
    assert len(load_pair(q, write(photos / "list.csv", ("path", "label"), rows))) == 2


def test_pairs_that_do_not_fit_are_one_line(photos: Path, rkd: Rkd) -> None:
    q, g = pair_of(photos, {"1.png": "a"}, {"3.png": "c"})
    listed = write(photos / "list.csv", COLUMNS, ROWS)

    def line(*flags: object) -> str:
        code, _, err = rkd("evaluate", "x", *flags, "--quiet", "--workers", "0")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        return err

    assert "no query has an image of its label in --gallery" in line("--query", q, "--gallery", g)
    assert "has no cameras, but" in line("--query", q, "--gallery", listed)
    assert "no such folder or list" in line("--query", photos / "n", "--gallery", g)
    assert "--query: has no effect without --gallery" in line("--query", q)
    assert "--dataset: has no effect with --query" in line("--query", q, "--gallery", g, "--dataset", "folder")
    assert "holds images, not embeddings. Add --query" in line("--gallery", g)
    (photos / "e").mkdir()
    assert "holds no gallery images" in line("--query", q, "--gallery", photos / "e")
    other = write(photos / "other.csv", COLUMNS, [("4.png", "w", "eval", "gallery", 1), *ROWS[5:7]])
    with pytest.raises(DataError, match=r"4.png: differs in label"):
        load_pair(listed, other, silent)


def test_a_training_and_its_evaluation_use_the_roles(tiny_set: Path, tmp_path: Path, rkd: Rkd) -> None:
    """Recalls at epoch 0 and in `rkd evaluate` are those of the queries in their gallery."""
    rows = [
        (path, images.classes[label], images.name, "query" if row % 6 < 2 else "gallery", row % 3)
        for images in load_dataset("cub200", tiny_set)
        for row, (path, label) in enumerate(zip(images.paths, images.labels or (), strict=True))
    ]
    path = write(tmp_path / "list.csv", COLUMNS, rows)
    small = "--base shufflenet_v2_x0_5 --embedding-size 8 --weights none --resize 36 --image-size 32"
    short = "--epochs 1 --iter-per-epoch 1 --batch 8 --num-image-per-class 2 --quiet --workers 0"
    common = ("--data", path, "--cache-dir", tmp_path / "cache")
    code, _, err = rkd("train-teacher", *common, "--save-dir", tmp_path / "run", *small.split(), *short.split())
    assert code == 0, err
    code, out, err = rkd("evaluate", tmp_path / "run", *common, "--workers", "0", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    (best,) = (
        row
        for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        if row["epoch"] == found["epoch"]
    )
    assert best["figures"]["eval"] == {f"R@{k}": value for k, value in found["eval_recall"].items()}
    assert (found["eval_queries"], found["eval_gallery"]) == (8, 16)
    assert all(round(8 * value, 9) % 1 == 0 for value in found["eval_recall"].values())  # of 8 queries
    code, _, err = rkd("evaluate", tmp_path / "run", "--query", path, "--gallery", path, "--data", path)
    assert code == 2 and "--data: has no effect with --query, unless a vectors file is measured." in err
