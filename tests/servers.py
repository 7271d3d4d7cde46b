"""Scripted servers on this machine, and what tests of a download ask of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rkd_cli.data.transfer import fetch
from rkd_cli.errors import DownloadError
from rkd_cli.events import Event, Note

BODY = hashlib.sha256(b"rkd").digest() * 6000  # 192,000 bytes
HALF = len(BODY) // 2
MD5 = hashlib.md5(BODY).hexdigest()

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request with the n-th answer of the test, and from then on with the last."""

    protocol_version = "HTTP/1.1"
    answers: tuple[Answer, ...] = ()
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.close_connection = True
        self.seen.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
        self.answers[min(len(self.seen), len(self.answers)) - 1](self)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


Serve = Callable[..., tuple[str, list[dict[str, str]]]]


@contextmanager
def serving(*answers: Answer) -> Iterator[tuple[Server, list[dict[str, str]]]]:
    seen: list[dict[str, str]] = []
    server = Server(("127.0.0.1", 0), type("Scripted", (Handler,), {"answers": answers, "seen": seen}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server, seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def answer(status: int, body: bytes = b"", **headers: str) -> Answer:
    def send(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def good(handler: Handler, body: bytes = BODY, etag: str = '"one"', stop: int | None = None) -> None:
    """A right server: ranges, If-Range, ETag. ``stop``: the connection ends before that byte."""
    found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    start = int(found[1]) if found and handler.headers.get("If-Range", etag) == etag else 0
    if start >= len(body):
        answer(416, Content_Range=f"bytes */{len(body)}")(handler)
        return
    extent = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
    length = str(len(body) - start)
    answer(206 if start else 200, body[start:stop], Content_Length=length, ETag=etag, **extent)(handler)


def dropping(stop: int) -> Answer:
    return partial(good, stop=stop)


ignoring_range = answer(200, BODY)


def get(url: str, path: Path, md5: str | None = MD5, size: int | None = len(BODY)) -> list[Event]:
    events: list[Event] = []
    fetch(url, path, md5=md5, size=size, report=events.append)
    return events


def notes(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def fails(url: str, path: Path, *words: str, md5: str | None = MD5, size: int | None = len(BODY)) -> None:
    """It fails with one line that holds ``words``, and ``path`` is not there."""
    with pytest.raises(DownloadError) as caught:
        fetch(url, path, md5=md5, size=size)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    for word in words:
        assert word in problem
    assert not path.exists()


def kept(path: Path, data: bytes, url: str) -> None:
    """Lay down what an interrupted fetch leaves."""
    path.with_name(path.name + ".part").write_bytes(data)
    path.with_name(path.name + ".part.json").write_text(json.dumps({"url": url, "validator": '"one"'}))


def beside(path: Path) -> set[str]:
    """What lies in the folder, but for locks."""
    return {other.name for other in path.parent.iterdir() if other.suffix != ".lock"}


def whole(path: Path) -> bool:
    """The file is right and nothing else lies beside it."""
    return path.read_bytes() == BODY and beside(path) == {path.name}
