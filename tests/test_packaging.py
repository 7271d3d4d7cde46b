"""Packaging: what the wheel holds, commands that run from an installed copy of it, and what CI installs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from rkd_cli import __version__
from rkd_cli.manual import PAGES, read_page
from rkd_cli.settings.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed: it builds the wheel")
    pytest.importorskip("pip", reason="pip is not installed: it builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the wheel, with the dependencies of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", str(scripts / "python"), "install", "--no-deps", "--no-index", "--no-compile", str(wheel))
    # Files *.pth of these folders are not read, so an editable installation of the package is not found.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("\n".join(others))
    return scripts


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        return message_from_bytes(file.read(f"rkd_cli-{__version__}.dist-info/METADATA"))


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = (path for path in (ROOT / "rkd_cli").rglob("*") if path.is_file() and path.suffix != ".pyc")
    package = {path.relative_to(ROOT).as_posix() for path in files}
    assert {path for path in names_in(wheel) if ".dist-info/" not in path} == package


def test_pages_templates_recipes_and_types_are_in_the_wheel(wheel: Path) -> None:
    names = names_in(wheel)
    assert {f"rkd_cli/manual/{page}.md" for page in PAGES} <= names
    assert {"rkd_cli/settings/recipes.toml", "rkd_cli/py.typed"} <= names
    assert any(re.fullmatch(r"rkd_cli/.*\.html\.j2", name) for name in names)
    assert f"rkd_cli-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    found = metadata_of(wheel)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("rkd-cli", __version__, "MIT")
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert set(found.get_all("Provides-Extra", [])) == {*PROJECT["optional-dependencies"]}


def test_the_extra_all_has_every_other_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == [f"rkd-cli[{','.join(sorted(extras.keys() - {'all'}))}]"]


def test_ci_pins_the_oldest_versions_that_are_allowed() -> None:
    workflow = (ROOT / ".github/workflows/check.yml").read_text()
    pinned = dict(re.findall(r"(torch|torchvision)==([\d.]+)\.\*", workflow))
    allowed = dict(re.findall(r"(torch|torchvision)>=([\d.]+)", " ".join(PROJECT["dependencies"])))
    assert pinned == allowed
    assert pinned.keys() == {"torch", "torchvision"}


@pytest.mark.parametrize(
    ("command", "prints"),
    [
        ("--version", f"rkd {__version__}\n"),
        ("--help", "train-teacher"),
        ("manual photos", read_page("photos")),
        ("recipes", recipe_names()[0]),
    ],
    ids=lambda value: value.split("\n")[0],
)
def test_commands_run_from_the_wheel(installed: Path, tmp_path: Path, command: str, prints: str) -> None:
    assert prints in output_of(tmp_path, str(installed / "rkd"), *command.split())


def test_the_commands_are_of_the_wheel_not_of_this_repository(installed: Path, tmp_path: Path) -> None:
    printed = output_of(tmp_path, str(installed / "python"), "-c", "import rkd_cli; print(rkd_cli.__file__)")
    assert Path(printed.strip()).is_relative_to(installed.parent)


def output_of(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["COLUMNS"] = "120"
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout
