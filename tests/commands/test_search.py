"""rkd search: what it finds, what its index embeds again, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import rkd_cli
from forked import Forked
from pages import ODD
from rkd_cli import approximate
from rkd_cli.commands import search as module
from rkd_cli.commands.embed import embed_file
from rkd_cli.commands.search import Found, Hit, find_duplicates, pictures_of, search
from rkd_cli.data.cache import clear_caches, list_caches
from rkd_cli.embedding.store import Store
from rkd_cli.embedding.vectors import read_vectors, write_vectors
from rkd_cli.errors import DataError, RkdError, SettingsError
from rkd_cli.events import Event, Note, Progress, silent
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import TeacherSpace, header_of, tensors_of
from rkd_cli.report.found import found_html
from rkd_cli.retrieval import nearest
from rkd_cli.runtime.signals import Stopped
from rkd_cli.screen.found import show_found
from rkd_cli.settings import EmbedSettings, SearchSettings
from rkd_cli.settings.resolve import resolve

NAME = "shufflenet_v2_x0_5"


@cache
def network(unit: bool, seed: int) -> EmbeddingNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(NAME, 8, unit).train()
        for _ in range(30):  # statistics of some images: without them all embeddings would be nearly the same
            model(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8))
    return model


def model_at(path: Path, unit: bool = True, seed: int = 0) -> Path:
    model = network(unit, seed)
    save_model(path, model.state_dict(), header_of(model, NAME, 36, 32, "folder"))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_at(tmp_path / "best.safetensors")


@pytest.fixture
def photos(tiny_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_set / "images", tmp_path / "photos"))


def found_by(model: Path, gallery: Path, events: list[Event] | None = None, **more: Any) -> Found:
    flags = {"workers": "0", "device": "cpu", "batch": "16", "gallery": str(gallery)}
    given = flags | {name: value if isinstance(value, bool) else str(value) for name, value in more.items()}
    return search(str(model), resolve(SearchSettings, given), silent if events is None else events.append)


def embedded_in(model: Path, gallery: Path, **more: Any) -> int:
    """How many images of the gallery a search embeds."""
    events: list[Event] = []
    found_by(model, gallery, events, query=next(gallery.rglob("*.jpg")), **more)
    done = [e.total for e in events if isinstance(e, Progress) and e.what == "Embedding gallery"]
    return done[-1] if done else 0


@pytest.mark.parametrize("unit", [True, False])
def test_answers_are_those_of_a_loop(photos: Path, tmp_path: Path, unit: bool) -> None:
    model = model_at(tmp_path / "m.safetensors", unit)
    paths = sorted(photos.rglob("*.jpg"))
    vectors = rkd_cli.load(model, device="cpu").embed(paths).astype(np.float64)
    found = found_by(model, photos, query=photos, top=4)
    assert (found.measure, found.images) == ("cosine" if unit else "distance", len(paths))
    assert [query for query, _ in found.answers] == paths
    for row, (_, hits) in enumerate(found.answers):
        values = {}
        for other, path in enumerate(paths):
            if other != row:
                far = float(np.sqrt(sum((a - b) ** 2 for a, b in zip(vectors[row], vectors[other], strict=True))))
                values[path] = sum(vectors[row] * vectors[other]) if unit else far
        best = sorted(values.values(), reverse=unit)[:4]
        assert [hit.similarity for hit in hits] == pytest.approx(best, abs=1e-5)
        assert [values[hit.path] for hit in hits] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_faiss_answers_many_queries(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unit: bool
) -> None:
    pytest.importorskip("faiss")
    model = model_at(tmp_path / "m.safetensors", unit)
    exact = found_by(model, photos, query=photos, top=4)
    assert exact.recall is None
    monkeypatch.setattr(approximate, "FROM", len(exact.answers) ** 2)
    monkeypatch.setattr(approximate, "_GOAL", 1.0)
    found = found_by(model, photos, query=photos, top=4)
    assert found.recall == 1
    for (query, hits), (asked, expected) in zip(found.answers, exact.answers, strict=True):
        assert query == asked
        assert [hit.similarity for hit in hits] == [hit.similarity for hit in expected]
    show_found(found, False)
    assert "faiss finds 100.0 % of the exact answers" in " ".join(capsys.readouterr().out.split())
    assert found_by(model, photos, query=photos, exact=True).recall is None
    monkeypatch.setattr(approximate, "is_installed", lambda: False)
    events: list[Event] = []
    assert found_by(model, photos, events, query=photos).recall is None
    assert any(isinstance(event, Note) and "pip install faiss-cpu" in event.text for event in events)


def test_faiss_looks_until_it_finds_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    gallery, queries = torch.randn(5000, 16), torch.randn(300, 16)
    distances, rows = nearest(queries, gallery, 5)
    for goal in (0.5, 0.9, 0.99):
        monkeypatch.setattr(approximate, "_GOAL", goal)
        found = approximate.nearly_nearest(queries, gallery, 5)
        assert found.recall >= goal
        share = sum(len({*a} & {*b}) for a, b in zip(found.rows.tolist(), rows.tolist(), strict=True)) / rows.numel()
        assert share == pytest.approx(found.recall, abs=0.05)  # of all queries, not of the sample
        assert (found.distances >= distances).all()
        again = (queries[:, None].double() - gallery[found.rows].double()).norm(dim=2)
        torch.testing.assert_close(found.distances, again)
    alike = gallery[:1] + 1e-6 * torch.randn(500, 16)  # whose order float32 does not tell
    close = approximate.nearly_nearest(queries, alike, 20)
    assert close.distances.equal(close.distances.sort(dim=1).values)
    assert (queries[:, None].double() - alike[close.rows].double()).square().sum(dim=2).sqrt().equal(close.distances)
    few = approximate.nearly_nearest(queries, gallery[:3], 5)
    assert few.rows.sort(dim=1).values.tolist() == [[0, 1, 2]] * 300


def test_rows_that_faiss_does_not_find_are_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "_LINKS", 2)  # which lead to few rows
    gallery = torch.cat([torch.randn(900, 4) * 1e-3, 100 + 100 * torch.rand(100, 4)])
    found = approximate.nearly_nearest(gallery[-1:], gallery, 990)
    there = found.rows[0] >= 0
    assert 8 <= there.sum() < 990
    assert found.distances[0].isfinite().equal(there)
    assert there.tolist() == sorted(there.tolist(), reverse=True)


def test_there_may_be_fewer_answers_than_asked_for(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(queries: torch.Tensor, gallery: torch.Tensor, k: int) -> approximate.Nearest:
        distances, rows = nearest(queries, gallery, k)
        return approximate.Nearest(distances, rows.where(torch.arange(k) < 3, -1), 0.5)

    monkeypatch.setattr(approximate, "FROM", 1)
    monkeypatch.setattr(approximate, "nearly_nearest", two)
    monkeypatch.setattr(approximate, "is_installed", lambda: True)
    ((_, hits),) = found_by(model, photos, query=sorted(photos.rglob("*.jpg"))[0]).answers
    assert len(hits) == 2


def test_a_query_is_none_of_its_own_answers_by_any_name(model: Path, photos: Path) -> None:
    query = sorted(photos.rglob("*.jpg"))[5]
    (photos / "link.jpg").symlink_to(query)
    copy = shutil.copy(query, photos / "copy.jpg")
    ((_, hits),) = found_by(model, photos, query=photos / "link.jpg", top=3).answers
    assert hits[0].path == Path(copy)
    assert not {query, photos / "link.jpg"} & {hit.path for hit in hits}
    assert len(hits) == 3


def test_only_what_is_new_or_changed_is_embedded(model: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.jpg"))
    assert [embedded_in(model, photos), embedded_in(model, photos)] == [len(images), 0]
    shutil.copy(images[0], photos / "a.jpg")
    shutil.copy(images[1], photos / "b.jpg")
    assert [embedded_in(model, photos), embedded_in(model, photos)] == [2, 0]
    (photos / "a.jpg").unlink()
    assert embedded_in(model, photos) == 0
    shutil.copy(images[30], photos / "b.jpg")  # other pixels
    assert embedded_in(model, photos) == 1
    ((_, hits),) = found_by(model, photos, query=images[30], top=1).answers
    assert hits[0].path == photos / "b.jpg"
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    stat = images[3].stat()
    os.utime(images[3], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert embedded_in(model, photos) == 1
    images[4].rename(photos / "moved.jpg")
    assert embedded_in(model, photos) == 1
    assert found_by(model, photos, query=images[0]).images == len(images) + 1
    # nothing of it serves another model, another size, or a damaged index
    assert embedded_in(model_at(tmp_path / "other.safetensors", seed=1), photos) == len(images) + 1
    assert embedded_in(model, photos, image_size=30) == len(images) + 1
    assert [embedded_in(model, photos, fit=fit) for fit in ("crop", "pad", "square")] == [len(images) + 1] * 2 + [0]
    for is_short in (True, False):
        for index in Path(os.environ["RKD_CACHE_DIR"]).glob("*.index"):
            whole = index.read_bytes()
            index.write_bytes(whole[:-9] + (b"" if is_short else bytes([whole[-9] ^ 1]) + whole[-8:]))
        assert [embedded_in(model, photos), embedded_in(model, photos)] == [1, 0]  # the last row is damaged
    for index in Path(os.environ["RKD_CACHE_DIR"]).glob("*.index"):
        index.write_bytes(b"an index of an earlier version" * 200)
    assert [embedded_in(model, photos), embedded_in(model, photos)] == [len(images) + 1, 0]


def test_an_index_of_an_earlier_version_is_told_and_made_again(model: Path, photos: Path) -> None:
    query = next(photos.rglob("*.jpg"))
    found_by(model, photos, query=query)
    (index,) = Path(os.environ["RKD_CACHE_DIR"]).glob("*.index")
    index.write_bytes(b"safetensors" * 1000)
    events: list[Event] = []
    found_by(model, photos, events, query=query)
    assert Note(f"{index}: the index is damaged, or of an earlier version. Creating it again.") in events


def test_an_index_of_changed_photos_does_not_grow_forever(model: Path, photos: Path) -> None:
    images, sizes = sorted(photos.rglob("*.jpg")), []
    for turn in range(5):
        for image in images:
            os.utime(image, ns=(turn, turn))
        assert embedded_in(model, photos) == len(images)
        assert embedded_in(model, photos) == 0
        (index,) = Path(os.environ["RKD_CACHE_DIR"]).glob("*.index")
        sizes.append((index.stat().st_size - 4096) // (8 + 4 * 8))
    assert sizes == [len(images) * rows for rows in (1, 2, 1, 2, 1)]


def test_photos_of_one_size_and_time_that_were_swapped_are_embedded_again(model: Path, photos: Path) -> None:
    one, other = (photos / name for name in ("green.bmp", "red.bmp"))
    for path in (one, other):
        Image.new("RGB", (9, 9), path.stem).save(path)
        os.utime(path, ns=(5, 5))
    found_by(model, photos, query=one)
    one.rename(photos / "aside")
    other.rename(one)
    (photos / "aside").rename(other)
    assert embedded_in(model, photos) == 2
    assert embedded_in(model, photos) == 0
    query = photos.parent / "green.bmp"
    Image.new("RGB", (9, 9), "green").save(query)
    ((_, hits),) = found_by(model, photos, query=query, top=1).answers
    assert hits[0].path == other  # which is called red, and is green now


@pytest.mark.parametrize("stop", [Stopped(2), KeyboardInterrupt()], ids=str)
def test_a_search_that_was_stopped_goes_on(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    count = len(sorted(photos.rglob("*.jpg")))
    forward = EmbeddingNet.forward
    seen: list[int] = []

    def stopped(self: EmbeddingNet, images: torch.Tensor) -> Any:
        seen.append(len(images))
        if len(seen) == 3:
            raise stop
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingNet, "forward", stopped)
        with pytest.raises(type(stop)):
            found_by(model, photos, query=next(photos.rglob("*.jpg")))
    if isinstance(stop, Stopped):
        assert stop.outcome == f". 32 of {count} images are in the index. The next search embeds the rest."
    check_gone_on_with(model, photos, 32)


def check_gone_on_with(model: Path, photos: Path, done: int) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    assert [embedded_in(model, photos), embedded_in(model, photos)] == [len(paths) - done, 0]
    (after,) = found_by(model, photos, query=paths[40]).answers
    clear_caches(Path(os.environ["RKD_CACHE_DIR"]))
    (anew,) = found_by(model, photos, query=paths[40]).answers
    assert [hit.path for hit in after[1]] == [hit.path for hit in anew[1]]
    assert [hit.similarity for hit in after[1]] == pytest.approx([hit.similarity for hit in anew[1]], abs=1e-5)


def test_a_search_that_was_killed_goes_on_from_where_it_saved(model: Path, photos: Path) -> None:
    code = """if True:
        import os, sys
        from rkd_cli.cli import main
        from rkd_cli.models import EmbeddingNet

        def embedded(self, images, forward=EmbeddingNet.forward, seen=[]):
            seen.append(images)
            if len(seen) == 3:
                os.kill(os.getpid(), 9)
            return forward(self, images)

        EmbeddingNet.forward = embedded
        main(sys.argv[1:])
    """
    flags = ["--gallery", photos, "--query", photos, "--batch", 16, "--workers", 0, "--device", "cpu"]
    assert Forked(["-c", code, "search", model, *flags]).wait(timeout=120) == -9
    check_gone_on_with(model, photos, 32)


def test_indexes_are_listed_and_removed_with_the_caches(model: Path, photos: Path) -> None:
    folder = Path(os.environ["RKD_CACHE_DIR"])
    count = len(sorted(photos.rglob("*.jpg")))
    embedded_in(model, photos)
    (file,) = list_caches(folder)
    assert (file.images, file.count, file.resize) == (str(photos), count, 36)
    file.path.write_bytes(file.path.read_bytes()[:100])
    (damaged,) = list_caches(folder)
    assert (damaged.images, damaged.count) == ("?", 0)
    assert clear_caches(folder) == [damaged]
    assert embedded_in(model, photos) == count


def test_duplicates_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 3) * torch.rand(60, 1)
    x[41] = 2 * x[40]
    for block in (10_000, 5):  # in one, and in blocks of a row that are joined again and again
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
        group = list(range(60))
        for i in range(60):
            for j in range(60):
                if float(torch.cosine_similarity(x[i], x[j], dim=0)) >= 0.97:
                    group = [min(group[i], group[j]) if g in (group[i], group[j]) else g for g in group]
        expected = [[row for row in range(60) if group[row] == g] for g in sorted(set(group)) if group.count(g) > 1]
        found = find_duplicates(x, 0.97, silent)
        assert [[row for row, _ in rows] for rows in found] == expected
        assert len(expected) > 3
        for rows in found:
            cosines = [float(torch.cosine_similarity(x[rows[0][0]], x[row], dim=0)) for row, _ in rows]
            assert [value for _, value in rows] == pytest.approx(cosines, abs=1e-5)


def test_copies_are_found(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted(photos.rglob("*.jpg"))
    shutil.copy(images[7], photos / "z.jpg")
    found = found_by(model, photos, duplicates=True, threshold=0.999999)
    assert any({images[7], photos / "z.jpg"} <= {hit.path for hit in group} for group in found.groups)
    show_found(found, True)
    facts = json.loads(capsys.readouterr().out)
    assert [len(group) for group in facts["groups"]] == [len(group) for group in found.groups]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_copies_are_duplicates_at_a_cosine_of_one(size: int) -> None:
    x = torch.randn(40, size)
    x[20:] = x[:20] * torch.rand(20, 1)
    groups = [[row for row, _ in group] for group in find_duplicates(x, 1.0, silent)]
    assert groups == [[row, row + 20] for row in range(20)]


def test_what_is_no_image_is_told(model: Path, photos: Path) -> None:
    for name in ("a.svg", "b.svg", "notes.txt"):
        (photos / name).write_bytes(b"GIF89a")
    events: list[Event] = []
    found_by(model, photos, events, query=next(photos.rglob("*.jpg")))
    assert Note(f"{photos}: files that are not images are left out: 2 .svg, 1 .txt") in events


def test_a_file_is_a_gallery(model: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.jpg"))
    vectors = rkd_cli.load(model, device="cpu").embed(images)
    write_vectors(tmp_path / "v.npz", vectors, [path.relative_to(photos).as_posix() for path in images])
    of_file = found_by(model, tmp_path / "v.npz", query=images[3], data=photos)
    of_folder = found_by(model, photos, query=images[3])
    assert [hit.path for hit in of_file.answers[0][1]] == [hit.path for hit in of_folder.answers[0][1]]
    write_vectors(tmp_path / "w.npz", vectors[:, :5], [path.name + str(n) for n, path in enumerate(images)])
    with pytest.raises(DataError, match=r"w.npz: its embeddings have 5 dimensions, but those of .* 8"):
        found_by(model, tmp_path / "w.npz", query=images[3])


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *((suffix, kind) for suffix in (".npz", ".parquet", ".safetensors") for kind in ("float", "float16", "int8")),
        (".npy", "float"),
        (".npy", "float16"),
    ],
)
@pytest.mark.parametrize("unit", [True, False])
def test_the_measure_of_a_file_is_that_of_its_model(
    photos: Path, tmp_path: Path, suffix: str, kind: str, unit: bool
) -> None:
    model, file, query = model_at(tmp_path / "m.safetensors", unit), tmp_path / f"v{suffix}", min(photos.rglob("*.jpg"))
    embed = {"workers": "0", "device": "cpu", "data": str(photos), "out": str(file), "vectors": kind}
    embed_file(str(model), resolve(EmbedSettings, embed), silent)
    found = found_by(model, file, query=query, data=photos)
    assert found.measure == ("cosine" if unit else "distance")
    expected = {hit.path: hit.similarity for hit in found_by(model, photos, query=query, top=48).answers[0][1]}
    scale = max(expected.values())
    assert all(hit.similarity == pytest.approx(expected[hit.path], abs=0.02 * scale) for hit in found.answers[0][1])


def test_an_index_is_of_one_pretrained_network(photos: Path, tmp_path: Path) -> None:
    names, file = ("timm:tf_efficientnet_lite0", "timm:efficientnet_lite0"), tmp_path / "w.safetensors"
    save_file(timm.create_model(names[0].removeprefix("timm:")).state_dict(), file)
    some = tmp_path / "some"
    shutil.copytree(min(photos.iterdir()), some)
    more = {"weights": file, "resize": 36, "image_size": 32}
    counts = [embedded_in(Path(name), some, **more) for name in (*names, *names)]
    assert counts == [6, 6, 0, 0]


def test_a_file_of_other_sides_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    embed = {"workers": "0", "device": "cpu", "data": str(photos), "out": str(tmp_path / "v.npz")}
    embed_file(str(model), resolve(EmbedSettings, embed | {"image_size": "24"}), silent)
    query = next(photos.rglob("*.jpg"))
    assert found_by(model, tmp_path / "v.npz", query=query, data=photos, image_size=24).answers
    says = r"v.npz: was embedded with another --resize, --image-size or --fit. Pass the same"
    others: list[dict[str, Any]] = [{}, {"image_size": 24, "fit": "crop"}]
    for other in others:
        with pytest.raises(DataError, match=says):
            found_by(model, tmp_path / "v.npz", query=query, data=photos, **other)


def test_rows_of_zeros_in_a_gallery_are_named_and_left_out(model: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.jpg"))
    names = [path.relative_to(photos).as_posix() for path in images]
    vectors = rkd_cli.load(model, device="cpu").embed(images)
    vectors[[5, 7]] = 0
    write_vectors(tmp_path / "v.npz", vectors, names)
    events: list[Event] = []
    found = found_by(model, tmp_path / "v.npz", events, query=images[3], data=photos, top=len(images))
    assert (found.images, found.measure) == (len(images) - 2, "cosine")
    assert {hit.path for hit in found.answers[0][1]} == {*images} - {images[row] for row in (3, 5, 7)}
    notes = [event.text for event in events if isinstance(event, Note)]
    said = f"{tmp_path}/v.npz: a row of zeros, which has no direction, for 2 images, first {names[5]}: left out"
    assert said in notes


def test_a_gallerys_path_in_another_unicode_form_is_that_of_the_image(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    images = sorted(photos.rglob("*.jpg"))[:3]
    image = images[0].rename(photos / "re\u0301.jpg")
    vectors = rkd_cli.load(model, device="cpu").embed([image, *images[1:]])
    write_vectors(tmp_path / "v.npz", vectors, ["r\u00e9.jpg", *(str(p.relative_to(photos)) for p in images[1:])])
    found = found_by(model, tmp_path / "v.npz", query=images[1], data=photos)
    assert {hit.path for hit in found.answers[0][1]} == {image, images[2]}
    assert len(found_by(model, tmp_path / "v.npz", query=image, data=photos).answers[0][1]) == 2  # not itself


def test_a_gallery_of_another_form_is_refused_with_the_line_that_converts_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("path,e0\na.jpg,1\n")
    with pytest.raises(DataError, match=r'--gallery .*v\.csv: \.csv is not supported.* Convert them with: python -c "'):
        found_by(model, tmp_path / "v.csv", query=tmp_path / "v.csv")


def test_images_of_a_vectors_file_are_where_its_data_has_them(model: Path, photos: Path, tmp_path: Path) -> None:
    """A list and an archive have their images beside or below their folder."""
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in photos.rglob("*.jpg"):
            archive.write(path, path.relative_to(photos))
    (tmp_path / "list.csv").write_text("\n".join(["path", *map(str, photos.rglob("*.jpg"))]))
    query = next(photos.rglob("*.jpg"))
    for data in (photos, tmp_path / "p.zip", tmp_path / "list.csv"):
        flags = {"workers": "0", "device": "cpu", "data": str(data), "out": str(tmp_path / f"{data.name}.npz")}
        embed_file(str(model), resolve(EmbedSettings, flags), silent)
        events: list[Event] = []
        found = found_by(model, tmp_path / f"{data.name}.npz", events, query=query, data=data)
        assert None not in pictures_of(found).values()
        assert not [event for event in events if isinstance(event, Note)]
        assert data.name == "p.zip" or query not in [hit.path for hit in found.answers[0][1]]
    found_by(model, tmp_path / "photos.npz", events, query=query, data=tmp_path)
    (note,) = (event.text for event in events if isinstance(event, Note))
    assert f"are not in {tmp_path}, so no picture is shown. Pass the --data" in note


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet", ".npy"])
def test_a_file_by_another_network_is_refused(model: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    """But for npy, which does not say."""
    embed = {"workers": "0", "device": "cpu", "data": str(photos)}
    files = []
    for name in (model, model_at(tmp_path / "other.safetensors", seed=1)):
        files.append(tmp_path / f"{name.stem}-photos{suffix}")
        embed_file(str(name), resolve(EmbedSettings, embed | {"out": str(files[-1])}), silent)
    query = next(photos.rglob("*.jpg"))
    assert found_by(model, files[0], query=query, data=photos).answers
    if suffix != ".npy":
        with pytest.raises(
            DataError, match=f"--gallery {files[1]}: was embedded by another network than {model}. Name that"
        ) as caught:
            found_by(model, files[1], query=query, data=photos)
        assert len(caught.value.problems) == 1
    # the queries of one network in the vectors of the other, as a student's in its teacher's
    x = rkd_cli.load(model, device="cpu").embed(query)
    found = found_by(model, files[1], query=query, data=photos, asymmetric=True, top=3)
    rows = read_vectors(files[1])
    cosines = {photos / name: float(rows.embeddings[row] @ x[0]) for name, row in rows.row.items()}
    del cosines[query]
    best = sorted(cosines, key=lambda path: -cosines[path])[:3]
    assert [cosines[hit.path] for hit in found.answers[0][1]] == pytest.approx([cosines[p] for p in best], abs=1e-5)


def in_space(model: Path, space: TeacherSpace, l2normalize: bool = True) -> Path:
    """The same network as one that was trained in a teacher's space."""
    network = load_model(model)
    network.teacher_space, network.l2normalize = space, l2normalize
    path = model.with_name("student.safetensors")
    save_model(path, tensors_of(network), header_of(network, NAME, 36, 32, "folder"))
    return path


