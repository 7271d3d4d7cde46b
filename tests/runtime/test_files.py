"""Whatever ends a write, the old or the new is there whole, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_cli.errors import RunError
from rkd_cli.runtime import files
from rkd_cli.runtime.files import atomic_write, locked, move_into_place, remove_partials, replace_file


def put(path: Path, text: str, folder: bool) -> None:
    if folder:
        path.mkdir()
        path /= "inside"
    path.write_text(text)


def found(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_new_takes_the_place(tmp_path: Path, folder: bool, before: bool) -> None:
    path = tmp_path / "it"
    if before:
        put(path, "old", folder)
    with atomic_write(path) as aside:
        put(aside, "new", folder)
        assert not path.exists() or found(path) == "old"
    assert found(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_end_while_writing_leaves_the_old(tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
    path = tmp_path / "it"
    put(path, "old", folder)
    with pytest.raises(error), atomic_write(path) as aside:
        put(aside, "new", folder)
        raise error
    assert found(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_renamed_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "it", Path.rename
    put(path, "old", folder=True)

    def fail(self: Path, target: Path) -> Path:
        if found(self) == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError), atomic_write(path) as aside:
        put(aside, "new", folder=True)
    assert found(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "mine", folder=True)
    (tmp_path / "it").symlink_to("elsewhere")
    put(tmp_path / "new", "new", folder=True)
    move_into_place(tmp_path / "new", tmp_path / "it")
    assert (found(tmp_path / "it"), found(tmp_path / "elsewhere")) == ("new", "mine")


def test_sweeping_takes_what_is_left_of_this_one_alone(tmp_path: Path) -> None:
    for name in (".it.4711.part", ".it.4711.old.part", ".it.tgz.4711.part", ".it.lock", "it.part", ".it.part"):
        (tmp_path / name).touch()
    remove_partials(tmp_path / "it")
    assert {path.name for path in tmp_path.iterdir()} == {".it.tgz.4711.part", ".it.lock", "it.part", ".it.part"}


def test_a_second_process_waits_or_fails(tmp_path: Path) -> None:
    path = tmp_path / "it"
    code = (
        "import sys, pathlib; from rkd_cli.runtime.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('has it', flush=True)"
    )
    with locked(path):
        second = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(4)  # imports take one of them
    assert second.communicate(timeout=30)[0] == "has it\n"
    holds = "import sys, pathlib; from rkd_cli.runtime.files import locked\n"
    holds += "with locked(pathlib.Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "has it\n"
        with pytest.raises(RunError, match="busy"), locked(path, RunError("busy")):
            pass
        other.kill()  # the lock goes with its process
    with locked(path, RunError("busy")):
        pass


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"it: cannot be written \(No space left on device\)"):
        files.write_text(path, "new")
    assert found(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_umask_says_who_may_read_a_file_that_was_moved_there(tmp_path: Path, umask: int, rights: int) -> None:
    def moved(partial: Path) -> None:
        made = tmp_path / "private"
        made.touch(mode=0o600)
        made.replace(partial)

    before = os.umask(umask)
    try:
        replace_file(tmp_path / "it", moved)
    finally:
        os.umask(before)
    assert (tmp_path / "it").stat().st_mode & 0o777 == rights
