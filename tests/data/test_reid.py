"""Sets with queries and a gallery, as miniatures in their published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_cli.data import ImageSet, find_dataset, hold_out, load_dataset
from rkd_cli.data.sets.listing import without_answer
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note
from trees import touch

Make = Callable[[Path], None]


def market(root: Path) -> None:
    touch(root, *(f"bounding_box_train/{n:04}_c{c}s1_000451_03.jpg" for n in (2, 7, 10, 11) for c in (1, 2)))
    touch(root, "query/0001_c1s1_001051_00.jpg", "query/0003_c2s1_000151_00.jpg", "query/Thumbs.db")
    touch(root, *(f"bounding_box_test/{name}s1_000_01.jpg" for name in (
        "-1_c1", "-1_c3", "0000_c1", "0000_c2", "0001_c1", "0001_c6", "0003_c1"
    )))  # fmt: skip


def veri(root: Path) -> None:
    parts = {
        "train": ["0002_c002_00030600_0.jpg", "0002_c003_00030605_1.jpg", "0006_c002_00031600_0.jpg"],
        "query": ["0005_c003_00077625_0.jpg"],
        "test": ["0005_c003_00077625_0.jpg", "0005_c009_00077725_0.jpg", "0009_c003_00078000_0.jpg"],
    }
    for part, names in parts.items():
        touch(root, *(f"image_{part}/{name}" for name in names))
        (root / f"name_{part}.txt").write_text("\n".join(names) + "\n")
        items = "".join(
            f'<Item imageName="{name}" vehicleID="{name[:4]}" cameraID="{name[5:9]}" colorID="1" typeID="4" />'
            for name in names
        )
        if part != "query":
            xml = f'<?xml version="1.0" encoding="gb2312"?><TrainingImages><Items>{items}</Items></TrainingImages>'
            (root / f"{part}_label.xml").write_text(xml)


def msmt(root: Path) -> None:
    lists = {
        "train": [("0000", "01"), ("0000", "02"), ("0001", "03"), ("0001", "05")],
        "val": [("0000", "04"), ("0001", "07")],
        "query": [("0000", "01")],
        "gallery": [("0000", "02"), ("0001", "03")],
    }
    for name, images in lists.items():
        half = "train" if name in ("train", "val") else "test"
        paths = [f"{n}/{n}_00{i}_{c}_0303morning_0015_0.jpg" for i, (n, c) in enumerate(images)]
        touch(root, *(f"{half}/{path}" for path in paths))
        (root / f"list_{name}.txt").write_text("\n".join(f"{path} {int(path[:4])}" for path in paths))


def inshop(root: Path, images: str = "img", where: str = "") -> None:
    rows = [
        ("id_00000001", "02_1_front", "train"), ("id_00000001", "02_2_side", "train"),
        ("id_00000002", "01_1_front", "query"), ("id_00000002", "01_3_back", "gallery"),
        ("id_00000003", "01_1_front", "query"), ("id_00000004", "03_1_front", "gallery"),
    ]  # fmt: skip
    names = [f"img/WOMEN/Dresses/{item}/{name}.jpg" for item, name, _ in rows]
    touch(root / images.removesuffix("img"), *names)
    lines = [f"{name}  {item} {part}" for name, (item, _, part) in zip(names, rows, strict=True)]
    path = root / where / "list_eval_partition.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([str(len(rows)), "image_name item_id evaluation_status", *lines]))


def listed(images: ImageSet) -> list[tuple[str, str]]:
    """(class, role) of each image."""
    assert images.labels is not None
    roles = images.roles or ("",) * len(images)
    return [(images.classes[label], role) for label, role in zip(images.labels, roles, strict=True)]


def test_market_1501_is_read_without_junk_and_with_distractors(tmp_path: Path) -> None:
    market(tmp_path)
    assert find_dataset(tmp_path) == "market1501"
    events: list[Event] = []
    train, evaluation = load_dataset("market1501", tmp_path, events.append)
    assert (len(train), train.classes, train.cameras) == (8, ("0002", "0007", "0010", "0011"), (0, 1) * 4)
    assert listed(evaluation) == [
        ("0001", "query"), ("0003", "query"), ("0000", "gallery"), ("0000", "gallery"), ("0001", "gallery"),
        ("0001", "gallery"), ("0003", "gallery"),
    ]  # fmt: skip
    assert evaluation.cameras == (0, 1, 0, 1, 0, 2, 0)
    assert without_answer(evaluation) == []
    texts = [event.text for event in events if isinstance(event, Note)]
    assert texts == [f"{tmp_path}/bounding_box_test: 2 junk images with the identity -1 are left out"]
    assert (evaluation.facts.queries, evaluation.facts.gallery, evaluation.facts.cameras) == (2, 5, 3)


def test_veri_776_is_read_by_its_names_and_checked_by_its_labels(tmp_path: Path) -> None:
    veri(tmp_path)
    assert find_dataset(tmp_path) == "veri776"
    train, evaluation = load_dataset("veri776", tmp_path)
    assert listed(train) == [("0002", ""), ("0002", ""), ("0006", "")]
    assert listed(evaluation) == [("0005", "query"), ("0005", "gallery"), ("0005", "gallery"), ("0009", "gallery")]
    assert evaluation.cameras == (0, 0, 1, 0)  # the query's copy in the gallery is of its camera
    path = tmp_path / "test_label.xml"
    path.write_text(path.read_text().replace('cameraID="c009"', 'cameraID="c001"'))
    with pytest.raises(DataError, match=r"test_label.xml: 0005_c009.* has vehicle 0005 and camera c001"):
        load_dataset("veri776", tmp_path)
    path.write_text("<Items>")
    with pytest.raises(DataError, match=r"test_label.xml: not XML"):
        load_dataset("veri776", tmp_path)


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_is_read_by_its_lists(tmp_path: Path, folders: tuple[str, str]) -> None:
    msmt(tmp_path)
    for name, other in zip(("train", "test"), folders, strict=True):
        (tmp_path / name).rename(tmp_path / other)
    assert find_dataset(tmp_path) == "msmt17"
    train, evaluation = load_dataset("msmt17", tmp_path)
    assert (listed(train), train.cameras) == ([("0", ""), ("0", ""), ("1", ""), ("1", "")], (0, 1, 2, 3))
    assert listed(hold_out(train)[1]) == [("0", ""), ("1", "")]
    assert listed(evaluation) == [("test-0", "query"), ("test-0", "gallery"), ("test-1", "gallery")]
    assert evaluation.cameras == (0, 1, 2)


@pytest.mark.parametrize(("images", "where"), [("img", ""), ("Img/img", "Eval"), ("img", "Eval")])
def test_in_shop_is_read_by_its_partition(tmp_path: Path, images: str, where: str) -> None:
    inshop(tmp_path / "In-Shop", images, where)
    assert find_dataset(tmp_path) == "inshop"
    train, evaluation = load_dataset("inshop", tmp_path)
    assert listed(train) == [("id_00000001", "")] * 2
    assert [(name[-1], role) for name, role in listed(evaluation)] == [
        ("2", "query"), ("3", "query"), ("2", "gallery"), ("4", "gallery"),
    ]  # fmt: skip
    assert (evaluation.cameras, without_answer(evaluation)) == (None, [1])


BROKEN: dict[str, tuple[Make, str, str, str]] = {
    "name": (market, "query/0003_c2s1_000151_00.jpg", "", "000151_00.jpg does not begin with identity and camera"),
    "queries": (market, "query/", "", "has no queries"),
    "image": (veri, "image_test/0009_c003_00078000_0.jpg", "", "1 of 3 images are missing"),
    "line": (msmt, "list_query.txt", "0000.jpg\n", 'list_query.txt, line 1: expected "0/'),
    "status": (inshop, "list_eval_partition.txt", "1\nimg/a.jpg id_1 test\n", "line 2: expected"),
    "outside": (inshop, "list_eval_partition.txt", "1\n../a.jpg id_1 train\n", "is outside of this folder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_copy_lacks_is_one_line(tmp_path: Path, what: str) -> None:
    make, name, content, says = BROKEN[what]
    make(tmp_path)
    if content:
        (tmp_path / name).write_text(content)
    else:
        for path in [*(tmp_path / name).glob("*")] or [tmp_path / name]:
            path.unlink()
    if what == "name":
        touch(tmp_path, "query/000151_00.jpg")
    with pytest.raises(DataError, match=says) as error:
        load_dataset("auto", tmp_path)
    assert len(error.value.problems) == 1
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["market1501", "veri776", "msmt17", "inshop"])
def test_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not hold"):
        load_dataset(name, tmp_path)


def test_market_1501_is_measured_by_its_rule(tmp_path: Path, rkd: Callable[..., tuple[int, str, str]]) -> None:
    """A vectors file puts every image on a line, so that the figures are counted by hand."""
    market(tmp_path / "m")
    places = {
        "query/0001_c1s1_001051_00.jpg": 0, "query/0003_c2s1_000151_00.jpg": 10,
        "-1_c1": 0, "-1_c3": 10, "0000_c1": 3, "0000_c2": 30, "0001_c1": 0, "0001_c6": 4, "0003_c1": 9,
    }  # fmt: skip
    paths = [str(p.relative_to(tmp_path / "m")) for p in sorted((tmp_path / "m").rglob("*.jpg"))]
    values = [next((at for key, at in places.items() if key in path), 50) for path in paths]
    np.savez(tmp_path / "v.npz", embeddings=np.array(values, np.float32)[:, None] + 100, paths=np.array(paths))
    for path in paths:
        Image.new("RGB", (8, 16)).save(tmp_path / "m" / path)
    flags = ("--data", tmp_path / "m", "--workers", "0", "--quiet")
    code, out, err = rkd("evaluate", tmp_path / "v.npz", *flags, "--recall", "1,2", "--json")
    assert code == 0, err
    found = json.loads(out)
    # 0001_c1: junk and its own camera are out, the distractor at 3 comes before 0001_c6 at 4; 0003_c2: 0003_c1 at 9
    assert found["eval_recall"] == {"1": 0.5, "2": 1.0}
    assert (found["eval_map"], found["eval_minp"]) == (0.75, 0.75)
    assert (found["eval_queries"], found["eval_gallery"], found["eval_without_positive"]) == (2, 5, 0)
    code, out, err = rkd("evaluate", tmp_path / "v.npz", *flags)
    assert code == 0, err
    assert "mINP" in out
    code, out, err = rkd("check-data", "--data", tmp_path / "m", "--workers", "0")
    assert code == 0, err
    assert "7 images of 3 classes evaluate (2 queries, 5 in the gallery, 3 cameras)" in out
