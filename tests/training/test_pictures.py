"""The retrieval picture of an epoch: which images it shows, how they are framed, and that nothing is computed for it
where nobody wants it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.decode import center_crop, load_crops
from rkd_cli.data.loader import EvalLoader, StreamReader
from rkd_cli.events import silent
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.report.picture import RIGHT, WRONG, draw_retrieval
from rkd_cli.screen.loggers import logged
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training import loop
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run

Flags = dict[str, str | bool]
TILE, GAP = 32 + 16, 16  # pixels of an image of 32 with its frame, and between a query and its answers
Shown = list[tuple[int, list[int], list[str]]]  # a query, its answers, and how each is framed


def run_of(flags: Flags, **more: str | bool) -> Run:
    if "teacher" in flags:
        return build_run(resolve(DistillSettings, flags | more), silent)
    return build_run(resolve(TeacherSettings, flags | more), silent)


def logging(run: Run, *kinds: Any) -> None:
    with logged(silent, kinds, "{}") as report:
        train(run, report)


def pictures(directory: Path) -> dict[int, np.ndarray]:
    """{step: (H, W, 3)} of what tensorboard reads."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    images = events.EventAccumulator(str(directory / "tensorboard"), {"images": 0}).Reload().Images("retrieval")
    assert len({image.step for image in images}) == len(images)
    return {image.step: np.array(Image.open(io.BytesIO(image.encoded_image_string))) for image in images}


def crops_of(images: ImageSet) -> Tensor:
    return load_crops(images.paths, [center_crop(row, 36, 32) for row in range(len(images))], 36, 32)


def shown_in(picture: np.ndarray, images: ImageSet) -> Shown:
    """Which images stand where, told by their pixels."""
    known = {crop.permute(1, 2, 0).numpy().tobytes(): row for row, crop in enumerate(crops_of(images))}
    assert len(known) == len(images)
    assert picture.shape == (4 * TILE, 6 * TILE + GAP, 3)
    rows: Shown = []
    for top in range(0, 4 * TILE, TILE):
        lefts = [0, *(GAP + TILE * place for place in range(1, 6))]
        tiles = [picture[top : top + TILE, left : left + TILE] for left in lefts]
        query, *answers = (known[tile[8:-8, 8:-8].tobytes()] for tile in tiles)
        assert frame_of(tiles[0]) == "none"
        rows.append((query, answers, [frame_of(tile) for tile in tiles[1:]]))
    return rows


def frame_of(tile: np.ndarray) -> str:
    corner, edges = tuple(tile[5, 5].tolist()), [tile[5, 4:-4], tile[-6, 4:-4], tile[4:-4, 5], tile[4:-4, -6]]
    whole = all((edge == corner).all() for edge in edges)
    dashed = all(not (edge == corner).all() for edge in edges)
    return {(RIGHT, True, False): "right", (WRONG, False, True): "wrong", ((255, 255, 255), True, False): "none"}[
        (corner, whole, dashed)
    ]


def naive(images: ImageSet, embeddings: Tensor, queries: list[int]) -> Shown:
    rows: Shown = []
    for query in queries:
        distance = {
            row: float((embeddings[row].double() - embeddings[query].double()).norm()) for row in range(len(images))
        }
        near = sorted((row for row in distance if row != query), key=lambda row: distance[row])[:5]
        labels = images.labels
        frames = ["none" if labels is None else "right" if labels[row] == labels[query] else "wrong" for row in near]
        rows.append((query, near, frames))
    return rows


@pytest.fixture
def student(quick: Flags, tmp_path: Path) -> Flags:
    """Flags of a distillation; its teacher is as it was drawn."""
    model = build_model("shufflenet_v2_x0_5", 8, True)
    path = tmp_path / "teacher.safetensors"
    save_model(path, model.state_dict(), header_of(model, "shufflenet_v2_x0_5", 36, 32, "cub200", "eval", ()))
    return {name: value for name, value in quick.items() if name != "sample"} | {"teacher": str(path)}


