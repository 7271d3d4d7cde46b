"""rkd embed: what it writes, for which images, in which space, and nothing where it cannot."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from forked import Forked
from rkd_cli.commands import embed as embed_file_module
from rkd_cli.commands.embed import embed_file
from rkd_cli.commands.evaluate import evaluate_models
from rkd_cli.compress import fit_pca
from rkd_cli.data import loader
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.store import Store, open_store, unfinished
from rkd_cli.embedding.vectors import Vectors, read_vectors, write_vectors
from rkd_cli.errors import DataError, RkdError
from rkd_cli.events import Event, Note, Progress, silent
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import DistillSettings, EmbedSettings, EvaluateSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.open import build_run

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


def settings_for(data: Path, out: Path, **more: str | bool) -> EmbedSettings:
    flags: dict[str, str | bool] = {"batch": "16", "workers": "0", "device": "cpu", "data": str(data), "out": str(out)}
    return resolve(EmbedSettings, flags | more)


def embedded(model: Path, data: Path, out: Path, **more: str | bool) -> Vectors:
    written = embed_file(str(model), settings_for(data, out, **more), silent)
    found = read_vectors(out)
    assert (written.path, written.images, written.size) == (out, len(found.row), found.size)
    return found


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
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


def test_a_list_of_one_split_is_embedded(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    names = ["alone.jpg", *(path.relative_to(photos).as_posix() for path in sorted(photos.glob("2024/*/*/*.jpg"))[:3])]
    table = photos / "list.csv"
    table.write_text("path,label,split\n" + "".join(f"{name},7,train\n" for name in names))
    found = embedded(checkpoint, table, tmp_path / "v.npz")
    table.unlink()
    whole = embedded(checkpoint, photos, tmp_path / "whole.npz")
    assert list(found.row) == names
    assert found.embeddings == pytest.approx(whole.embeddings[[whole.row[name] for name in names]], abs=1e-5)


def test_many_images_are_embedded_by_onnxruntime(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_torch = embedded(checkpoint, photos, tmp_path / "torch.npz")
    monkeypatch.setattr("rkd_cli.models.inference._LEAST_TO_EXPORT", 1)
    events: list[Event] = []
    embed_file(str(checkpoint), settings_for(photos, tmp_path / "onnx.npz"), events.append)
    found = read_vectors(tmp_path / "onnx.npz")
    assert found.row == by_torch.row
    assert found.embeddings == pytest.approx(by_torch.embeddings, abs=1e-5)
    assert any("onnxruntime" in event.text for event in events if isinstance(event, Note))


@pytest.mark.cuda
def test_a_gpu_embeds_the_same(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    here = embedded(checkpoint, photos, tmp_path / "here.npz")
    there = embedded(checkpoint, photos, tmp_path / "there.npz", device="cuda", precision="fp32")
    assert there.row == here.row
    found, expected = (torch.from_numpy(vectors.embeddings) for vectors in (there, here))
    assert F.cosine_similarity(found, expected).min() > 1 - 1e-5
    torch.testing.assert_close(found.norm(dim=1), expected.norm(dim=1), rtol=1e-3, atol=0)


def test_what_is_no_image_is_told(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "out": str(tmp_path / "v.npz")}
    embed_file(str(checkpoint), resolve(EmbedSettings, flags), events.append)
    assert Note(f"{photos}: files that are not images are left out: 1 .txt") in events


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


def test_the_resized_side_follows_the_crop(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    followed = embedded(checkpoint, photos, tmp_path / "a.npz", image_size="48")  # trained at 36 and 32
    given = embedded(checkpoint, photos, tmp_path / "b.npz", image_size="48", resize="54")
    assert np.array_equal(followed.embeddings, given.embeddings)
    assert not np.allclose(followed.embeddings, embedded(checkpoint, photos, tmp_path / "c.npz").embeddings)


def test_half_whitened_components_serve_other_images(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    whole = embedded(checkpoint, photos, tmp_path / "whole.npz")
    small = embedded(tmp_path / "whole.npz", photos, tmp_path / "small.npz", pca="3", half_whiten=True)
    x, unit = torch.from_numpy(whole.embeddings).double(), load_model(checkpoint).l2normalize
    mean, components = fit_pca(x, 3)
    plain = (x - mean) @ components.T
    expected = plain / (plain.var(dim=0) / plain.var(dim=0).mean() + 0.1).sqrt().sqrt()
    expected = F.normalize(expected, dim=1) if unit else expected
    assert small.embeddings == pytest.approx(expected.float().numpy(), abs=1e-4)
    other = embedded(tmp_path / "whole.npz", photos, tmp_path / "other.npz", pca=str(tmp_path / "small.npz"))
    assert other.embeddings == pytest.approx(small.embeddings, abs=1e-5)


def test_damaged_images_are_named_or_left_out(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.glob("2024/*/*/*.jpg"))
    for path in (images[40], images[45]):
        path.write_bytes(b"")
    out = tmp_path / "v.npz"
    with pytest.raises(DataError) as caught:
        embedded(checkpoint, photos, out, batch="16")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(images[40]), str(images[45])]
    assert not out.exists()
    events: list[Event] = []
    flags = {"workers": "0", "device": "cpu", "data": str(photos), "out": str(out), "skip_damaged": True, "batch": "16"}
    assert embed_file(str(checkpoint), resolve(EmbedSettings, flags), events.append).images == 47
    assert Note(f"2 damaged images are left out, the first of them {images[40]}") in events
    assert Note(f"{out}: 32 of 47 images were embedded before. Resuming.") in events
    assert Progress("Embedding images", 47, 47) in events


class Counted:
    """EmbeddingNet.forward that counts images, and may raise at the last batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: BaseException | None = None) -> None:
        self.images, forward = 0, EmbeddingNet.forward

        def counting(net: EmbeddingNet, images: torch.Tensor) -> object:
            if stop and len(images) < 16:
                raise stop
            self.images += len(images)
            return forward(net, images)

        monkeypatch.setattr(EmbeddingNet, "forward", counting)


