"""Evaluating networks and files: what they are, what is left out, other galleries, shorter and smaller vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import rkd_cli
from rkd_cli.cli import main
from rkd_cli.commands.embed import embed_file
from rkd_cli.commands.evaluate import Evaluation, choose_dataset, evaluate_models
from rkd_cli.commands.options import open_named
from rkd_cli.commands.search import search
from rkd_cli.compress import to_int8, to_signs
from rkd_cli.data import load_dataset
from rkd_cli.data.loader import Batch
from rkd_cli.data.splits import relative_names, seen_classes
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder, VectorsEmbedder
from rkd_cli.embedding.vectors import Vectors, read_vectors, write_vectors
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.metrics import asymmetric_recall_at_k, paired_bootstrap, recall_at_k, rescored_recall_at_k
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import TeacherSpace, header_of, tensors_of
from rkd_cli.runtime.context import make_context
from rkd_cli.screen.tables import show_evaluations
from rkd_cli.settings import EmbedSettings, EvaluateSettings, SearchSettings
from rkd_cli.settings.resolve import resolve

BINARY_2, BINARY_6 = ([(size, "binary", 1), (size, "binary+rescore", 1)] for size in (2, 6))
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
    header = header.model_copy(update={"epoch": 3})
    save_model(tmp_path / "best.safetensors", model.state_dict(), header)
    return tmp_path / "best.safetensors"


def evaluated(checkpoint: Path, data: Path, **more: str | bool) -> tuple[Evaluation, list[str]]:
    """What is measured, and the notes."""
    events: list[Event] = []
    settings = resolve(EvaluateSettings, SMALL | {"data": str(data)} | more)
    (evaluation,) = evaluate_models([str(checkpoint)], settings, events.append)
    return evaluation, [event.text for event in events if isinstance(event, Note)]


def test_unseen_classes_are_not_named(checkpoint: Path, folder: Path) -> None:
    evaluation, notes = evaluated(checkpoint, folder)
    assert evaluation.seen == ()
    assert notes == []


def test_a_network_costs_bytes_and_time_and_a_file_of_embeddings_none(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    evaluation, _ = evaluated(checkpoint, folder)
    assert evaluation.file_bytes == checkpoint.stat().st_size
    assert evaluation.milliseconds and 0.1 < evaluation.milliseconds < 1e4
    assert evaluation.threads == torch.get_num_threads()
    vectors = vectors_of(folder, tmp_path / "v.npz", seed=1)
    (other,) = evaluate_models([str(vectors)], settings_for(folder), silent)
    assert (other.file_bytes, other.milliseconds) == (None, None)


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
    assert note.endswith("so its recall is too high")


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
    assert evaluation.train
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
        "Evaluating train images: CUDA out of memory. Tried to allocate 9 GiB. Use a smaller --batch or --image-size."
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


def settings_for(data: Path, **more: str | bool) -> EvaluateSettings:
    return resolve(EvaluateSettings, SMALL | {"data": str(data), "dataset": "folder"} | more)


def vectors_of(folder: Path, path: Path, size: int = 6, seed: int = 0, of: str = "*/*.jpg") -> Path:
    """A file of embeddings of the images, each class about a center of its own."""
    images = sorted(folder.glob(of))
    classes = [int(image.parent.name[:3]) for image in images]
    centers = torch.randn(9, size, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(len(images), size, generator=torch.Generator().manual_seed(seed))
    write_vectors(path, (centers[classes] + noise).numpy(), relative_names(images, folder))
    return path


def test_rows_of_zeros_are_named_and_not_measured(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = vectors_of(folder, tmp_path / "v.npz", 8)
    with np.load(path) as file:
        embeddings, names = F.normalize(torch.from_numpy(file["embeddings"])).numpy(), file["paths"]
    keep = np.arange(48) % 5 != 1
    np.savez(tmp_path / "some.npz", embeddings=embeddings[keep], paths=names[keep])
    embeddings[~keep] = 0
    np.savez(path, embeddings=embeddings, paths=names)
    unseen = int((~keep[24:]).sum())
    events: list[Event] = []
    found, without = (
        evaluate_models([str(checkpoint), str(file)], settings_for(folder, gallery=str(file)), events.append)
        for file in (path, tmp_path / "some.npz")
    )
    assert found[1].eval == without[1].eval
    assert found[1].l2normalize
    assert found[1].eval.images == 24 - unseen
    assert [v.recall for v in found[0].variants] == [v.recall for v in without[0].variants]
    said = f"{path}: a row of zeros, which has no direction, for {(~keep).sum()} images, first {names[1]}: left out"
    assert said in [event.text for event in events if isinstance(event, Note)]


def student_at(checkpoint: Path, path: Path, space: TeacherSpace, l2normalize: bool = True) -> torch.nn.Module:
    """The network of ``checkpoint`` as one that was trained in a teacher's space."""
    model = load_model(checkpoint)
    model.teacher_space, model.l2normalize = space, l2normalize
    save_model(path, tensors_of(model), header_of(model, "shufflenet_v2_x0_5", 36, 32, "folder"))
    return model


