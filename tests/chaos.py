"""Damage of every kind, in numbers, and what comes of it: `make chaos` runs all of it and prints the tally.

Every outcome is one of three: a clean error (one line, nothing half-done), recovered (the result is the right one all
the same; of an image, which has no checksum: pixels of the right shape), or wrong. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Outcome = str  # "clean error", "recovered", or "wrong: " and why
CLEAN, RECOVERED = "clean error", "recovered"
TESTS = Path(__file__).parent


def mutated(data: bytes, rng: random.Random, head: int) -> tuple[str, bytes]:
    """Damage of a random kind, one time in two within the first ``head`` bytes."""
    kind = rng.choice(
        ["flip", "flips", "cut", "zeros", "noise", "insert", "remove", "repeat", "empty", "swap", "digits"]
    )
    end = max(1, min(len(data), head) if rng.random() < 0.5 else len(data))
    at, length = rng.randrange(end), rng.randint(1, 64)
    changed = bytearray(data)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 20):
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind in ("zeros", "noise"):
        part = bytes(length) if kind == "zeros" else rng.randbytes(length)
        changed[at : at + length] = part[: len(changed) - at]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(length)
    elif kind == "remove":
        del changed[at : at + length]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + length]
    elif kind == "empty":
        changed = bytearray(rng.choice([b"", b"\0", b"{}", b"null", b"\xff" * 4096]))
    elif kind == "swap":
        other = rng.randrange(end)
        changed[at], changed[other] = changed[other], changed[at]
    else:
        digits = [i for i in range(end) if changed[i : i + 1].isdigit()]
        for i in rng.sample(digits, min(len(digits), 3)):
            changed[i] = ord(rng.choice("0123456789-."))
    return kind, bytes(changed)


def tried(work: Callable[[], bool]) -> Outcome:
    """What came of ``work``, which says whether its result is right."""
    from rkd_cli.errors import RkdError

    try:
        return RECOVERED if work() else "wrong: another result"
    except RkdError as error:
        long = [problem for problem in error.problems if "\n" in problem or len(problem) > 1000 or not problem.strip()]
        return f"wrong: not one line ({long[0][:80]!r})" if long or not error.problems else CLEAN
    except Exception as error:
        return f"wrong: {type(error).__name__}: {str(error)[:120]}"


def tree(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*")}


# -- kinds of damage; each yields (kind, outcome)

Tally = Iterator[tuple[str, Outcome]]


def checkpoints(count: int, rng: random.Random, place: Path) -> Tally:
    import torch

    from rkd_cli.models import build_model, load_model
    from rkd_cli.models.checkpoint import save_model
    from rkd_cli.schemas import Header, Position
    from rkd_cli.training.state import read_position, restore, save_state

    model = build_model("shufflenet_v2_x0_5", 8, True)
    norm = model.normalization
    header = Header(
        base="shufflenet_v2_x0_5", embedding_size=8, l2normalize=True, resize=40, image_size=32, mean=norm.mean,
        std=norm.std, dataset="demo", epoch=7, train_recall={1: 0.5}, eval_recall={1: 0.25},
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    torch.autograd.backward(model(torch.zeros(2, 3, 32, 32)).sum())
    optimizer.step()
    files = {name: place / f"{name}.safetensors" for name in ("model", "state")}
    save_model(files["model"], model.state_dict(), header)
    save_state(files["state"], Position(epoch=2, step=1, sums={"dist": 0.5}), model, optimizer)
    whole = {name: path.read_bytes() for name, path in files.items()}
    target, spoiled = {k: v.clone() for k, v in model.state_dict().items()}, place / "spoiled.safetensors"

    def same(found: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(found[name], target[name]) for name in target)

    def load() -> bool:
        return same(load_model(spoiled).state_dict())

    def resume() -> bool:
        position = read_position(spoiled)
        restore(spoiled, model, optimizer)
        return same(model.state_dict()) and (position.epoch, position.step, position.sums) == (2, 1, {"dist": 0.5})

    for number in range(count):
        name = "state" if number % 4 == 0 else "model"
        head = int.from_bytes(whole[name][:8], "little") + 8
        kind, data = mutated(whole[name], rng, head)
        spoiled.write_bytes(data)
        yield f"{name} file, {kind}", tried(resume if name == "state" else load)


def images(count: int, rng: random.Random, place: Path) -> Tally:
    from PIL import Image

    from rkd_cli.data.decode import load_resized
    from rkd_cli.data.sets.birds import draw_bird, make_species

    picture = draw_bird(make_species(3), random.Random(1), 64)
    kinds: dict[str, bytes] = {}
    for name, image in (
        ("jpeg", picture), ("png", picture), ("webp", picture), ("bmp", picture), ("ppm", picture), ("tiff", picture),
        ("gif", picture.convert("P")),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, name)
        kinds[name] = buffer.getvalue()
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "png")

    def load(path: Path) -> Callable[[], bool]:
        return lambda: load_resized(path, 32).shape == (32, 32, 3)

    for number in range(count):
        name = rng.choice(list(kinds))
        kind, data = mutated(kinds[name], rng, 200)
        if number % 100 == 0:
            kind, data = "bomb", bomb.getvalue()
        path = place / f"spoiled.{name}"
        path.write_bytes(data)
        yield f"{name}, {kind}", tried(load(path))


def archives(count: int, rng: random.Random, place: Path) -> Tally:
    import gzip

    from rkd_cli.data.download import download_cub
    from rkd_cli.data.sets.demo import make_demo

    source = make_demo(place / "source", species=2, images=2, size=16)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(source, "CUB_200_2011")
    whole = buffer.getvalue()
    expected = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}

    def evil() -> tuple[str, bytes]:
        name, member = rng.choice(
            [
                ("absolute path", tarfile.TarInfo(str(place / "outside.txt"))),
                ("contains ..", tarfile.TarInfo("CUB_200_2011/../../outside.txt")),
                ("link out", _link("CUB_200_2011/images.txt", "/etc/passwd", tarfile.SYMTYPE)),
                ("link climbing out", _link("CUB_200_2011/a", "../../outside", tarfile.SYMTYPE)),
                ("hard link out", _link("CUB_200_2011/b", "../../outside", tarfile.LNKTYPE)),
                ("device", _link("CUB_200_2011/c", "", tarfile.CHRTYPE)),
                ("pipe", _link("CUB_200_2011/d", "", tarfile.FIFOTYPE)),
                ("more than announced", _sized("CUB_200_2011/e", 10**15)),
            ]
        )
        inner = io.BytesIO(gzip.decompress(whole))
        with tarfile.open(fileobj=inner, mode="a") as tar:
            tar.addfile(member)
        return name, gzip.compress(inner.getvalue())

    for number in range(count):
        target = place / f"into-{number}"
        archive = place / "spoiled.tgz"
        if number % 5 == 0:
            kind, data = evil()
        elif number % 5 == 1:  # headers within an archive whose checksums are right
            inner = gzip.decompress(whole)
            start = 512 * rng.randrange(len(inner) // 512)
            kind, block = mutated(inner[start : start + 512], rng, 512)
            kind, data = f"header, {kind}", gzip.compress(inner[:start] + block + inner[start + 512 :])
        else:
            kind, data = mutated(whole, rng, 64)
        archive.write_bytes(data)
        before = tree(place)

        def unpack(target: Path = target, archive: Path = archive) -> bool:
            folder = download_cub(target, md5=None, size=None, archive=archive)
            found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            # bytes of a picture are nobody's but the archive's to vouch for; the names and lists are checked
            return found.keys() == expected.keys()

        outcome = tried(unpack)
        strays = [path for path in tree(place) - before if not path.startswith(str(target))]
        if strays:
            outcome = f"wrong: {strays[0]} was made"
        if outcome == CLEAN and target.exists() and (target / "CUB_200_2011").exists():
            outcome = "wrong: a refused archive left its folder"
        yield kind, outcome


def _link(name: str, to: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def _sized(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = tarfile.CONTTYPE
    return member


def settings(count: int, rng: random.Random, place: Path) -> Tally:
    from rkd_cli.data.sets.demo import make_demo
    from rkd_cli.events import silent
    from rkd_cli.settings import TeacherSettings
    from rkd_cli.settings.resolve import resolve
    from rkd_cli.training.loop import train
    from rkd_cli.training.open import build_run

    data = make_demo(place / "CUB_200_2011", species=4, images=4, size=40)
    flags = {
        "data": str(data), "weights": "none", "base": "shufflenet_v2_x0_5", "embedding_size": "4", "resize": "36",
        "image_size": "32", "batch": "4", "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1",
        "workers": "0", "device": "cpu", "cache": "none", "save_dir": str(place / "run"),
    }  # fmt: skip
    train(build_run(resolve(TeacherSettings, flags), silent), silent)
    going_on = {"save_dir": str(place / "run"), "resume": True}
    files = {name: (place / "run" / name).read_bytes() for name in ("settings.json", "metrics.jsonl")}
    for number in range(count):
        name = "metrics.jsonl" if number % 4 == 0 else "settings.json"
        path = place / "run" / name
        kind, changed = mutated(files[name], rng, 10**9)
        path.write_bytes(changed)

        def go_on(name: str = name, path: Path = path) -> bool:
            found = resolve(TeacherSettings, going_on)
            if name == "settings.json":  # whatever it says now is within bounds, and is what the run would do
                return isinstance(found, TeacherSettings)
            train(build_run(found, silent), silent)
            return path.read_bytes() == files[name]

        yield f"{name}, {kind}", tried(go_on)
        path.write_bytes(files[name])


def kills(count: int, rng: random.Random, place: Path) -> Tally:
    """SIGKILL at random moments of both trainings, resumed each time, until the end; then the bits are compared."""
    from rkd_cli.data.sets.demo import make_demo

    data = make_demo(place / "CUB_200_2011", species=8, images=8, size=40)
    flags = [
        f"--data={data}", "--weights=none", "--base=shufflenet_v2_x0_5", "--embedding-size=8", "--resize=36",
        "--image-size=32", "--batch=8", "--num-image-per-class=2", "--iter-per-epoch=12", "--epochs=6", "--lr=1e-3",
        "--workers=0", "--device=cpu", "--save-every=1", "--keep-state", "--quiet",
    ]  # fmt: skip
    teacher = [f"--teacher-load={place / 'train-teacher'}/best.safetensors"]
    commands = {"train-teacher": flags, "distill": flags + teacher}
    seconds = {}
    for command, arguments in commands.items():
        start = time.monotonic()
        code, error = _rkd([command, *arguments, f"--save-dir={place / command}"], None)
        seconds[command] = time.monotonic() - start
        assert code == 0, error
    done, number = 0, 0
    while done < count:
        command = ("train-teacher", "distill")[number % 2]
        directory = place / f"killed-{number}"
        number += 1
        while True:
            fresh = [command, *commands[command], f"--save-dir={directory}"]
            again = [command, "--resume", "--quiet", f"--save-dir={directory}"]
            limit = rng.uniform(0.25, 1.0) * seconds[command] if done < count else None
            code, error = _rkd(again if (directory / "settings.json").exists() else fresh, limit)
            if code is None:
                done += 1
                continue
            same = code == 0 and _files(directory) == _files(place / command)
            yield f"{command}, killed and resumed", RECOVERED if same else f"wrong: exit {code}: {error[-200:]}"
            break
    for _ in range(done):
        yield "of them, SIGKILLs", RECOVERED


def ranks(count: int, rng: random.Random, place: Path) -> Tally:
    """SIGKILL of a random process of a training in two: torchrun starts them again, or --resume in another number."""
    from rkd_cli.data.sets.demo import make_demo

    data = make_demo(place / "CUB_200_2011", species=8, images=8, size=40)
    flags = [  # neither batch norm nor dropout, which the number of processes changes
        "train-teacher", f"--data={data}", "--weights=none", "--base=squeezenet1_1", "--embedding-size=8", "--batch=8",
        "--resize=36", "--image-size=32", "--num-image-per-class=2", "--iter-per-epoch=12", "--epochs=6", "--lr=1e-5",
        "--sample=all", "--workers=0", "--device=cpu", "--save-every=1", "--keep-state", "--quiet",
    ]  # fmt: skip
    for processes in (1, 2):
        start = time.monotonic()
        code, error = _rkd([*flags, f"--nproc={processes}", f"--save-dir={place / str(processes)}"], None)
        assert code == 0, error
    seconds, done, number = time.monotonic() - start, 0, 0

    def killed(module: list[str], left: int) -> tuple[int | None, int]:
        """The exit code, None for none in time, and how many of its processes were killed before."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        agent = subprocess.Popen([sys.executable, "-m", *module], env=environment, **silent)
        kills = 0
        while kills < left:
            try:
                return agent.wait(rng.uniform(0.3, 1.0) * seconds), kills
            except subprocess.TimeoutExpired:
                workers = _workers(agent.pid)
                if workers:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1
        try:
            return agent.wait(60 + 10 * seconds), kills
        except subprocess.TimeoutExpired:
            agent.kill()
            return None, kills

    while done < count:
        directory = place / f"killed-{number}"
        run = [*flags, f"--save-dir={directory}"]
        by_torchrun, number = number % 2 == 0, number + 1
        if by_torchrun:
            agent = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=100", "--monitor-interval=0.1"]
            code, kills = killed([*agent, "-m", "rkd_cli", *run], min(count - done, rng.randint(2, 6)))
            done += kills
            same = code == 0 and _files(directory) == _files(place / "2")
            yield "torchrun starts them again", RECOVERED if same else f"wrong: exit {code}"
            continue
        code, kills = killed(["rkd_cli", *run, "--nproc=2"], 1)
        while code and kills:
            done += kills
            again = ["train-teacher", "--resume", "--quiet", f"--save-dir={directory}"]
            module = ["rkd_cli", *(again if (directory / "settings.json").exists() else run)]
            code, kills = killed([*module, f"--nproc={rng.randint(2, 3)}"], 1 if done < count else 0)
        near = code == 0 and _near(directory, place / "1")
        yield "--resume in another number", RECOVERED if near else f"wrong: exit {code}"
    for _ in range(done):
        yield "of them, SIGKILLs", RECOVERED


