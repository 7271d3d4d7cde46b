"""Images and a cache folder for the tests of loaders; servers for those of downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image

from rkd_cli.data import ImageSet, transfer
from servers import Answer, Serve, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a cache may go: beside the class folders of ``images``."""
    return tmp_path / "set/.cache"


@pytest.fixture
def images(folder: Path) -> ImageSet:
    """Twelve of three classes."""
    paths = []
    for index in range(12):
        path = folder.parent / f"{index % 3}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 256, (20 + index, 30, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        paths.append(path)
    return ImageSet(tuple(paths), tuple(index % 3 for index in range(12)), ("a", "b", "c"))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server with a script; gives the address of a file on it and the list of requests to come."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ExitStack() as servers:

        def start(*answers: Answer) -> tuple[str, list[dict[str, str]]]:
            server, seen = servers.enter_context(serving(*answers))
            return f"http://127.0.0.1:{server.server_address[1]}/file.tgz", seen

        yield start


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(transfer, "sleep", slept.append)
    return slept


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data/file.tgz"
