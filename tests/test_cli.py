"""The commands, from flags to files and exit codes, as a user meets them."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flags import over
from forked import Forked
from rkd_cli import __version__
from rkd_cli.cli import main
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.events import RunDone
from rkd_cli.models import build_model
from rkd_cli.report.text import next_line
from rkd_cli.screen import terminal
from rkd_cli.settings.resolve import GRID

Rkd = Callable[..., tuple[int, str, str]]
SMALL = ["--weights", "none", "--resize", "36", "--image-size", "32", "--workers", "0", "--device", "cpu"]
STEPS = ["--batch", "8", "--num-image-per-class", "2", "--iter-per-epoch", "2", "--epochs", "2"]
TEACHER = ["train-teacher", "--base", "timm:test_resnet", "--embedding-size", "16", *SMALL, *STEPS]
STUDENT = ["distill", "--base", "timm:test_resnet", "--embedding-size", "8", *SMALL, *STEPS]


@pytest.fixture(scope="module")
def teacher(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained teacher's run directory."""
    run = tmp_path_factory.mktemp("runs") / "teacher"
    with pytest.raises(SystemExit) as end:
        main(over(TEACHER, "--data", str(tiny_set), "--save-dir", str(run), "--quiet", "--keep-state"))
    assert not end.value.code
    return run


def test_the_whole_story(rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    load = ["--teacher-load", teacher / "best.safetensors", "--triplet-ratio", "0.5"]
    code, out, err = rkd(*over(STUDENT, "--data", tiny_set, *load, "--save-dir", student))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.startswith("note: decoding 48 images once") for line in lines)
    assert "Distilling" in lines
    assert "1 dist + 2 angle + 0.5 triplet" in out
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [["epoch", f"{e}/2"] for e in range(3)]
    assert any(line.startswith("teacher  train R@1") for line in lines)

    result = json.loads((student / "result.json").read_text())
    best = result["best"]["eval"]["R@1"]
    assert lines[-1] == f"Best Train Recall: {result['best_train']['R@1']:.4f}, Best Eval Recall: {best:.4f}"
    metrics = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [0, 1, 2]
    assert set(metrics[1]["losses"]) == {"dist", "angle", "triplet"}
    assert best == max(row["figures"]["eval"]["R@1"] for row in metrics)
    files = {path.name for path in student.iterdir()}
    models = {"best.safetensors", "last.safetensors"}
    assert files == {"settings.json", "metrics.jsonl", "metrics.csv", "result.json", "README.md", ".lock"} | models
    table = list(csv.DictReader((student / "metrics.csv").read_text().splitlines()))
    assert [float(row["eval.R@1"]) for row in table] == [row["figures"]["eval"]["R@1"] for row in metrics]
    assert [row["losses.angle"] for row in table] == ["", *(str(row["losses"]["angle"]) for row in metrics[1:])]

    code, out, err = rkd("evaluate", student / "best.safetensors", "--data", tiny_set, "--json", "--workers", 0)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["base"], found["embedding_size"], found["dataset"]) == ("timm:test_resnet", 8, "cub200")
    assert found["eval_recall"]["1"] == best
    code, out, _ = rkd("evaluate", student / "best.safetensors", "--data", tiny_set, "--recall", "1,3", "--workers", 0)
    assert code == 0
    assert f"{100 * best:.2f}" in out
    assert "R@3" in out


def test_a_run_can_be_repeated_from_its_settings(rkd: Rkd, teacher: Path, tmp_path: Path) -> None:
    code, *_ = rkd("train-teacher", "--config", teacher / "settings.json", "--save-dir", tmp_path / "again")
    assert code == 0
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (teacher / name).read_bytes()