def nearest_rows(query: np.ndarray, rows: np.ndarray, names: list[Path], left_out: Path) -> list[Path]:
    order = np.argsort(np.linalg.norm(rows - query, axis=1), kind="stable")
    return [names[row] for row in order if names[row] != left_out]


@pytest.mark.parametrize("unit", [True, False])
def test_a_student_queries_its_teachers_file_through_its_projection(
    model: Path, photos: Path, tmp_path: Path, unit: bool
) -> None:
    images, weight = sorted(photos.rglob("*.jpg")), torch.randn(6, 8)
    student = in_space(model, TeacherSpace(6, unit, {8: weight}))
    rows = np.random.default_rng(0).normal(size=(len(images), 6)).astype(np.float32)
    write_vectors(tmp_path / "v.npz", rows, [path.relative_to(photos).as_posix() for path in images], model="theirs")
    query = rkd_cli.load(student, device="cpu").embed(images[3])[0] @ weight.numpy().T
    if unit:
        query, rows = query / np.linalg.norm(query), rows / np.linalg.norm(rows, axis=1, keepdims=True)
    events: list[Event] = []
    found = found_by(student, tmp_path / "v.npz", events, query=images[3], data=photos, asymmetric=True, top=4)
    assert [hit.path for hit in found.answers[0][1]] == nearest_rows(query, rows, images, images[3])[:4]
    assert found.measure == ("cosine" if unit else "distance")
    said = f"--gallery {tmp_path}/v.npz: compared at unit length, as in the training of {student}"
    assert (said in [event.text for event in events if isinstance(event, Note)]) == unit
    with pytest.raises(DataError, match=r"6 dimensions, but those of .* 8. Name the network .*, or add --asymmetric"):
        found_by(student, tmp_path / "v.npz", query=images[3], data=photos)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_a_file_that_does_not_say_by_whom_it_is_is_compared_as_the_student_learned_it(
    model: Path, photos: Path, tmp_path: Path, asymmetric: bool
) -> None:
    images = sorted(photos.rglob("*.jpg"))
    rows = np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)
    write_vectors(tmp_path / "v.npz", rows, [path.relative_to(photos).as_posix() for path in images])
    student = in_space(model, TeacherSpace(8, True, {}))
    found = found_by(student, tmp_path / "v.npz", query=images[3], data=photos, asymmetric=asymmetric)
    query = rkd_cli.load(student, device="cpu").embed(images[3])[0]
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert [hit.path for hit in found.answers[0][1]] == nearest_rows(query, directions, images, images[3])[:5]
    assert found.answers[0][1][0].similarity == pytest.approx(
        max(float(row @ query) for row, path in zip(directions, images, strict=True) if path != images[3]), abs=1e-5
    )