def _workers(agent: int) -> list[int]:
    found = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in found if b"rkd_cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _near(one: Path, other: Path) -> bool:
    """The same epochs, and losses and weights but for rounding: 1e-7 of a mean weight, where one step lost is 1e-5."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "last.safetensors") for path in (one, other))
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, other)]
    mine, its = (torch.tensor([row["losses"].get("l2_triplet", 0.0) for row in rows]) for rows in lines)
    moved = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs]).mean()
    return len(mine) == len(its) and torch.allclose(mine, its, rtol=1e-3) and bool(moved < 1e-6)


def _rkd(arguments: list[str], limit: float | None) -> tuple[int | None, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rkd_cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    try:
        _, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, ""
    return process.returncode, error.decode()


def _files(directory: Path) -> dict[str, object]:
    """All that a run leaves, but for the times, the state's own among them."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {
        "rows": [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows],
        "names": sorted(path.name for path in directory.iterdir()),
        "state": {k: v.numpy().tobytes() for k, v in load_file(directory / "state.safetensors").items()},
    }
    return found | {name: (directory / name).read_bytes() for name in ("best.safetensors", "last.safetensors")}


def tests(count: int, rng: random.Random, place: Path) -> Tally:
    """Server faults, full disks and interrupted extractions are tests of the suite: each is one kind, tried once."""
    names = ["data/test_transfer.py", "data/test_transfer_refused.py", "data/test_download.py", "data/test_archive.py"]
    for name in [*names, "training/test_full_disk.py"]:
        report = place / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            str(TESTS / name),
        ]
        subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                failed = case.find("failure") is not None or case.find("error") is not None
                yield name, f"wrong: {case.get('name')}" if failed else RECOVERED