def test_seeds_are_trained_one_after_another(rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path) -> None:
    runs, alone = tmp_path / "runs", tmp_path / "alone"
    given = over(TEACHER, "--data", tiny_set, "--quiet")
    code, out, err = rkd(*given, "--seed", "1,7", "--save-dir", runs)
    assert (code, err) == (0, "")
    assert out.count("Best Eval Recall") == 2
    assert {path.name for path in runs.iterdir()} == {GRID, "seed-1", "seed-7"}
    assert (runs / "seed-1/last.safetensors").read_bytes() == (teacher / "last.safetensors").read_bytes()
    assert rkd(*given, "--seed", "7", "--save-dir", alone)[0] == 0
    assert (runs / "seed-7/last.safetensors").read_bytes() == (alone / "last.safetensors").read_bytes()

    shutil.rmtree(runs / "seed-7")  # as if it had been stopped before: the rest comes with the settings of the first
    code, _, err = rkd("train-teacher", "--resume", "--seed", "1,7", "--save-dir", runs, "--quiet")
    assert (code, err) == (0, "")
    assert (runs / "seed-7/last.safetensors").read_bytes() == (alone / "last.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ("1,1", "each value must appear once"),
        ("1,x", "must be a whole number, got x"),
        ("1,", "must be a whole number"),
    ],
)
def test_seeds_that_are_none(rkd: Rkd, tmp_path: Path, seeds: str, says: str) -> None:
    code, _, err = rkd("train-teacher", "--seed", seeds, "--save-dir", tmp_path / "runs")
    assert code == 2
    assert says in err
    assert not (tmp_path / "runs").exists()