def test_a_student_of_reduced_vectors_queries_them(model: Path, photos: Path, tmp_path: Path) -> None:
    """Whose teacher was the file itself: its map is of that one's network, and not for the student's queries."""
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "pca": "3", "out": str(tmp_path / "v.npz")}
    embed_file(str(model), resolve(EmbedSettings, flags), silent)
    images, other = sorted(photos.rglob("*.jpg")), build_model(NAME, 3, True)
    other.teacher_space = TeacherSpace(3, True, {})
    save_model(tmp_path / "three.safetensors", other.state_dict(), header_of(other, NAME, 36, 32, "folder"))
    found = found_by(tmp_path / "three.safetensors", tmp_path / "v.npz", query=images[3], data=photos, asymmetric=True)
    query, rows = (
        rkd_cli.load(tmp_path / "three.safetensors", device="cpu").embed(images[3])[0],
        read_vectors(tmp_path / "v.npz"),
    )
    names = [photos / name for name in rows.row]
    assert [hit.path for hit in found.answers[0][1]] == nearest_rows(query, rows.embeddings, names, images[3])[:5]


def test_what_was_reduced_at_other_lengths_is_refused_to_a_student_of_directions(photos: Path, tmp_path: Path) -> None:
    teacher = model_at(tmp_path / "t.safetensors", unit=False, seed=1)
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "pca": "3", "out": str(tmp_path / "v.npz")}
    embed_file(str(teacher), resolve(EmbedSettings, flags), silent)
    student = in_space(model_at(tmp_path / "m.safetensors"), TeacherSpace(8, True, {}))
    with pytest.raises(DataError, match="PCA reduced embeddings that were not normalized"):
        found_by(student, tmp_path / "v.npz", query=next(photos.rglob("*.jpg")), data=photos, asymmetric=True)