@pytest.mark.parametrize("stop", [Stopped(2), KeyboardInterrupt()])
def test_interrupted_it_leaves_what_was_there_and_goes_on(
    checkpoint: Path, photos: Path, tmp_path: Path, stop: BaseException
) -> None:
    out = tmp_path / "out/v.npz"
    out.parent.mkdir()
    out.write_bytes(b"before")
    with pytest.MonkeyPatch.context() as patch:
        Counted(patch, stop)
        with pytest.raises(type(stop)):
            embedded(checkpoint, photos, out, overwrite=True)
    assert {path.name for path in out.parent.iterdir()} == {"v.npz", unfinished(out).name}
    assert out.read_bytes() == b"before"
    if isinstance(stop, Stopped):
        assert stop.outcome == ". 48 of 49 images are embedded. The same command embeds the rest."
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        written = embed_file(str(checkpoint), settings_for(photos, out, overwrite=True), events.append)
    assert counted.images == 1
    assert Note(f"{out}: 48 of 49 images were embedded before. Resuming.") in events
    assert written.images_per_second
    embedded(checkpoint, photos, tmp_path / "whole.npz")
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["v.npz"]


_KILLED = """
import os, signal, sys
from rkd_cli.settings.resolve import resolve
from rkd_cli.data import loader
from rkd_cli.embedding.store import Store
from rkd_cli.events import silent
from rkd_cli.commands.embed import embed_file
from rkd_cli.settings import DistillSettings, EmbedSettings, EvaluateSettings
from rkd_cli.training.open import build_run
append = Store.append
def killed(part, rows, stamps):
    if part.done >= 32:
        part._file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    append(part, rows, stamps)
Store.append = killed
model, data, out = sys.argv[1:]
flags = {"batch": "16", "workers": "0", "device": "cpu", "data": data, "out": out}
embed_file(model, resolve(EmbedSettings, flags), silent)
"""


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path, suffix: str) -> None:
    model = build_model(NAME, 8, True)
    save_model(tmp_path / "m.safetensors", model.state_dict(), header_of(model, NAME, 36, 32, "folder"))
    out, whole = tmp_path / f"v{suffix}", tmp_path / f"whole{suffix}"
    killed = Forked(["-c", _KILLED, tmp_path / "m.safetensors", photos, out])
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert not out.exists()
    size = unfinished(out).stat().st_size
    assert size == 4096 + 32 * (8 + 8 * 4) + 4
    with pytest.MonkeyPatch.context() as patch:
        counted, decoded, decode = Counted(patch), list[object](), loader._decode

        def decoding(*arguments: Any) -> object:
            decoded.extend(arguments[-1])
            return decode(*arguments)

        patch.setattr(loader, "_decode", decoding)
        embedded(tmp_path / "m.safetensors", photos, out)
    assert counted.images == len(decoded) == 49 - 32
    embedded(tmp_path / "m.safetensors", photos, whole)
    assert out.read_bytes() == whole.read_bytes()
    assert not unfinished(out).exists()


