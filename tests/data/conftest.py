"""Servers for the tests of downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rkd_cli.data import transfer
from servers import Answer, Serve, serving


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server with a script; gives the address of a file on it and the list of requests to come."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "TIMEOUT", 5.0)
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