def test_a_run_says_what_it_is(rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / 'a "quoted" run'
    given = over(STUDENT, "--data", tiny_set, "--teacher", teacher, "--seed", 3, "--save-dir", run, "--quiet")
    assert rkd(*given)[0] == 0
    text = (run / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n")
    result = json.loads((run / "result.json").read_text())
    assert f'{{type: "R@1", value: {100 * result["best"]["eval"]["R@1"]:.2f}}}' in front
    assert 'name: "a \\"quoted\\" run"' in front
    assert str(tmp_path) not in text
    assert str(tiny_set) not in text
    command = body.split("```sh\n")[1].split("\n```")[0]
    shown = [
        tiny_set if word == "DATA" else teacher if word == "TEACHER" else word for word in shlex.split(command)[1:]
    ]
    again = tmp_path / "again"
    assert rkd(*shown, "--save-dir", again, "--device", "cpu", "--workers", 0)[0] == 0
    assert (again / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()

    (run / "README.md").write_text("edited")
    assert rkd(*given, "--overwrite")[0] == 0
    assert (run / "README.md").read_text() == "edited"


def test_the_next_command_works_as_it_is_printed(
    rkd: Rkd, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(tiny_set, tmp_path / "my images")
    (damaged := sorted(data.rglob("*.jpg"))[3]).write_bytes(b"")

    def trained(done: RunDone) -> RunDone:  # whichever epoch is the best on a few images
        return replace(done, result=done.result.model_copy(update={"best_epoch": 1}))

    monkeypatch.setattr(terminal, "next_line", lambda run, done: next_line(run, trained(done)))

    def following(out: str) -> list[str]:
        *_, facts, line, last = out.splitlines()
        assert re.fullmatch(
            r"\w+/best\.safetensors: \d+\.\d MB, \d+\.\d M parameters, .+ ms an image \(one thread\)", facts
        )
        assert last.startswith("Best Train Recall: ")
        return shlex.split(line.removeprefix("next: rkd "))

    more = ["--base", "resnet18", "--data", data, "--select-on", "val", "--skip-damaged", "--batch", 4]
    code, out, err = rkd(*over(TEACHER, *more, "--epochs", 1))
    assert (code, err) == (0, "")
    command = following(out)
    assert command == [
        *["distill", "--teacher", "teacher", "--base", "mobilenet_v3_small", "--dataset", "cub200"],
        *["--data", str(data), "--resize", "36", "--image-size", "32"],
        *["--skip-damaged", "--select-on", "val", "--weights", "none"],
    ]
    code, out, err = rkd(*command, "--epochs", 1, "--iter-per-epoch", 1, "--workers", 0, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "--resize and --image-size" not in out
    command = following(out)
    assert command == ["evaluate", "student", "--skip-damaged"]
    code, out, err = rkd(*command, "--workers", 0)
    assert damaged.exists() and (code, err) == (0, "")
    command = shlex.split(out.splitlines()[-1].removeprefix("next: rkd "))
    assert command[:4] == ["search", "student", "--gallery", str(data)]
    assert rkd(*command, "--workers", 0)[0] == 0
    assert Path(command[-1]).read_text().startswith("<!DOCTYPE html>")


def test_curves_for_other_programs(rkd: Rkd, tiny_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = rkd(*over(TEACHER, "--data", tiny_set, "--log", "csv,tensorboard", "--quiet", "--save-dir", run))
    assert (code, err) == (0, "")
    rows = list(csv.DictReader((run / "steps.csv").read_text().splitlines()))
    # on a slow machine losses are read at other steps too
    assert {row["epoch"]: row["step"] for row in rows} == {"1": "2", "2": "2"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert float(rows[-1]["l2_triplet"]) == metrics[-1]["losses"]["l2_triplet"]
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(run / "tensorboard")).Reload()
    assert {2, 4} <= {scalar.step for scalar in found.Scalars("loss/l2_triplet")} <= {1, 2, 3, 4}
    recalls = [scalar.value for scalar in found.Scalars("eval/R@1")]
    assert recalls == pytest.approx([row["figures"]["eval"]["R@1"] for row in metrics])
    assert "settings/text_summary" in found.Tags()["tensors"]


def test_a_student_starts_from_a_checkpoint(rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path) -> None:
    load = ["--load", teacher / "last.safetensors", "--teacher-load", teacher / "last.safetensors", "--data", tiny_set]
    code, out, _ = rkd(
        *over(STUDENT, "--weights", None, "--embedding-size", 16, "--l2normalize", *load, "--save-dir", tmp_path / "s")
    )
    assert code == 0
    before, started = (line.split("eval")[1].split(" s")[0] for line in out.splitlines() if "train R@1" in line[:60])
    assert before.split()[:2] == started.split()[:2]  # as good as its teacher, being its teacher


def test_several_checkpoints_are_evaluated_in_one_table(rkd: Rkd, tiny_set: Path, teacher: Path) -> None:
    files = [teacher / "best.safetensors", teacher / "last.safetensors"]
    code, out, err = rkd("evaluate", *files, "--data", tiny_set, "--json", "--workers", 0)
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["checkpoint"] for one in found] == [str(file) for file in files]
    assert all(0 <= one["eval_map_at_r"] <= one["eval_r_precision"] <= 1 for one in found)
    code, out, _ = rkd("evaluate", *files, "--data", tiny_set, "--workers", 0, "--quiet")
    assert sum(line.strip().startswith("eval ") for line in out.splitlines()) == 2


def test_a_published_checkpoint_is_imported_and_evaluated(rkd: Rkd, tiny_set: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    torch.save(build_model("resnet18", 8, True).state_dict() | {"odd": torch.ones(1)}, path)
    flags = ["--base", "resnet18", "--embedding-size", 8, "--resize", 36, "--image-size", 32]
    code, out, _ = rkd("import-checkpoint", path, *flags)
    assert code == 0
    assert out.splitlines()[0] == f"note: {path}: loaded its tensors, ignored odd"
    assert "best.safetensors: 122 tensors of a resnet18" in out
    assert rkd("evaluate", tmp_path / "best.safetensors", "--data", tiny_set, "--workers", 0)[0] == 0
    code, _, err = rkd("import-checkpoint", path, "--base", "resnet18", "--embedding-size", 9, "--overwrite")
    assert code == 2
    assert "does not fit --base resnet18 --embedding-size 9" in err


def test_recipes_are_listed_and_run(rkd: Rkd, tiny_set: Path, tmp_path: Path) -> None:
    code, out, _ = rkd("recipes")
    assert code == 0
    assert "cub200-student-64" in out
    assert "58.68" in out
    flags = [*SMALL, *STEPS, "--base", "timm:test_resnet", "--data", tiny_set, "--save-dir", tmp_path / "run"]
    code, out, _ = rkd("train-teacher", "--config", "cub200-teacher", *flags)
    assert code == 0
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["sample"], settings["lr"], settings["batch"]) == ("distance-published", 1e-5, 8)


def test_version_and_help(rkd: Rkd) -> None:
    assert rkd("--version") == (0, f"rkd {__version__}\n", "")
    for command in (
        "train-teacher",
        "distill",
        "evaluate",
        "embed",
        "download-cub",
        "demo",
        "import-checkpoint",
        "recipes",
    ):
        code, out, _ = rkd(command, "--help")
        assert code == 0
        assert "--help" in out
        assert command in rkd("--help")[1]


def test_the_archive_becomes_the_data_set(rkd: Rkd, cub10_archive: Path, tmp_path: Path) -> None:
    code, out, err = rkd("download-cub", "--archive", cub10_archive, "--data", tmp_path)
    assert (code, err) == (0, "")
    assert f"CUB-200-2011 is in {tmp_path / 'CUB_200_2011'}" in out
    code, out, _ = rkd("download-cub", "--archive", cub10_archive, "--data", tmp_path)
    assert "already complete" in out


def checkpoint_like(path: Path) -> Path:
    save_file({"w": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["train-teacher", "--data", "{tmp}/none"],
            "none: no such folder. Name the folder of your images with --data",
        ),
        (["train-teacher", "--dataset", "folder", "--data", "{tmp}/none"], "none: no such folder"),
        (over(TEACHER, "--data", "{half}"), "40 of 48 images are missing"),
        (over(TEACHER, "--data", "{text}"), "cannot be decoded"),
        (over(TEACHER, "--data", "{set}", "--batch", "0"), "--batch: must be at least 2, got 0"),
        (over(TEACHER, "--data", "{set}", "--batch", "9"), "a batch of 9 with 2 images per class needs 5 classes"),
        (over(TEACHER, "--data", "{set}", "--config", "{tmp}/odd.toml"), "odd.toml: unknown key btach"),
        (over(TEACHER, "--data", "{set}", "--save-dir", "{teacher}"), "already has a run"),
        (over(TEACHER, "--data", "{set}", "--save-dir", "{tmp}/odd.toml"), "odd.toml: cannot be used (File exists)"),
        (over(TEACHER, "--data", "{set}", "--weights", "{tmp}/none.pth"), "none.pth: no such file"),
        (
            over(
                TEACHER,
                "--weights",
                None,
                "--data",
                "{set}",
                "--load",
                "{teacher}/best.safetensors",
                "--embedding-size",
                "9",
            ),
            "--embedding-size 9: ",
        ),
        (over(TEACHER, "--data", "{set}", "--device", "cuda:99"), "--device cuda:99"),
        (over(TEACHER, "--data", "{set}", "--device", "cuda:99999"), "--device: must be auto, cpu, cuda or cuda:N"),
        (over(TEACHER, "--data", "{set}", "--recall", "99999999999"), "--recall: must be at most"),
        (over(TEACHER, "--data", ""), "--data: must name a file or folder"),
        (over(TEACHER, "--config", "cub200-student-64"), "is a recipe for `rkd distill`"),
        (
            over(TEACHER, "--data", "{set}", "--base", "densenet121", "--resize", "8", "--image-size", "8"),
            "--image-size 8: densenet121 fails on this size",
        ),
        (["train-teacher", "--resume", "--save-dir", "{tmp}/none"], "none contains no run"),
        (["train-teacher", "--resume", "--save-dir", "{teacher}", "--lr", "9"], "--lr 9.0: the run in"),
        (["distill", "--resume", "--save-dir", "{teacher}"], "{teacher} is a run of `rkd train-teacher`. Resume it"),
        (
            ["evaluate", "{teacher}/state.safetensors"],
            "state.safetensors: is the resume state of a run, not a checkpoint. Use {teacher}/best.safetensors",
        ),
        (over(STUDENT, "--teacher", "{teacher}/state.safetensors"), "state.safetensors: is the resume state of a run"),
        (["bench", "speed"], "PART speed: must be one of"),
        (over(STUDENT, "--data", "{set}"), "--teacher: is required (Teacher: a run directory"),
        (over(STUDENT, "--data", "{set}", "--teacher-load", "{tmp}/odd.toml"), "odd.toml: not a safetensors file"),
        (over(STUDENT, "--data", "{set}", "--teacher-load", "{tmp}/other.safetensors"), "not a checkpoint of rkd"),
        (
            over(STUDENT, "--data", "{set}", "--teacher-load", "{tmp}/none.safetensors"),
            "none.safetensors: no such file",
        ),
        (
            ["evaluate", "{teacher}/best.safetensors", "--data", "{set}", "--base", "resnet50"],
            "--base resnet50: ",
        ),
        (
            ["evaluate", "{teacher}/best.safetensors", "--data", "{set}", "--no-l2normalize"],
            "--l2normalize False: ",
        ),
        (["evaluate", "{teacher}/best.safetensors", "--resize", "9"], "is larger than --resize 9"),
        (["evaluate"], "Missing argument"),
        (["evaluate", "resnet50"], "resnet50: no such file or folder. Did you mean torchvision:resnet50?"),
        (["evaluate", "torchvision:resnet5O", "--dataset", "demo"], "resnet5O: no such network. Did you mean resnet50"),
        (
            ["evaluate", "timm:resnet5O", "--dataset", "demo"],
            "timm:resnet5O: no such network. Did you mean timm:resnet50",
        ),
        (["evaluate", "{tmp}/v.npz"], "v.npz: does not say which data set to use. Choose one with --dataset."),
        (
            ["evaluate", "torchvision:resnet18", "--weights", "{tmp}/odd.toml", "--dataset", "demo"],
            "odd.toml: cannot be read",
        ),
        (
            ["evaluate", "{teacher}", "--weights", "{tmp}/odd.toml"],
            "--weights {tmp}/odd.toml: needs one timm:NAME or torchvision:NAME, but {teacher} has its own weights.",
        ),
        (["evaluate", "timm:a", "torchvision:b", "--weights", "x.pth"], "but 2 are named."),
        (
            ["evaluate", "{teacher}", "--gallery", "{tmp}/v.npz", "--data", "{set}"],
            "--gallery {tmp}/v.npz: has 2 dimensions, but {teacher} has 16",
        ),
        (["evaluate", "{teacher}", "--dims", "8,17"], "--dims 17: {teacher} has 16 dimensions. Use fewer."),
        (["evaluate", "{teacher}", "--dims", "17,8"], "--dims: must be in ascending order, got 17,8"),
        (["evaluate", "{teacher}", "--vectors", "int4"], "--vectors: must be one of float, int8 or binary, got int4"),
        (["evaluate", "{teacher}", "--vectors", ""], "--vectors: must name at least one"),
        (
            ["evaluate", "{tmp}/v.npz", "--dataset", "cub200", "--data", "{set}", "--base", "resnet18"],
            "--base resnet18: {tmp}/v.npz has 2-d embeddings",
        ),
        (
            ["evaluate", "{tmp}/v.npz", "--dataset", "cub200", "--data", "{set}", "--embedding-size", "3"],
            "--embedding-size 3: {tmp}/v.npz has 2-d embeddings",
        ),
        (
            ["evaluate", "{tmp}/v.npz", "--dataset", "cub200", "--data", "{set}"],
            "v.npz: has no embedding of these images. Its paths must be relative to {set}",
        ),
        (["evaluate", "{tmp}/twice.npz", "--dataset", "demo"], "1 paths are duplicates, first a"),
        (["evaluate", "{tmp}/short.npz", "--dataset", "demo"], "3 embeddings and 2 paths"),
        (["evaluate", "{tmp}/nan.npz", "--dataset", "demo"], "1 embeddings are not finite, first that of b"),
        (["evaluate", "{tmp}/cut.npz", "--dataset", "demo"], "cut.npz: cannot be read as npz"),
        (["embed"], "Missing argument"),
        (["embed", "{teacher}", "--data", "{set}"], "--out: is required"),
        (
            ["embed", "{teacher}", "--data", "{set}", "--out", "{tmp}/v.txt"],
            "must end in .npy, .npz, .parq",
        ),
        (["embed", "{teacher}", "--data", "{set}", "--out", "{tmp}/v.npz"], "v.npz: already exists"),
        (["train-teacher", "--bacth", "3"], "No such option: --bacth. Did you mean --batch?"),
        (["train-teacher", "--batch-size", "3"], "No such option: --batch-size. Did you mean --batch?"),
        (["distill", "--dist-ration", "3"], "No such option: --dist-ration. Did you mean --dist-ratio?"),
        (["distill", "--no-l2normalise"], "No such option: --no-l2normalise. Did you mean --no-l2normalize?"),
        (["distill", "--xyz"], "No such option: --xyz. --help-all lists all."),
        (["tarin"], "No such command: tarin. --help lists all."),
        (["train"], "No such command: train. Did you mean train-teacher?"),
        (["eval", "student"], "No such command: eval. Did you mean evaluate?"),
        (["distil"], "No such command: distil. Did you mean distill?"),
        (over(TEACHER, "--dataset", "folders"), "packed or demo, got folders. Did you mean folder?"),
        (["download-cub", "--archive", "{tmp}/none.tgz", "--data", "{tmp}"], "none.tgz: no such file"),
        (["download-cub", "--archive", "{tmp}/odd.toml", "--data", "{tmp}"], "odd.toml"),
        (["download-cub", "--url", "ftp://x/y", "--data", "{tmp}"], "not an http or https URL"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "odd.toml").write_text("btach = 3")
    checkpoint_like(tmp_path / "other.safetensors")
    rows, names = np.arange(1, 7, dtype=np.float32).reshape(3, 2), ["a", "b", "c"]
    write_vectors(tmp_path / "v.npz", rows, names)
    write_vectors(tmp_path / "twice.npz", rows, ["a", "b", "a"])
    write_vectors(tmp_path / "short.npz", rows, names[:2])
    write_vectors(tmp_path / "nan.npz", rows * np.array([[1], [np.nan], [1]], np.float32), names)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:-30])
    spoiled = {"half": tmp_path / "half", "text": tmp_path / "text"}
    for copy in spoiled.values():
        subprocess.run(["cp", "-r", tiny_set, copy], check=True)
    images = sorted((spoiled["half"] / "images").glob("*/*.jpg"))
    for path in images[8:]:
        path.unlink()
    next((spoiled["text"] / "images").glob("*/*.jpg")).write_text("hello")
    places = {"tmp": tmp_path, "set": tiny_set, "teacher": teacher, **spoiled}
    save = (
        []
        if arguments[0] in ("evaluate", "embed", "download-cub", "tarin", "train", "eval", "distil", "bench")
        or "--save-dir" in arguments
        else ["--save-dir", str(tmp_path / "run")]
    )
    code, _, err = rkd(*(argument.format(**places) for argument in arguments), *save)
    assert code == 2
    assert says.format(**places) in err
    assert err.startswith("rkd: error: ")
    assert len(err.splitlines()) == 1


def test_embeddings_are_written_measured_and_taught_with(
    rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path
) -> None:
    images = tiny_set / "images"
    flags = ["--data", images, "--workers", 0, "--device", "cpu"]
    code, out, err = rkd("embed", teacher, *flags, "--pca", 4, "--out", tmp_path / "v.npz")
    assert (code, err) == (0, "")
    file, teach, others = (line for line in out.splitlines() if not line.startswith("note: "))
    what = re.escape(f"{tmp_path / 'v.npz'}: 48 embeddings of 4 dimensions by {teacher}")
    assert re.fullmatch(rf"{what}, [1-9][\d,]* images/s", file)
    assert teach.startswith(f"teach with it: rkd distill --teacher {tmp_path / 'v.npz'} --data {images};")
    assert others == f"other images in the same space: rkd embed {teacher} --pca {tmp_path / 'v.npz'} ..."
    told = shlex.split(teach.partition(": rkd ")[2].partition(";")[0])
    student = over([*told, *STUDENT[1:]], "--embedding-size", 4, "--save-dir", tmp_path / "s")
    assert rkd(*student)[0] == 0
    measured = shlex.split(teach.partition("; measure it: rkd ")[2])
    code, out, _ = rkd(*measured, "--gallery", tmp_path / "v.npz", "--json", "--dims", 2, "--vectors", "binary")
    (found,) = map(json.loads, out.splitlines())
    kinds = [(variant["size"], variant["vectors"]) for variant in found["variants"]]
    assert kinds == [(4, "binary"), (4, "binary+rescore"), (2, "binary"), (2, "binary+rescore")]
    code, out, err = rkd("evaluate", tmp_path / "s", *flags, "--gallery", tmp_path / "v.npz", "--quiet")
    assert (code, err) == (0, "")
    assert f"other: queries in the gallery of {tmp_path / 'v.npz'}" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(" o")][2:] == [["other", "eval"]]


def test_half_whitened_embeddings_are_not_offered_as_a_teacher(
    rkd: Rkd, tiny_set: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.npz"
    flags = ["--data", tiny_set / "images", "--workers", 0, "--device", "cpu", "--out"]
    for more in ([out, "--pca", 4, "--half-whiten"], [tmp_path / "w.npz", "--pca", out]):
        code, told, _ = rkd("embed", teacher, *flags, *more)
        assert code == 0
        assert f"\nmeasure it: rkd evaluate {more[0]} " in told  # and nothing before it


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_last_epoch(tiny_set: Path, tmp_path: Path, number: int, expected: int) -> None:
    arguments = over(TEACHER, "--data", tiny_set, "--save-dir", tmp_path / "run", "--epochs", 10000, "--workers", 1)
    process = Forked(["-m", "rkd_cli", *arguments])
    process.until("epoch 1/", timeout=60)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == expected
    go_on = f"rkd train-teacher --resume --save-dir {tmp_path / 'run'}"
    assert err.splitlines() == [
        "rkd: saving after this step, then stopping; press again to stop at once",
        f"rkd: interrupted and saved. Resume with `{go_on}`.",
    ]
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) >= 2
    assert {"best.safetensors", "last.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_loss_that_is_not_finite_ends_the_run(rkd: Rkd, tiny_set: Path, tmp_path: Path) -> None:
    arguments = ["--data", tiny_set, "--save-dir", tmp_path / "run", "--lr", "1e30", "--no-l2normalize"]
    code, out, err = rkd(*over(TEACHER, *arguments))
    assert code == 1
    assert "loss is" in err
    assert err.startswith("rkd: error: epoch 1, step 2")
    assert len(err.splitlines()) == 1
    assert [line[:9] for line in out.splitlines() if line.startswith("epoch")] == ["epoch 0/2"]


def test_unexpected_errors_show_no_traceback_unless_asked(
    rkd: Rkd, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("rkd_cli.commands.evaluate.evaluate_models", fail)
    assert rkd("evaluate", teacher) == (
        1,
        "",
        "rkd: error: unexpected ZeroDivisionError: oh. Set RKD_DEBUG=1 to see the traceback.\n",
    )
    monkeypatch.setenv("RKD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", str(teacher)])


def test_damaged_images_are_named_together_or_left_out(rkd: Rkd, tiny_set: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_set, tmp_path / "set")
    images = sorted(data.rglob("*.jpg"))
    images[3].write_bytes(b"")
    images[30].write_bytes(images[30].read_bytes()[:300])
    code, _, err = rkd("check-data", "--data", data, "--workers", 1)
    assert code == 2
    assert [line.split(": ")[2] for line in err.splitlines()] == [str(images[3]), str(images[30])]
    for cache in ("disk", "none"):
        arguments = over(TEACHER, "--data", data, "--save-dir", tmp_path / cache, "--cache", cache, "--workers", 0)
        code, _, err = rkd(*arguments)
        assert code == 2
        assert str(images[3]) in err
        assert not (tmp_path / cache / "best.safetensors").exists()
    code, out, _ = rkd(*arguments, "--skip-damaged")
    assert code == 0
    assert f"2 damaged images are left out, the first of them {images[3]}" in out
    code, out, _ = rkd("check-data", "--data", tiny_set, "--workers", 1)
    assert code == 0
    assert out.splitlines() == [
        f"note: {tiny_set}: found a data set in the layout of CUB-200-2011 (--dataset cub200)",
        "cub200: 24 images of 4 classes train, 24 images of 4 classes evaluate",
        "cub200: all 48 images can be read",
    ]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rkd train-teacher --dataset c", ["cub200", "cars196"]),
        ("rkd distill --precision ", ["auto", "fp32", "tf32", "bf16"]),
        ("rkd dist", ["distill"]),
        ("rkd distill --dist-r", ["--dist-ratio"]),
    ],
)
def test_a_shell_completes_commands_flags_and_values(words: str, offered: list[str]) -> None:
    script = "import sys; sys.argv[0] = 'rkd'; from rkd_cli.cli import main; main()"
    asked = {"_RKD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == offered
