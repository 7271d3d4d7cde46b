"""Commands in many processes, as a user starts them: by --nproc or by torchrun, stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flags import over
from forked import Forked

SECONDS = 500  # of a machine that does other things too; a run takes ten
# no batch norm and no dropout
NETWORK = ["--base", "squeezenet1_1", "--embedding-size", "8", "--weights", "none", "--resize", "36"]
STEPS = ["--batch", "9", "--num-image-per-class", "3", "--iter-per-epoch", "3", "--epochs", "2", "--lr", "3e-5"]
MACHINE = ["--image-size", "32", "--workers", "0", "--device", "cpu"]
TRAIN = ["train-teacher", *NETWORK, *STEPS, *MACHINE, "--jitter", "0.2"]

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def started(command: Sequence[object]) -> Forked:
    return Forked(["-m", *command], environment())


def rkd(*arguments: object) -> tuple[int, str, list[str]]:
    """The exit code, what is printed, and the lines of complaint."""
    process = started(["rkd_cli", *arguments])
    out, err = process.communicate(timeout=SECONDS)
    return int(process.returncode or 0), out, err.splitlines()


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> Forked:
    agent = ["--nproc-per-node", processes, "--max-restarts", restarts, "--rdzv-backend", "c10d"]
    return started(["torch.distributed.run", *agent, "--rdzv-endpoint", "localhost:0", "-m", "rkd_cli", *arguments])


def assert_near(one: Path, other: Path) -> None:
    """The same losses and recalls, and weights to 1e-6, where each of six steps of Adam moves them by some 3e-5."""
    ours, theirs = (load_file(path / "last.safetensors") for path in (one, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 3
    for mine, its in zip(*rows, strict=True):
        assert mine["figures"] == its["figures"]
        assert mine["losses"] == pytest.approx(its["losses"], rel=1e-4)


@pytest.fixture(scope="module")
def teacher(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    run = tmp_path_factory.mktemp("alone") / "teacher"
    code, _, err = rkd(*TRAIN, "--data", tiny_set, "--save-dir", run)
    assert (code, err) == (0, [])
    return run


def test_a_training_by_nproc_ends_as_one_process_ends(teacher: Path, tiny_set: Path, tmp_path: Path) -> None:
    code, out, err = rkd(*TRAIN, "--data", tiny_set, "--save-dir", tmp_path, "--nproc", 2)
    assert (code, err) == (0, [])
    assert out.count("epoch 2/2") == 1
    assert "2 processes, CPU" in out
    assert_near(tmp_path, teacher)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in teacher.iterdir()}


def test_a_training_by_torchrun_goes_on_in_another_number_of_processes(
    teacher: Path, tiny_set: Path, tmp_path: Path
) -> None:
    process = torchrun(3, *over(TRAIN, "--data", tiny_set, "--save-dir", tmp_path, "--epochs", 1, "--keep-state"))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    code, _, lines = rkd("train-teacher", "--resume", "--save-dir", tmp_path, "--epochs", 2, "--nproc", 2)
    assert (code, lines) == (0, [])
    assert_near(tmp_path, teacher)


@pytest.mark.parametrize(
    "terms", [["--triplet-ratio", "1"], ["--mixup", "1", "--queue-ratio", "1"], ["--teacher-views", "2"]]
)
def test_a_distillation_ends_as_one_process_ends(
    teacher: Path, tiny_set: Path, tmp_path: Path, terms: list[str]
) -> None:
    flags = ["distill", *NETWORK, *STEPS, *MACHINE, "--teacher", teacher, "--data", tiny_set, *terms]
    # without unit length relations do not change with the last bias, whose gradient would be rounding alone
    flags = over(flags, "--lr", "1e-5", "--l2normalize")
    for processes in (1, 2):
        code, _, err = rkd(*flags, "--save-dir", tmp_path / f"{processes}", "--nproc", processes)
        assert (code, err) == (0, [])
    assert_near(tmp_path / "1", tmp_path / "2")


def test_shared_batch_norms_train_as_in_one_process(tiny_set: Path, tmp_path: Path) -> None:
    flags = over(TRAIN, "--base", "timm:test_resnet", "--data", tiny_set)
    losses = []
    for name, more in (("1", []), ("2", ["--nproc", 2, "--sync-bn"]), ("2-apart", ["--nproc", 2])):
        code, _, err = rkd(*flags, "--save-dir", tmp_path / name, *more)
        assert (code, err) == (0, [])
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(rows[1])["losses"]["l2_triplet"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


def test_an_evaluation_gives_the_figures_of_one_process(teacher: Path, tiny_set: Path) -> None:
    found = [
        rkd("evaluate", teacher, "--data", tiny_set, *MACHINE, "--batch", 5, "--json", "--nproc", n) for n in (1, 2, 3)
    ]
    assert [code for code, _, _ in found] == [0, 0, 0]
    measured = [json.loads(out) | {"milliseconds": 0} for _, out, _ in found]
    assert measured[0] == measured[1] == measured[2]


def test_a_signal_to_the_agent_saves_and_ends_all(teacher: Path, tiny_set: Path, tmp_path: Path) -> None:
    flags = over(TRAIN, "--data", tiny_set, "--save-dir", tmp_path, "--nproc", 2, "--epochs", 1000)
    process = started(["rkd_cli", *flags])
    try:
        wait_for(tmp_path / "last.safetensors", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    lines = [line for line in err.splitlines() if line]
    assert process.returncode == 130, err
    assert lines[0] == "rkd: saving after this step, then stopping"
    assert len(lines) == 2
    assert lines[1].startswith("rkd: interrupted and saved. Resume with")


def wait_for(path: Path, process: Forked | subprocess.Popen[str]) -> None:
    for _ in range(10 * SECONDS):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert path.exists()


def workers_of(agent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes there")
def test_a_killed_process_ends_all_and_torchrun_brings_them_back(teacher: Path, tiny_set: Path, tmp_path: Path) -> None:
    flags = [*TRAIN, "--data", tiny_set, "--overwrite"]
    words = over(flags, "--save-dir", tmp_path / "ends", "--nproc", 2, "--epochs", 1000)
    command = [sys.executable, "-m", "rkd_cli", *map(str, words)]  # not forked: a killed fork's parent complains too
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), text=True)
    wait_for(tmp_path / "ends/last.safetensors", process)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert process.returncode == 128 + signal.SIGKILL
    assert [line[:42] for line in err.splitlines()] == ["rkd: error: process 1 was killed (signal 9)"[:42]]
    config = tmp_path / "back.toml"
    config.write_text(f'save_dir = "{tmp_path / "back"}"')
    old = ["--save-dir", tmp_path / "back", "--lr", "0.1", "--epochs", 1]
    assert rkd(*over(TRAIN, "--data", tiny_set, *old))[0] == 0  # of another run, to be overwritten
    began = (tmp_path / "back/last.safetensors").stat().st_mtime_ns
    agent = torchrun(2, *flags, "--config", config, restarts=2)
    while agent.poll() is None and (tmp_path / "back/last.safetensors").stat().st_mtime_ns == began:
        time.sleep(0.05)
    for worker in workers_of(agent.pid)[:1]:
        os.kill(worker, signal.SIGKILL)
    _, err = agent.communicate(timeout=SECONDS)
    assert agent.returncode == 0, err
    assert_near(tmp_path / "back", teacher)


def test_what_one_process_finds_wrong_is_said_once(tiny_set: Path, tmp_path: Path) -> None:
    flags = [*TRAIN, "--save-dir", tmp_path / "run", "--nproc", 2]
    folder = tmp_path / "photos"
    for index in range(24):
        path = folder / f"{index // 6}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (index * 10, 0, 0)).save(path)
    damaged = folder / "3/23.png"  # in the last batch, which the second process has
    damaged.write_bytes(damaged.read_bytes()[:50])
    few = ["--batch", "6", "--data", folder, "--dataset", "folder"]
    for wrong, code, line in (
        (["--data", tmp_path / "nothing"], 2, "nothing"),
        (["--data", tiny_set, "--batch", "3", "--num-image-per-class", "2"], 2, "--batch 3: less than two images"),
        ([*few, "--cache", "none"], 2, "23.png: cannot be decoded"),
        (["--data", tiny_set, "--lr", "1e30", "--save-dir", tmp_path / "lr"], 1, "Lower --lr"),
    ):
        found = rkd(*over(flags, *wrong))
        assert found[0] == code, found
        assert len(found[2]) == 1, found
        assert line in found[2][0]


def test_commands_for_one_process_say_so(tmp_path: Path) -> None:
    process = torchrun(2, "cache", "--cache-dir", tmp_path)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("rkd: ")]
    assert said == ["rkd: error: rkd cache: runs in one process. Start it without torchrun."]


def test_an_agent_that_is_gone_leaves_no_call_stacks_on_the_screen() -> None:
    store = "import time; from torch.distributed import TCPStore; store = TCPStore('localhost', {}, is_master={})\n"
    agent_code = store.format(0, True) + "print(store.port, flush=True); time.sleep(600)"
    agent = subprocess.Popen([sys.executable, "-c", agent_code], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    process_code = (
        "import contextlib; from rkd_cli.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--version'])\n"
        + store.format(agent.stdout.readline().strip(), False)
        + "print(flush=True)\nwhile True: store.check(['ended']); time.sleep(0.01)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    process = subprocess.Popen(
        [sys.executable, "-c", process_code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()  # the version, and that it is connected
    agent.kill()
    agent.communicate(timeout=SECONDS)
    _, err = process.communicate(timeout=SECONDS)
    assert "DistNetworkError" in err.splitlines()[-1]
    assert "frame #" not in err and "[W" not in err


def test_embeddings_are_those_of_one_process_whole_and_gone_on_with(
    teacher: Path, tiny_set: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(tiny_set / "images", folder)
    last = sorted(folder.rglob("*.jpg"))[-1]  # of 48, in batches of 7
    flags = ["embed", teacher, "--data", folder, "--batch", 7, "--device", "cpu", "--workers", 0, "--quiet"]
    for name, processes in (("1", 1), ("2", 2), ("3", 3)):
        out = tmp_path / f"{name}.npz"
        whole = last.read_bytes()
        if processes > 1:  # as far as it is readable, then as a whole
            last.write_bytes(whole[:100])
            code, _, err = rkd(*flags, "--out", out, "--nproc", processes)
            assert (code, len(err)) == (2, 1)
            assert last.name in err[0]
            last.write_bytes(whole)
        code, _, err = rkd(*flags, "--out", out, "--nproc", processes)
        assert (code, err) == (0, [])
    with np.load(tmp_path / "1.npz") as one:
        for name in ("2", "3"):
            with np.load(tmp_path / f"{name}.npz") as other:
                assert all(np.array_equal(one[key], other[key]) for key in one.files)
