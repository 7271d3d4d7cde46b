"""Evaluating checkpoints: classes they were trained on are named, damaged images left out where asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rkd_cli.cli import main
from rkd_cli.config.resolve import resolve
from rkd_cli.data import load_dataset
from rkd_cli.data.loader import Batch
from rkd_cli.data.splits import seen_classes
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Event, Note, silent
from rkd_cli.inference.embed import embed
from rkd_cli.inference.evaluate import Evaluation, evaluate_checkpoints
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.runtime.context import make_context
from rkd_cli.settings import EvaluateSettings

SMALL: dict[str, str | bool] = {"batch": "16", "workers": "0", "device": "cpu", "cache": "none"}


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """Eight class folders of six images; the network of ``checkpoint`` is trained on the first four."""
    return shutil.copytree(tiny_set / "images", tmp_path / "photos")


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    model = build_model("shufflenet_v2_x0_5", 8, True)
    seen = seen_classes(load_dataset("folder", folder)[0])
    header = header_of(model, "shufflenet_v2_x0_5", 36, 32, "folder", "eval", seen)
    save_model(tmp_path / "best.safetensors", model.state_dict(), header)
    return tmp_path / "best.safetensors"


def evaluated(checkpoint: Path, data: Path, **more: str | bool) -> tuple[Evaluation, list[str]]:
    """What is measured, and the notes."""
    events: list[Event] = []
    settings = resolve(EvaluateSettings, SMALL | {"data": str(data)} | more)
    (evaluation,) = evaluate_checkpoints([checkpoint], settings, events.append)
    return evaluation, [event.text for event in events if isinstance(event, Note)]


def test_unseen_classes_are_not_named(checkpoint: Path, folder: Path) -> None:
    evaluation, notes = evaluated(checkpoint, folder)
    assert evaluation.seen == ()
    assert notes == []


@pytest.mark.parametrize(("added", "seen"), [(0, 0), (2, 1), (4, 2), (8, 4)])
def test_class_folders_that_were_added_make_trained_classes_evaluation_classes(
    checkpoint: Path, folder: Path, added: int, seen: int
) -> None:
    names = sorted(path.name for path in folder.iterdir())
    for number in range(added):
        shutil.copytree(folder / names[-1], folder / f"000.added{number}")
        for path in (folder / f"000.added{number}").iterdir():
            path.write_bytes(path.read_bytes() + b" ")  # images of their own
    expected = sorted(names[:4])[4 - seen :]
    evaluation, notes = evaluated(checkpoint, folder)
    assert evaluation.seen == tuple(expected)
    if not seen:
        assert notes == []
        return
    (note,) = notes
    assert f"{checkpoint} was trained on {seen} of the evaluation classes ({', '.join(expected[:3])}" in note
    assert note.endswith("for it they are not unseen")


def test_seen_classes_are_in_the_json(
    checkpoint: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workers", "0", "--device", "cpu", "--cache", "none", "--json"]

    def found(data: Path) -> object:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", str(checkpoint), "--data", str(data), *arguments])
        assert not end.value.code
        return json.loads(capfd.readouterr().out)["seen_classes"]

    assert found(folder) == []
    trained, *_, untrained = sorted(path.name for path in folder.iterdir())
    swapped = tmp_path / "swapped"
    shutil.copytree(folder, swapped / "train")
    (swapped / "eval").mkdir()
    for name in (trained, untrained):
        (swapped / "train" / name).rename(swapped / "eval" / name)
    assert found(swapped) == [trained]


def test_damaged_images_are_left_out_where_asked_for(checkpoint: Path, folder: Path) -> None:
    images = sorted(folder.rglob("*.jpg"))
    images[2].write_bytes(b"")  # of a training class
    images[-1].write_bytes(images[-1].read_bytes()[:200])  # of an evaluation class
    with pytest.raises(DataError, match=str(images[2])):
        evaluated(checkpoint, folder)
    evaluation, notes = evaluated(checkpoint, folder, skip_damaged=True)
    assert (evaluation.train.images, evaluation.eval.images) == (23, 23)
    assert notes == [f"2 damaged images are left out, the first of them {images[2]}"]
    for path in (images[2], images[-1]):
        path.unlink()
    without, notes = evaluated(checkpoint, folder)
    assert (without.train, without.eval) == (evaluation.train, evaluation.eval)
    assert notes == []


def test_memory_that_is_full_is_one_line(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: EmbeddingNet, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand a long story")

    monkeypatch.setattr(EmbeddingNet, "forward", full)
    with pytest.raises(RunError) as caught:
        evaluated(checkpoint, folder)
    assert str(caught.value) == (
        "Evaluating training classes: CUDA out of memory. Tried to allocate 9 GiB: "
        "use a smaller --batch or --image-size"
    )


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_embeddings_are_fp32_whatever_the_network_computes_in(precision: str, dtype: torch.dtype) -> None:
    model = build_model("shufflenet_v2_x0_5", 8, True).train()
    inside: list[torch.dtype] = []
    model.base.get_submodule("conv5.0").register_forward_hook(lambda layer, given, made: inside.append(made.dtype))
    batches = [
        Batch(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), *[torch.arange(4) + 4 * n] * 3)
        for n in range(2)
    ]
    embeddings, labels = embed(model, batches, 8, make_context("cpu", precision), silent, "Embedding")
    assert inside == [dtype, dtype]
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (8, 8))
    assert labels.tolist() == list(range(8))
    assert not model.training
    with torch.no_grad():
        by_hand = torch.cat([model(batch.images) for batch in batches])
    assert torch.equal(embeddings, by_hand) == (precision == "fp32")
    assert torch.allclose(embeddings, by_hand, atol=0.05)