@pytest.mark.parametrize("kind", ["teacher", "frozen teacher", "student", "student of photos"])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_each_evaluated_epoch_has_a_picture_of_its_own_answers(
    quick: Flags, student: Flags, tmp_path: Path, kind: str, cache: str
) -> None:
    flags: Flags = {"epochs": "3", "eval_every": "2", "iter_per_epoch": "2", "lr": "1e-2", "cache": cache}
    flags |= {"freeze_base": True, "views": "2"} if kind == "frozen teacher" else {}
    flags |= {"labels": False, "sample": ""} if kind == "student of photos" else {}
    flags.pop("sample", None)
    run = run_of((student if kind.startswith("student") else quick) | flags)
    logging(run, "csv", "tensorboard")
    found = pictures(tmp_path / "run")
    assert sorted(found) == [0, 4, 6]  # epochs 0, 2 and 3, two steps each
    images = run.pictured.images
    assert (images.labels is None) == (kind == "student of photos")
    with torch.inference_mode():
        embeddings = load_model(tmp_path / "run/last.safetensors")(crops_of(images))
    shown = {step: shown_in(picture, images) for step, picture in found.items()}
    queries = [query for query, *_ in shown[6]]
    assert shown[6] == naive(images, embeddings, queries)
    assert len({*queries}) == 4
    if images.labels is not None:
        assert len({images.labels[query] for query in queries}) == 4
        assert {frame for *_, frames in shown[6] for frame in frames} == {"right", "wrong"}
    for rows in shown.values():
        assert [query for query, *_ in rows] == queries
    assert shown[0] != shown[6]


def test_a_logger_changes_nothing_and_embeds_nothing_again(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()

    def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(name)
            return inner(*arguments)

        return call

    for name in ("embed", "draw_retrieval"):
        monkeypatch.setattr(loop, name, counted(name, getattr(loop, name)))
    found = {}
    for kinds in ((), ("csv",), ("csv", "tensorboard")):
        directory = tmp_path / "-".join(["run", *kinds])
        done.clear()
        logging(run_of(quick, epochs="2", save_dir=str(directory)), *kinds)
        assert done.count("embed") == 6  # two splits, three times
        assert done.count("draw_retrieval") == (3 if "tensorboard" in kinds else 0)
        found[kinds] = [(directory / name).read_bytes() for name in ("best.safetensors", "last.safetensors")]
    assert found[()] == found["csv",] == found["csv", "tensorboard"]


def test_the_seed_says_which_queries(tiny_set: Path, quick: Flags) -> None:
    images, loader = loader_of(quick)
    embeddings = torch.randn(len(images), 4)
    queries = {
        seed: [query for query, *_ in shown_in(draw_retrieval(loader, embeddings, seed).numpy(), images)]
        for seed in (1, 1, 2, 3)
    }
    assert len({tuple(rows) for rows in queries.values()}) == 3
    assert torch.equal(draw_retrieval(loader, embeddings, 1), draw_retrieval(loader, embeddings, 1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_leave_places_empty(quick: Flags, count: int) -> None:
    images, _ = loader_of(quick)
    few = ImageSet(images.paths[:count], None, (), "eval")
    picture = draw_retrieval(EvalLoader(few, 8, 36, 32, StreamReader(36, 32, 0)), torch.randn(count, 4), 1)
    assert picture.shape == (min(4, count) * TILE, 6 * TILE + GAP, 3)
    assert picture.dtype == torch.uint8
    assert bool((picture[:, GAP + TILE * count :] == 255).all())
    assert not bool((picture[8:-8, GAP + TILE * count - TILE + 8 :] == 255).all())


def test_large_images_are_made_small(quick: Flags) -> None:
    images, _ = loader_of(quick)
    picture = draw_retrieval(EvalLoader(images, 8, 240, 224, StreamReader(240, 224, 0)), torch.randn(len(images), 4), 1)
    assert picture.shape == (4 * 128, 6 * 128 + GAP, 3)
    crops = load_crops(images.paths, [center_crop(row, 240, 224) for row in range(len(images))], 240, 224)
    means = crops.float().view(-1, 3, 112, 2, 112, 2).mean(dim=(3, 5)).round()  # (N, 3, 112, 112)
    first = picture[8:120, 8:120].permute(2, 0, 1).float()
    assert any(torch.equal(first, mean) for mean in means)


def loader_of(quick: Flags) -> tuple[ImageSet, EvalLoader]:
    run = run_of(quick)
    return run.pictured.images, run.pictured