def test_a_network_that_names_no_teachers_space_is_noted(model: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.jpg"))
    names = [path.relative_to(photos).as_posix() for path in images]
    write_vectors(tmp_path / "v.npz", np.random.default_rng(0).normal(size=(len(images), 8)), names)
    events: list[Event] = []
    found_by(model, tmp_path / "v.npz", events, query=images[3], data=photos, asymmetric=True)
    said = f"--asymmetric: {model} is not known to embed in the space of {tmp_path}/v.npz"
    assert said in [event.text for event in events if isinstance(event, Note)]


def test_queries_are_reduced_as_the_gallery_was(model: Path, photos: Path, tmp_path: Path) -> None:
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "pca": "3", "out": str(tmp_path / "v.npz")}
    embed_file(str(model), resolve(EmbedSettings, flags), silent)
    query = sorted(photos.rglob("*.jpg"))[9]
    copy = shutil.copy(query, tmp_path / "copy.jpg")
    (hit,) = found_by(model, tmp_path / "v.npz", query=copy, data=photos, top=1).answers[0][1]
    assert hit.path == query
    assert hit.similarity == pytest.approx(1, abs=1e-5)
    other = build_model(NAME, 3, True)
    save_model(tmp_path / "three.safetensors", other.state_dict(), header_of(other, NAME, 36, 32, "folder"))
    with pytest.raises(DataError, match="its embeddings have 8 dimensions before PCA"):
        found_by(tmp_path / "three.safetensors", tmp_path / "v.npz", query=copy)