def test_what_changed_is_embedded_anew(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "v.npz"
    other = build_model(NAME, 8, True)
    save_model(tmp_path / "other.safetensors", other.state_dict(), header_of(other, NAME, 36, 32, "folder"))

    def stopped_then(model: Path, **more: str) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            Counted(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                embedded(checkpoint, photos, out)
        changes[model]()
        events: list[Event] = []
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            embed_file(str(model), settings_for(photos, out, **more), events.append)
        assert counted.images == 49
        out.unlink()
        return [event.text for event in events if isinstance(event, Note)][1:]  # after that on what is no image

    changes: dict[Path, Callable[[], object]] = {
        checkpoint: lambda: [path.write_bytes(path.read_bytes() + b" ") for path in photos.rglob("*.jpg")],
        tmp_path / "other.safetensors": lambda: None,
    }
    begun = f"{out}: embedded before from {{}}. Starting over."
    assert stopped_then(checkpoint) == [begun.format("other images")]
    assert stopped_then(tmp_path / "other.safetensors") == [begun.format("another model")]
    changes[checkpoint] = lambda: None
    assert stopped_then(checkpoint, image_size="24") == [begun.format("another --resize or --image-size")]
    assert stopped_then(checkpoint, fit="crop") == [begun.format("another --fit")]
    changes[checkpoint] = lambda: monkeypatch.setattr(embed_file_module, "DECODER", 5)  # as of another version
    assert stopped_then(checkpoint) == [begun.format("another decoder")]


def test_photos_that_were_swapped_meanwhile_are_embedded_again(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    folder, out = min(photos.glob("2024/summer/*")), tmp_path / "v.npz"
    one, other = folder / "0-green.bmp", folder / "0-red.bmp"
    for path in (one, other):
        Image.new("RGB", (9, 9), path.stem[2:]).save(path)
        os.utime(path, ns=(5, 5))
    with pytest.MonkeyPatch.context() as patch:
        Counted(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            embedded(checkpoint, photos, out)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    embedded(checkpoint, photos, out)
    embedded(checkpoint, photos, tmp_path / "whole.npz")
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_two_at_once_is_one_line(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        open_store(unfinished(tmp_path / "v.npz"), {}, 8, busy=RkdError("")),
        pytest.raises(RkdError, match=r"v\.npz: another rkd embed is writing it"),
    ):
        embedded(checkpoint, photos, tmp_path / "v.npz")


@pytest.mark.parametrize("where", ["rows", "file"])
def test_a_full_disk_is_one_line_and_loses_nothing(checkpoint: Path, photos: Path, tmp_path: Path, where: str) -> None:
    out, append = tmp_path / "out/v.npz", Store.append

    def full(part: Store, rows: torch.Tensor, stamps: np.ndarray) -> None:
        if part.done >= 32:
            part._file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(part, rows, stamps)

    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((Store, "append", full) if where == "rows" else (os, "fsync", fsync)))
        with pytest.raises(RkdError) as caught:
            embedded(checkpoint, photos, out)
    (problem,) = caught.value.problems
    assert "cannot be written (No space left on device)" in problem
    assert [path.name for path in out.parent.iterdir()] == [unfinished(out).name]
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        embedded(checkpoint, photos, out)
    assert counted.images == (49 - 32 if where == "rows" else 0)
    embedded(checkpoint, photos, tmp_path / "whole.npz")
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_disk_that_is_too_small_is_one_line_before_the_work(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkd_cli.commands.embed._embed", None)
    needed = 49 * (4 * 8 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(RkdError, match=r"v\.npz: needs 0 MB while it is written"):
        embedded(checkpoint, photos, tmp_path / "v.npz", vectors="int8")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_bytes_and_bits_are_measured_and_bits_teach_nothing(
    checkpoint: Path, photos: Path, tiny_set: Path, tmp_path: Path, suffix: str
) -> None:
    images = photos / "2024/summer"
    whole = embedded(checkpoint, images, tmp_path / "whole.npz")
    flags = {"dataset": "folder", "data": str(images), "device": "cpu"}
    for kind in ("float16", "int8", "binary"):
        out = tmp_path / f"{kind}{suffix}"
        found = embedded(checkpoint, images, out, vectors=kind)
        assert found.kind == kind
        expected = {
            "float16": whole.embeddings.astype(np.float16).astype(np.float32),
            "int8": np.round(whole.embeddings / (abs(whole.embeddings).max(0) / 127))
            * abs(whole.embeddings).max(0)
            / 127,
            "binary": np.where(whole.embeddings > whole.embeddings.mean(0, np.float64), 1, -1),
        }[kind]
        unit = load_model(checkpoint).l2normalize
        if kind == "int8" and unit:
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert found.embeddings == pytest.approx(expected, abs=1e-6)
        (result,) = evaluate_models([str(out)], resolve(EvaluateSettings, flags), silent)
        assert (result.size, result.l2normalize) == (8, unit and kind != "binary")
    with pytest.raises(
        RkdError, match=r"--gallery: .*binary.* has binary embeddings, which cannot be compared with floats"
    ):
        flags_of_two = flags | {"gallery": str(tmp_path / f"binary{suffix}")}
        evaluate_models([str(checkpoint)], resolve(EvaluateSettings, flags_of_two), silent)
    distill = {
        **flags,
        "teacher": str(tmp_path / f"binary{suffix}"),
        "save_dir": str(tmp_path / "s"),
        "weights": "none",
    }
    with pytest.raises(RkdError, match=r"binary.*: binary embeddings have no distances"):
        build_run(resolve(DistillSettings, distill), silent)
    with pytest.raises(RkdError, match=r"binary.*: binary embeddings cannot be converted"):
        embedded(tmp_path / f"binary{suffix}", images, tmp_path / "again.npz")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"out": "{tmp}/there.npz"}, "--out {tmp}/there.npz: already exists. Name another file, or pass --overwrite"),
        ({"out": "{tmp}/v.txt"}, "--out {tmp}/v.txt: must end in .npy, .npz, .parquet or .safetensors"),
        (
            {"out": "{tmp}/v.npy", "vectors": "int8"},
            "--out {tmp}/v.npy: .npy cannot store the scales of --vectors int8",
        ),
        ({"out": "{tmp}/taken.npy"}, "--out {tmp}/taken.npy.paths.txt: already exists"),
        ({"data": "{tmp}/none"}, "{tmp}/none: no such folder"),
        ({"data": "{tmp}/empty"}, "{tmp}/empty: contains no images"),
        ({"pca": "9"}, "--pca 9: {checkpoint} has 8 dimensions. Use --pca 8 or less"),
        ({"pca": "5", "data": "{tmp}/five"}, "--pca 5: {tmp}/five has 5 images. Use --pca 4 or less"),
        ({"pca": "1", "data": "{tmp}/one"}, "--pca 1: {tmp}/one has 1 images. It needs two or more"),
        ({"pca": "0"}, "--pca: must be from 1 to 65536, got 0"),
        ({"pca": ""}, "--pca: must be a number or a file"),
        ({"pca": "a.npz", "half_whiten": "true"}, "--half-whiten: --pca a.npz applies the map of that file as it is"),
        ({"pca": "{tmp}/none.npz"}, "--pca {tmp}/none.npz: no such file"),
        ({"pca": "{tmp}/empty"}, "--pca {tmp}/empty: no such file"),
        ({"pca": "{checkpoint}"}, "--pca {checkpoint}: is not a vectors file"),
        ({"pca": "{tmp}/there.npz"}, "--pca {tmp}/there.npz: contains no PCA"),
        ({"pca": "{tmp}/mapped.npz"}, "--pca {tmp}/mapped.npz: its PCA is for 5 dimensions, but {checkpoint} has 8"),
        ({"weights": "{tmp}/w.pth"}, "--weights {tmp}/w.pth: needs one timm:NAME or torchvision:NAME"),
        ({"resize": "20"}, "--image-size 32: is larger than --resize 20"),
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
    monkeypatch.setattr("rkd_cli.commands.embed._embed", None)
    monkeypatch.setattr("rkd_cli.commands.embed.VectorsEmbedder.embed", None)
    (tmp_path / "taken.npy.paths.txt").touch()
    for name, count in {"empty": 0, "one": 1, "five": 5}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            shutil.copy(photos / "alone.jpg", tmp_path / name / f"{i}.jpg")
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
    with pytest.raises(RkdError, match=f"--l2normalize {not unit}: {checkpoint} has {unit}"):
        embedded(checkpoint, photos, tmp_path / "v.npz", l2normalize=not unit)
