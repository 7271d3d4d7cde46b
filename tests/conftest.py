"""What every test may use: the reference values and the real images, where they are at hand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd_cli.cli import main
from rkd_cli.data.sets.demo import make_demo

SHARED = Path(__file__).resolve().parents[2] / "shared"
# what the program repeats for seconds to time it: once or twice is enough in tests
TIMED = {
    "models.cost._SECONDS": 0.01,
    "commands.export._SECONDS": 0.01,
    "training.samples._SECONDS": 0.0,
    "bench.measure.Meter.times.__defaults__": (0.01,),
    "bench.suite._STEPS": 0.01,
    "screen.terminal._SILENCE": 3600.0,  # no lines that a slow machine would add
}


@pytest.hookimpl(optionalhook=True)  # `-p no:xdist` works too
def pytest_xdist_auto_num_workers() -> int:
    """One more than the cores: many tests wait for processes that they started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)  # a long file that starts last would keep one process waiting
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _shared_file(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return path


@pytest.fixture(scope="session", autouse=True)
def _quickly_timed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in TIMED.items():
            patch.setattr(f"rkd_cli.{name}", seconds)
        yield


@pytest.fixture(scope="session", autouse=True)
def _same_figures_on_every_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rkd_cli.runtime.context.cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images of fixtures: never in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKD_CACHE_DIR", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(autouse=True)
def _cache(_caches: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a test: in a folder of its own, gone after it, so that none hangs on what ran before it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RKD_CACHE_DIR", str(folder))
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def reference() -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(_shared_file("reference/values.npz")) as values:
        yield values


@pytest.fixture(scope="session")
def cub10_archive() -> Path:
    return _shared_file("data/cub10.tgz")


@pytest.fixture(scope="session")
def omniglot_archive() -> Path:
    return _shared_file("data/omniglot117.zip")


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in the layout of CUB that a network can be trained on in a second: 8 species, 6 drawings each."""
    return make_demo(tmp_path_factory.mktemp("tiny") / "CUB_200_2011", species=8, images=6, size=40)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rkd(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process; gives its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run