def test_a_damaged_picture_is_named_or_left_out(model: Path, photos: Path) -> None:
    images = sorted(photos.rglob("*.jpg"))
    assert embedded_in(model, photos) == len(images)
    images[9].write_bytes(b"no image")
    with pytest.raises(DataError, match=re.escape(str(images[9]))) as caught:
        found_by(model, photos, query=images[0])
    assert len(caught.value.problems) == 1
    assert found_by(model, photos, query=images[0], skip_damaged=True).images == len(images) - 1
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"none at all")
    with pytest.raises(DataError, match=f"all {len(images)} images are damaged"):
        found_by(model, photos, query=images[0], skip_damaged=True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"gallery": "{tmp}/empty", "query": "{photo}"}, "--gallery .*empty: contains no images"),
        ({"gallery": "{tmp}/none", "query": "{photo}"}, "--gallery .*none: no such folder or file"),
        ({"gallery": "{photo}", "query": "{photo}"}, "is not a vectors file"),
        ({"query": "{tmp}/none.jpg"}, "--query .*none.jpg: no such file or folder. Name an image, or a folder"),
        ({"query": "{tmp}/emtpy"}, "--query .*emtpy: no such file or folder. Did you mean empty?"),
        ({"gallery": "{tmp}/potos", "query": "{photo}"}, "--gallery .*potos: no such .*. Did you mean photos?"),
        ({"query": "{tmp}/empty"}, "--query .*empty: contains no images"),
        ({}, "--query or --duplicates: one is required"),
        ({"query": "{photo}", "duplicates": True}, "--query or --duplicates: both"),
    ],
)
def test_bad_input_is_one_line(model: Path, photos: Path, tmp_path: Path, flags: dict[str, Any], says: str) -> None:
    (tmp_path / "empty").mkdir()
    photo = next(photos.rglob("*.jpg"))
    given = {n: v.format(tmp=tmp_path, photo=photo) if isinstance(v, str) else v for n, v in flags.items()}
    with pytest.raises((DataError, SettingsError), match=says) as caught:
        found_by(model, Path(given.pop("gallery", photos)), None, **given)
    assert isinstance(caught.value, RkdError)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_a_full_disk_costs_the_index_alone(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Store, "append", full)
    events: list[Event] = []
    assert len(found_by(model, photos, events, query=next(photos.rglob("*.jpg"))).answers[0][1]) == 5
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert "No space left" in note
    monkeypatch.setattr(module, "locked", full)  # nor can the lock be made
    assert found_by(model, photos, query=next(photos.rglob("*.jpg"))).answers