def pair_of(checkpoint: Path, vectors: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 8) by the network and (N, D) of the file, of the unseen images, and their labels."""
    images = sorted(folder.glob("*/*.jpg"))[24:]
    rows = read_vectors(vectors)
    gallery = torch.from_numpy(rows.embeddings[[rows.row[name] for name in relative_names(images, folder)]])
    return torch.from_numpy(rkd_cli.load(checkpoint, device="cpu").embed(images)), gallery, torch.arange(24) // 6


def variants_of(
    student: Path, gallery: Path, folder: Path, **more: str
) -> tuple[dict[int, dict[int, float]], list[str]]:
    """{queries' size: recall} in the gallery, and the notes."""
    events: list[Event] = []
    settings = settings_for(folder, gallery=str(gallery), **more)
    found, _ = evaluate_models([str(student)], settings, events.append)
    recalls = {v.size: v.recall for v in found.variants if v.gallery}
    return recalls, [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("l2normalize", [True, False])
def test_queries_are_projected_to_a_gallery_of_the_teachers_size(
    folder: Path, checkpoint: Path, tmp_path: Path, unit: bool, l2normalize: bool
) -> None:
    gallery, weights = vectors_of(folder, tmp_path / "v.npz", size=6), {8: torch.randn(6, 8), 4: torch.randn(6, 4)}
    student_at(checkpoint, tmp_path / "s.safetensors", TeacherSpace(6, unit, weights), l2normalize)
    x, rows, labels = pair_of(tmp_path / "s.safetensors", gallery, folder)
    found, notes = variants_of(tmp_path / "s.safetensors", gallery, folder, dims="3,4,6")
    assert {*found} == {8, 4}
    for size, weight in weights.items():
        prefix = F.normalize(x[:, :size]) if l2normalize else x[:, :size]
        queries = prefix.double() @ weight.double().T
        due = asymmetric_recall_at_k(
            F.normalize(queries) if unit else queries, F.normalize(rows.double()) if unit else rows.double(), labels
        )
        assert found[size] == due
    assert f"{tmp_path}/s.safetensors: its queries are projected to the 6 dimensions of --gallery" in notes
    assert any(note.startswith("--dims 3,6: ") and "has no projection of them" in note for note in notes)
    assert any("compared at unit length" in note for note in notes) == unit


@pytest.mark.parametrize("how", ["unit", "given", None])
def test_a_gallery_is_compared_as_the_student_learned_it(
    folder: Path, checkpoint: Path, tmp_path: Path, how: str | None
) -> None:
    gallery = vectors_of(folder, tmp_path / "v.npz", size=8)
    if how:
        student_at(checkpoint, tmp_path / "s.safetensors", TeacherSpace(8, how == "unit", {}))
    else:
        shutil.copy(checkpoint, tmp_path / "s.safetensors")
    x, rows, labels = pair_of(tmp_path / "s.safetensors", gallery, folder)
    found, notes = variants_of(tmp_path / "s.safetensors", gallery, folder, dims="4")
    raw, scaled = (asymmetric_recall_at_k(x, other, labels) for other in (rows, F.normalize(rows)))
    assert raw != scaled
    assert found[8] == (scaled if how == "unit" else raw)
    prefix = F.normalize(rows)[:, :4] if how == "unit" else rows[:, :4]
    cut = F.normalize(prefix) if how == "unit" else prefix
    assert found[4] == asymmetric_recall_at_k(F.normalize(x[:, :4]), cut, labels)
    said = f"--gallery {gallery}: compared at unit length, as in the training of {tmp_path}/s.safetensors"
    assert (said in notes) == (how == "unit")


def test_a_students_own_vectors_are_no_teachers(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    student_at(checkpoint, tmp_path / "s.safetensors", TeacherSpace(8, True, {}), l2normalize=False)
    flags = {"data": str(folder), "out": str(tmp_path / "own.npz"), "workers": "0", "device": "cpu"}
    embed_file(str(tmp_path / "s.safetensors"), resolve(EmbedSettings, flags), silent)
    x, rows, labels = pair_of(tmp_path / "s.safetensors", tmp_path / "own.npz", folder)
    found, notes = variants_of(tmp_path / "s.safetensors", tmp_path / "own.npz", folder)
    assert found[8] == asymmetric_recall_at_k(x, rows, labels)
    assert notes == []


def test_a_gallery_of_another_size_without_a_projection_is_refused(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    gallery = vectors_of(folder, tmp_path / "v.npz", size=6)
    student_at(checkpoint, tmp_path / "s.safetensors", TeacherSpace(5, True, {8: torch.randn(5, 8)}))
    with pytest.raises(SettingsError, match=r"has 6 dimensions, but .* has 8"):
        variants_of(tmp_path / "s.safetensors", gallery, folder)


def test_a_file_is_measured_as_its_embeddings(folder: Path, tmp_path: Path) -> None:
    path = vectors_of(folder, tmp_path / "v.npz")
    (found,) = evaluate_models([str(path)], settings_for(folder), silent)
    x = torch.from_numpy(read_vectors(path).embeddings)
    labels = torch.arange(8).repeat_interleave(6)
    assert found.train and (found.header, found.size, found.l2normalize) == (None, 6, False)
    assert found.train.recall == recall_at_k(x[:24], labels[:24], (1, 2, 4, 8))
    assert found.eval.recall == recall_at_k(x[24:], labels[24:], (1, 2, 4, 8))
    (unit,) = evaluate_models([str(path)], settings_for(folder, l2normalize=True), silent)
    assert unit.eval.recall == recall_at_k(F.normalize(x[24:], dim=1), labels[24:], (1, 2, 4, 8))
    assert unit.eval.recall != found.eval.recall


def test_images_without_an_embedding_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    path = vectors_of(folder, tmp_path / "v.npz", of="*/*[1-5].jpg")
    events: list[Event] = []
    (found,) = evaluate_models([str(path)], settings_for(folder), events.append)
    kept = len(read_vectors(path).row)
    (note,) = [event.text for event in events if isinstance(event, Note)]
    first = next(
        name for name in relative_names(sorted(folder.glob("*/*.jpg")), folder) if name not in read_vectors(path).row
    )
    assert note == f"{path}: no embedding of {48 - kept} images, first {first}: left out"
    assert found.train and found.train.images + found.eval.images == kept
    vectors_of(folder, path, of="00[5-8]*/*.jpg")
    (found,) = evaluate_models([str(path)], settings_for(folder), silent)
    assert (found.train, found.eval.images) == (None, 24)
    vectors_of(folder, path, of="00[1-4]*/*.jpg")
    with pytest.raises(DataError, match="no embedding of the eval images"):
        evaluate_models([str(path)], settings_for(folder), silent)


def test_another_gallery_stands_beside_both_symmetric_figures(folder: Path, tmp_path: Path) -> None:
    mine = vectors_of(folder, tmp_path / "mine.npz", seed=1)
    other = vectors_of(folder, tmp_path / "other.npz", seed=2, of="*/*[2-6].jpg")
    found, its = evaluate_models([str(mine)], settings_for(folder, gallery=str(other)), silent)
    assert (found.name, its.name) == (str(mine), str(other))
    names = [name for name in sorted(read_vectors(other).row) if name >= "005"]
    labels = torch.tensor([int(name[:3]) for name in names])
    queries, gallery = (
        torch.stack([torch.from_numpy(read_vectors(path).embeddings[read_vectors(path).row[name]]) for name in names])
        for path in (mine, other)
    )
    (crossed,) = found.variants
    assert (crossed.gallery, crossed.size, crossed.vectors, crossed.bytes) == (str(other), 6, "float", 24)
    assert crossed.recall == asymmetric_recall_at_k(queries, gallery, labels)
    assert crossed.recall != asymmetric_recall_at_k(gallery, queries, labels)
    assert (its.variants, its.eval.images) == ((), len(names))
    both = evaluate_models([str(mine), str(other)], settings_for(folder, gallery=str(other)), silent)
    assert both == [found, its]


def test_the_difference_of_two_models_has_an_interval(folder: Path, tmp_path: Path) -> None:
    paths = [vectors_of(folder, tmp_path / f"{seed}.npz", seed=seed) for seed in (1, 2)]
    settings = settings_for(folder, bootstrap="500", bootstrap_seed="3")
    first, second = evaluate_models([str(path) for path in paths], settings, silent)
    assert not second.against
    hits = []
    for path in paths:
        names = [name for name in sorted(read_vectors(path).row) if name >= "005"]
        labels = torch.tensor([int(name[:3]) for name in names])
        rows = torch.from_numpy(read_vectors(path).embeddings[[read_vectors(path).row[name] for name in names]])
        nearest = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf).argmin(dim=1)
        hits.append(labels[nearest] == labels)
    assert first.against == {str(paths[1]): paired_bootstrap(hits[0], hits[1], labels, 500, 3)}
    assert first.against[str(paths[1])].difference == pytest.approx(first.eval.recall[1] - second.eval.recall[1])
    fewer = vectors_of(folder, tmp_path / "fewer.npz", of="*/*[2-6].jpg")
    with pytest.raises(DataError, match=r"^--bootstrap: .*1.npz and .*fewer.npz do not have embeddings of the same"):
        evaluate_models([str(paths[0]), str(fewer)], settings, silent)
    with pytest.raises(SettingsError, match=r"^--bootstrap 500: compares models. Name another, or omit the flag.$"):
        evaluate_models([str(paths[0])], settings, silent)


def test_shorter_and_smaller_vectors_have_a_row_each(folder: Path, tmp_path: Path) -> None:
    path = vectors_of(folder, tmp_path / "v.npz")
    flags: dict[str, str | bool] = {"dims": "2,6", "vectors": "float,int8,binary", "recall": "1,3", "l2normalize": True}
    (found,) = evaluate_models([str(path)], settings_for(folder, **flags), silent)
    kinds = [(variant.size, variant.vectors, variant.bytes) for variant in found.variants]
    assert kinds == [
        (6, "int8", 6), (6, "binary", 1), (6, "binary+rescore", 1),
        (2, "float", 8), (2, "int8", 2), (2, "binary", 1), (2, "binary+rescore", 1),
    ]  # fmt: skip
    (without_whole,) = evaluate_models([str(path)], settings_for(folder, **flags | {"dims": "2"}), silent)
    assert without_whole.variants == found.variants  # --dims adds prefixes to the whole embedding
    x = F.normalize(torch.from_numpy(read_vectors(path).embeddings[24:]), dim=1)
    labels = torch.arange(4).repeat_interleave(6)
    short = F.normalize(x[:, :2], dim=1)
    assert found.variants[3].recall == recall_at_k(short, labels, (1, 3))
    codes, scales = to_int8(x)
    assert found.variants[0].recall == asymmetric_recall_at_k(x, codes * scales, labels, (1, 3))
    bits = to_signs(x, x.mean(dim=0))
    assert found.variants[1].recall == recall_at_k(bits, labels, (1, 3))
    rescored = rescored_recall_at_k(x - x.mean(dim=0), bits, bits, bits, labels, (1, 3))
    assert found.variants[2].recall == rescored


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("unit", [True, None])
def test_prefixes_of_a_smaller_file_have_the_length_of_the_model(
    folder: Path, tmp_path: Path, suffix: str, kind: str, unit: bool | None
) -> None:
    images = sorted(folder.glob("*/*.jpg"))
    noise = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    centers = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(6, dim=0)
    rows = F.normalize(centers + 0.8 * noise, dim=1)
    rows = F.normalize(rows * torch.linspace(1, 0.1, 16), dim=1)  # prefixes of very different lengths
    names = relative_names(images, folder)
    write_vectors(tmp_path / "v.npz", rows.numpy(), names)
    write_vectors(tmp_path / f"small{suffix}", rows.numpy(), names, None, kind, unit=unit)
    settings = settings_for(folder, dims="4,12", vectors="binary")
    whole, small = (
        evaluate_models([str(path)], settings, silent)[0] for path in (tmp_path / "v.npz", tmp_path / f"small{suffix}")
    )
    assert whole.l2normalize
    assert small.l2normalize
    expected = {variant.size: variant.recall for variant in whole.variants if variant.vectors == "binary"}
    found = {variant.size: variant.recall for variant in small.variants if variant.vectors == "binary"}
    assert (found[4], found[12]) == (expected[4], expected[12])


@pytest.mark.parametrize(
    ("kind", "finer", "expected"),
    [
        ("float16", "float", [(6, "int8", 6), *BINARY_6, (2, "float16", 4), (2, "int8", 2), *BINARY_2]),
        ("int8", "float", [*BINARY_6, (2, "int8", 2), *BINARY_2]),
        ("binary", "float,int8", [(2, "binary", 1)]),
    ],
)
def test_a_file_is_not_measured_finer_than_it_stores(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    finer: str,
    expected: list[tuple[int, str, int]],
) -> None:
    path, events = tmp_path / "small.npz", list[Event]()
    rows = read_vectors(vectors_of(folder, tmp_path / "v.npz"))
    write_vectors(path, rows.embeddings, list(rows.row), None, kind)
    flags: dict[str, str | bool] = {"dims": "2,6", "vectors": "float,int8,binary"}
    (found,) = evaluate_models([str(path)], settings_for(folder, **flags), events.append)
    assert [(variant.size, variant.vectors, variant.bytes) for variant in found.variants] == expected
    assert (found.vectors, found.vector_bytes) == (kind, {"float16": 12, "int8": 6, "binary": 1}[kind])
    show_evaluations([found], as_json=False)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in table if row[3:4] == ["train"]] == [["6", kind, str(found.vector_bytes)]]
    x, labels = torch.from_numpy(read_vectors(path).embeddings[24:]), torch.arange(4).repeat_interleave(6)
    (stored,) = (variant.recall for variant in found.variants if (variant.size, variant.vectors) == (2, kind))
    assert stored == recall_at_k(x[:, :2], labels, (1, 2, 4, 8))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == [f"{path}: stores {kind} vectors, so --vectors {finer} is not measured"]
    events.clear()
    (found,) = evaluate_models([str(path)], settings_for(folder, dims="2"), events.append)
    assert [(variant.size, variant.vectors, variant.recall) for variant in found.variants] == [(2, kind, stored)]
    assert not [event for event in events if isinstance(event, Note)]


def test_a_gallery_is_measured_as_its_file_stores_it(folder: Path, tmp_path: Path) -> None:
    mine, other = (vectors_of(folder, tmp_path / f"{seed}.npz", seed=seed) for seed in (1, 2))
    rows = read_vectors(other)
    write_vectors(other, rows.embeddings, list(rows.row), None, "int8")
    found, _ = evaluate_models([str(mine)], settings_for(folder, gallery=str(other), vectors="float,int8"), silent)
    queries, gallery = (torch.from_numpy(read_vectors(path).embeddings[24:]) for path in (mine, other))
    own, crossed = found.variants
    assert (own.gallery, own.vectors, own.bytes) == (None, "int8", 6)
    assert (crossed.gallery, crossed.vectors, crossed.bytes) == (str(other), "int8", 6)
    assert crossed.recall == asymmetric_recall_at_k(queries, gallery, torch.arange(4).repeat_interleave(6))


def test_a_smaller_gallery_is_calibrated_on_itself(folder: Path, tmp_path: Path) -> None:
    mine, other = (vectors_of(folder, tmp_path / f"{seed}.npz", seed=seed) for seed in (1, 2))
    found, _ = evaluate_models([str(mine)], settings_for(folder, gallery=str(other), vectors="int8,binary"), silent)
    queries, gallery = (torch.from_numpy(read_vectors(path).embeddings[24:]) for path in (mine, other))
    labels, mean = torch.arange(4).repeat_interleave(6), gallery.mean(dim=0)
    codes, scales = to_int8(gallery)
    bits = to_signs(queries, mean), to_signs(gallery, mean)
    expected = {
        "float": asymmetric_recall_at_k(queries, gallery, labels),
        "int8": asymmetric_recall_at_k(queries, codes * scales, labels),
        "binary": asymmetric_recall_at_k(*bits, labels),
        "binary+rescore": rescored_recall_at_k(queries - mean, bits[1], *bits, labels),
    }
    assert {variant.vectors: variant.recall for variant in found.variants if variant.gallery} == expected


def test_a_pretrained_network_is_measured_by_cosine_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    name = "shufflenet_v2_x0_5"
    torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / "w.pth")
    flags: dict[str, str | bool] = {"weights": str(tmp_path / "w.pth"), "resize": "36", "image_size": "32"}
    found = {}
    for unit in (True, False):
        settings = settings_for(folder, l2normalize=unit, **flags)
        (found[unit],) = evaluate_models([f"torchvision:{name}"], settings, silent)
        assert (found[unit].size, found[unit].l2normalize) == (1024, unit)
    assert found[True].eval != found[False].eval
    assert evaluate_models([f"torchvision:{name}"], settings_for(folder, **flags), silent) == [found[True]]


def test_no_l2normalize_is_for_the_pretrained_network_beside_a_checkpoint(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    path = vectors_of(folder, tmp_path / "v.npz", size=8)
    settings = settings_for(folder, l2normalize=False, gallery=str(path))
    found, its = evaluate_models([str(checkpoint.parent)], settings, silent)  # a run's directory
    assert (found.name, found.l2normalize, its.l2normalize) == (str(checkpoint.parent), True, False)


@pytest.mark.parametrize(("epoch", "select_on", "told"), [(0, "eval", True), (1, "eval", False), (0, None, False)])
def test_a_network_that_was_saved_before_training_is_named(
    checkpoint: Path, folder: Path, epoch: int, select_on: str | None, told: bool
) -> None:
    header = read_header(checkpoint).model_copy(update={"epoch": epoch, "select_on": select_on})
    save_model(checkpoint, load_model(checkpoint).state_dict(), header)
    says = f"{checkpoint} is from epoch 0, before training: no epoch of its run was better"
    assert evaluated(checkpoint, folder)[1] == [says] * told


def test_embed_and_search_say_that_a_network_is_untrained(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    header = read_header(checkpoint).model_copy(update={"epoch": 0})
    save_model(checkpoint, load_model(checkpoint).state_dict(), header)
    events: list[Event] = []
    flags = SMALL | {"data": str(folder)}
    embed_file(str(checkpoint), resolve(EmbedSettings, flags | {"out": str(tmp_path / "v.npz")}), events.append)
    query = str(next(folder.rglob("*.jpg")))
    flags = SMALL | {"gallery": str(folder), "query": query, "cache_dir": str(tmp_path / "cache")}
    search(str(checkpoint), resolve(SearchSettings, {k: v for k, v in flags.items() if k != "cache"}), events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert sum("is from epoch 0, before training" in note for note in notes) == 2


def test_a_recall_that_is_not_that_of_the_run_is_named(checkpoint: Path, folder: Path) -> None:
    def recorded(recall: dict[int, float], **more: str) -> list[str]:
        header = read_header(checkpoint).model_copy(update={"eval_recall": recall})
        save_model(checkpoint, load_model(checkpoint).state_dict(), header)
        return evaluated(checkpoint, folder, **more)[1]

    now = evaluated(checkpoint, folder)[0].eval.recall
    assert recorded(now) == []
    other = now | {2: now[2] / 2}
    says = f"{checkpoint}: Recall@2 is {100 * now[2]:.2f} here and was {50 * now[2]:.2f} in its run: "
    assert recorded(other) == [f"{says}the images or the way to embed them changed"]
    assert recorded(other, image_size="30") == []  # asked for


@pytest.mark.parametrize(("asked", "expected"), [({}, 6), ({"batch": "16"}, 16)])
def test_a_checkpoint_is_evaluated_in_the_batches_of_its_run(
    checkpoint: Path, folder: Path, asked: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"dataset": "folder", "data": str(folder), "batch": 12, "chunk": 6}
    checkpoint.with_name("settings.json").write_text(json.dumps(run))
    sizes: list[int] = []
    forward = EmbeddingNet.forward

    def recorded(self: EmbeddingNet, images: torch.Tensor, with_features: bool = False) -> Any:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(EmbeddingNet, "forward", recorded)
    flags = {name: value for name, value in SMALL.items() if name != "batch"} | {"data": str(folder)}
    evaluate_models([str(checkpoint)], resolve(EvaluateSettings, {**flags, **asked}), silent)
    assert max(sizes) == expected


def test_the_images_of_a_run_are_found_where_the_run_had_them(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(**more: str | bool) -> list[str]:
        events: list[Event] = []
        evaluate_models([str(checkpoint)], resolve(EvaluateSettings, SMALL | more), events.append)
        return [event.text for event in events if isinstance(event, Note)]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = {"dataset": "folder", "data": str(folder)}
    kept = checkpoint.with_name("settings.json")
    kept.write_text(json.dumps(saved))
    assert measured() == [f"--data {folder}, as in the run of {checkpoint}"]
    for given in ({"data": "data"}, {"dataset": "cub200"}):
        with pytest.raises(DataError, match=r"^data"):
            measured(**given)
    for other in ("{", json.dumps(saved | {"data": "gone"}), json.dumps(saved | {"data": 3})):
        kept.write_text(other)
        with pytest.raises(DataError, match=r"^data: no such folder"):
            measured()


def test_runs_of_images_in_different_folders_want_one_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    names = []
    for number, data in enumerate((folder, folder.parent)):
        run = tmp_path / f"run{number}"
        run.mkdir()
        shutil.copy(checkpoint, run)
        (run / "settings.json").write_text(json.dumps({"dataset": "folder", "data": str(data)}))
        names.append(str(run))
    with pytest.raises(SettingsError, match=rf"run0 used {folder} and .*/run1 used {folder.parent}. Name one folder"):
        evaluate_models(names, resolve(EvaluateSettings, SMALL), silent)


def looked_up(dataset: str | None, model: Path) -> Embedder:
    """A checkpoint of ours, or, of no data set, embeddings in a file."""
    if dataset is None:
        vectors = Vectors(Path("v.npz"), np.ones((1, 8), np.float32), {"a": 0}, "digest")
        return VectorsEmbedder("v.npz", "v.npz", vectors, True, False)
    header = read_header(model).model_copy(update={"dataset": dataset})
    return NetworkEmbedder("m", str(model), "digest", header)


@pytest.mark.parametrize(
    ("asked", "own", "data", "measured"),
    [
        (None, "folder", "photos", "folder"),
        (None, "folder", None, "folder"),
        (None, "cub200", "photos", "folder"),  # of which nobody would download CUB into that folder
        (None, "cub200", "cub", "cub200"),
        (None, "folder", "cub", "cub200"),
        (None, None, "photos", "folder"),
        (None, None, "cub", "cub200"),
        ("auto", "cub200", "photos", "folder"),
        ("auto", None, "cub", "cub200"),
        ("sop", "cub200", "photos", "sop"),
    ],
)
def test_the_set_that_a_model_is_measured_on(
    checkpoint: Path, folder: Path, tiny_set: Path, asked: str | None, own: str | None, data: str | None, measured: str
) -> None:
    places = {"photos": folder, "cub": tiny_set}
    settings = EvaluateSettings(data=places[data]) if data else EvaluateSettings()
    assert choose_dataset(looked_up(own, checkpoint), asked, settings, silent) == measured


def test_what_nobody_says_is_asked_for(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"v.npz: does not say which data set to use. Choose one with --dataset"):
        choose_dataset(looked_up(None, checkpoint), None, EvaluateSettings(), silent)
    with pytest.raises(DataError, match=r"absent/CUB_200_2011: no such folder. Download it"):
        evaluated(checkpoint, folder / "absent", dataset="cub200")


def test_flags_of_pixels_and_networks_are_refused_of_embeddings(folder: Path, tmp_path: Path) -> None:
    vectors = vectors_of(folder, tmp_path / "v.npz", seed=1)
    given = {"resize": "36", "image_size": "32", "precision": "fp32"}
    with pytest.raises(SettingsError) as caught:
        evaluate_models([str(vectors)], settings_for(folder, **given), silent)
    assert caught.value.problems == tuple(
        f"--{flag}: has no effect, because {vectors} is a vectors file. Omit the flag."
        for flag in ("resize", "image-size", "precision")
    )


def test_flags_of_pixels_are_taken_where_one_of_the_models_is_a_network(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    vectors = vectors_of(folder, tmp_path / "v.npz", seed=1)
    settings = settings_for(folder, resize="36", image_size="32")
    assert len(evaluate_models([str(vectors), str(checkpoint)], settings, silent)) == 2


def test_a_transformer_of_another_size_is_named(tmp_path: Path) -> None:
    path, notes = tmp_path / "vit.safetensors", list[Event]()
    model = build_model("timm:test_vit", 8, True, image_size=32)
    save_model(path, model.state_dict(), header_of(model, "timm:test_vit", 36, 32, "folder"))
    for size in ("32", "48"):
        open_named(str(path), resolve(EvaluateSettings, {"resize": "52", "image_size": size}), notes.append)
    (note,) = notes
    assert isinstance(note, Note)
    assert note.text == f"{path} only takes 32 pixel images. Images of 48 pixels are resized."