PARTS: dict[str, tuple[Callable[[int, random.Random, Path], Tally], int]] = {
    "checkpoints": (checkpoints, 2000),
    "images": (images, 2000),
    "archives": (archives, 500),
    "settings": (settings, 500),
    "kills": (kills, 100),
    "ranks": (ranks, 50),
    "tests": (tests, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all if not given")
    parser.add_argument("--count", type=int, help="of each, instead of the usual numbers")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wrong = 0
    for part in options.parts:
        work, usual = PARTS[part]
        outcomes: Counter[str] = Counter()
        kinds: set[str] = set()
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="rkd-chaos-") as scratch:
            place = Path(scratch) / "place"
            place.mkdir()
            for kind, outcome in work(options.count or usual, random.Random(f"{part} {options.seed}"), place):
                kinds.add(kind)
                outcomes[outcome.split(":")[0]] += 1
                if outcome.startswith("wrong"):
                    wrong += 1
                    print(f"  {part}, {kind}: {outcome}")
            strays = [path.name for path in Path(scratch).iterdir() if path != place]
            if strays:
                wrong += 1
                print(f"  {part}: made outside of its folder: {strays}")
        figures = ", ".join(f"{outcomes[name]} {name}" for name in (CLEAN, RECOVERED, "wrong"))
        print(
            f"{part}: {outcomes.total()} tries of {len(kinds)} kinds: {figures} ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
