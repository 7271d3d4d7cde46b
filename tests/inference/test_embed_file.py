"""rkd embed: what it writes, for which images, in which space, and nothing where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rkd_cli.compress import fit_pca
from rkd_cli.config.resolve import resolve
from rkd_cli.data.vectors import Vectors, read_vectors, relative_names, write_vectors
from rkd_cli.errors import DataError, RkdError
from rkd_cli.events import Event, Note, Progress, silent
from rkd_cli.inference.embed_file import embed_file
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import EmbedSettings

NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def photos(tiny_set: Path, tmp_path: Path) -> Path:
    """A tree of no particular form: 48 images in folders of folders, one beside them, and what is no image."""
    root = tmp_path / "photos"
    shutil.copytree(tiny_set / "images", root / "2024/summer")
    shutil.copy(next(root.rglob("*.jpg")), root / "alone.jpg")
    (root / "notes.txt").write_text("hello")
    (root / ".trash").mkdir()
    shutil.copy(root / "alone.jpg", root / ".trash/gone.jpg")
    return root


@pytest.fixture(params=[True, False])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = build_model(NAME, 8, request.param)
    save_model(tmp_path / "best.safetensors", model.state_dict(), header_of(model, NAME, 36, 32, "folder"))
    return tmp_path / "best.safetensors"


def embedded(model: Path, data: Path, out: Path, **more: str | bool) -> Vectors:
    flags: dict[str, str | bool] = {"batch": "16", "workers": "0", "device": "cpu", "data": str(data), "out": str(out)}
    written = embed_file(str(model), resolve(EmbedSettings, flags | more), silent)
    found = read_vectors(out)
    assert (written.path, written.images, written.size) == (out, len(found.row), found.size)
    return found


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_every_image_of_a_tree_has_its_embedding(checkpoint: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    found = embedded(checkpoint, photos, tmp_path / f"new/v{suffix}")
    images = [photos / "alone.jpg", *photos.glob("2024/*/*/*.jpg")]
    assert set(found.row) == set(relative_names(images, photos))
    assert (len(images), found.pca) == (49, None)
    same = next(
        name
        for name in found.row
        if name != "alone.jpg" and (photos / name).read_bytes() == (photos / "alone.jpg").read_bytes()
    )
    one, other = (found.embeddings[found.row[name]] for name in ("alone.jpg", same))
    assert one == pytest.approx(other, abs=1e-5)
    assert np.ptp(found.embeddings, axis=0).min() > 0
    again = embedded(checkpoint, photos, tmp_path / f"again{suffix}")
    assert again.digest == found.digest
    lengths = np.linalg.norm(found.embeddings, axis=1)
    assert (abs(lengths - 1).max() < 1e-5) == load_model(checkpoint).l2normalize


def test_a_named_set_has_both_its_splits(checkpoint: Path, tiny_set: Path, tmp_path: Path) -> None:
    found = embedded(checkpoint, tiny_set, tmp_path / "v.npz", dataset="cub200")
    assert set(found.row) == set(relative_names(sorted(tiny_set.glob("images/*/*.jpg")), tiny_set))


def test_components_are_kept_and_serve_other_images(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    whole = embedded(checkpoint, photos, tmp_path / "whole.npz")
    small = embedded(checkpoint, photos, tmp_path / "small.safetensors", pca="3")
    assert small.pca is not None
    x, unit = torch.from_numpy(whole.embeddings), load_model(checkpoint).l2normalize
    mean, components = fit_pca(x, 3)
    assert small.pca[0] == pytest.approx(mean.numpy(), abs=1e-6)
    assert small.pca[1] == pytest.approx(components.numpy(), abs=1e-4)
    expected = ((x - mean) @ components.T).float()
    expected = F.normalize(expected, dim=1) if unit else expected
    assert small.embeddings == pytest.approx(expected.numpy(), abs=1e-4)

    (tmp_path / "others").mkdir()
    shutil.copy(photos / "alone.jpg", tmp_path / "others/1.jpg")
    other = embedded(checkpoint, tmp_path / "others", tmp_path / "other.npz", pca=str(tmp_path / "small.safetensors"))
    assert other.embeddings[0] == pytest.approx(small.embeddings[small.row["alone.jpg"]], abs=1e-5)
    assert other.pca is not None
    assert all(np.array_equal(a, b) for a, b in zip(other.pca, small.pca, strict=True))

    reduced = embedded(tmp_path / "whole.npz", photos, tmp_path / "reduced.npz", pca="3")  # of embeddings in a file
    assert reduced.embeddings == pytest.approx(small.embeddings, abs=1e-4)


def test_damaged_images_are_named_or_left_out(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.glob("2024/*/*/*.jpg"))
    for path in (images[3], images[40]):
        path.write_bytes(b"")
    out = tmp_path / "v.npz"
    with pytest.raises(DataError) as caught:
        embedded(checkpoint, photos, out)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(images[3]), str(images[40])]
    assert not out.exists()
    events: list[Event] = []
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "out": str(out), "skip_damaged": True}
    assert embed_file(str(checkpoint), resolve(EmbedSettings, flags), events.append).images == 47
    assert Note(f"2 damaged images are left out, the first of them {images[3]}") in events
    assert Progress("Embedding images", 47, 47) in events


@pytest.mark.parametrize("stop", [Stopped(2), KeyboardInterrupt()])
def test_interrupted_it_leaves_what_was_there(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    out = tmp_path / "out/v.npz"
    out.parent.mkdir()
    out.write_bytes(b"before")
    forward: Callable[..., object] = EmbeddingNet.forward

    def stopped(self: EmbeddingNet, images: torch.Tensor) -> object:
        if len(images) < 16:  # the last batch
            raise stop
        return forward(self, images)

    monkeypatch.setattr(EmbeddingNet, "forward", stopped)
    with pytest.raises(type(stop)):
        embedded(checkpoint, photos, out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["v.npz"]
    assert out.read_bytes() == b"before"
    monkeypatch.setattr(EmbeddingNet, "forward", forward)
    assert len(embedded(checkpoint, photos, out, overwrite=True).row) == 49


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"out": "{tmp}/there.npz"}, "--out {tmp}/there.npz: is there already: name another file, or add --overwrite"),
        ({"out": "{tmp}/v.txt"}, "--out {tmp}/v.txt: must end in .npy, .npz, .parquet or .safetensors"),
        (
            {"out": "{tmp}/v.npy", "vectors": "int8"},
            "--out {tmp}/v.npy: an npy keeps numbers alone, and --vectors int8",
        ),
        ({"out": "{tmp}/taken.npy"}, "--out {tmp}/taken.npy.paths.txt: is there already"),
        ({"data": "{tmp}/none"}, "{tmp}/none: no such folder"),
        ({"data": "{tmp}/empty"}, "{tmp}/empty: holds no image"),
        ({"pca": "9"}, "--pca 9: {checkpoint} has 8 dimensions, which have no more components"),
        ({"pca": "2", "data": "{tmp}/one"}, "--pca 2: there are 1 images, which have no more components"),
        ({"pca": "0"}, "--pca: must be from 1 to 65536, got 0"),
        ({"pca": ""}, "--pca: must be a number or a file"),
        ({"pca": "{tmp}/none.npz"}, "--pca {tmp}/none.npz: no such file"),
        ({"pca": "{tmp}/empty"}, "--pca {tmp}/empty: no such file"),
        ({"pca": "{checkpoint}"}, "--pca {checkpoint}: no file of embeddings"),
        ({"pca": "{tmp}/there.npz"}, "--pca {tmp}/there.npz: keeps no PCA map"),
        ({"pca": "{tmp}/mapped.npz"}, "--pca {tmp}/mapped.npz: its map is of 5 dimensions, and {checkpoint} has 8"),
        ({"weights": "{tmp}/w.pth"}, "--weights {tmp}/w.pth: is for one timm:NAME or torchvision:NAME"),
        ({"resize": "20"}, "--image-size 32 is larger than --resize 20"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_one_line_before_the_work(
    checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, str],
    says: str,
) -> None:
    monkeypatch.setattr("rkd_cli.inference.embed_file.embed_sets", None)
    for name in ("empty", "one"):
        (tmp_path / name).mkdir()
    shutil.copy(photos / "alone.jpg", tmp_path / "one")
    ones = np.ones((1, 2), np.float32)
    write_vectors(tmp_path / "there.npz", ones, ["a"])
    write_vectors(tmp_path / "mapped.npz", ones, ["a"], (np.ones(5, np.float32), np.ones((2, 5), np.float32)))
    places = {"tmp": str(tmp_path), "checkpoint": str(checkpoint)}
    flags = {"data": str(photos), "out": "{tmp}/v.npz", **more}
    flags = {name: value.format(**places) for name, value in flags.items()}
    with pytest.raises(RkdError) as caught:
        embedded(checkpoint, Path(flags.pop("data")), Path(flags.pop("out")), **flags)
    (problem,) = caught.value.problems
    assert problem.startswith(says.format(**places))
    assert not (tmp_path / "v.npz").exists()


def test_a_flag_that_contradicts_the_checkpoint(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    unit = load_model(checkpoint).l2normalize
    with pytest.raises(RkdError, match=f"--l2normalize {not unit} contradicts {checkpoint}, which holds {unit}"):
        embedded(checkpoint, photos, tmp_path / "v.npz", l2normalize=not unit)