def test_names_are_escaped_on_the_page() -> None:
    hits = (Hit(Path(ODD), 0.5), Hit(Path("b.jpg"), 0.25))
    pictures = dict.fromkeys([Path(ODD), Path("b.jpg")], None) | {Path("b.jpg"): b"webp"}
    made = datetime(2026, 11, 25, tzinfo=UTC)
    for found in (
        Found(ODD, Path(ODD), 2, "cosine", ((Path(ODD), hits),)),
        Found(ODD, Path(ODD), 2, "cosine", groups=(hits,), threshold=0.9),
    ):
        page = found_html(found, pictures, made)
        assert page.count("<script") == 1  # its own
        assert "&lt;script&gt;alert(1)" in page
        assert "{{ 7 * 7 }}" in page
        assert "data:image/webp;base64,d2VicA==" in page
        assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.mark.parametrize("flag", ["data", "asymmetric"])
def test_flags_of_a_file_are_refused_of_a_folder(model: Path, photos: Path, flag: str) -> None:
    given = {"data": photos} if flag == "data" else {"asymmetric": True}
    with pytest.raises(SettingsError, match=rf"--{flag}: has no effect, {photos} is a folder. Omit the flag."):
        found_by(model, photos, query=next(photos.rglob("*.jpg")), **given)
