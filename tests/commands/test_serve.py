"""rkd serve: its answers are those of rkd search, and whatever a client sends gets one."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import rkd_cli
from browser import browsing, needs_chromium
from forked import Forked
from rkd_cli.commands.embed import embed_file
from rkd_cli.commands.search import Found, find_duplicates, search
from rkd_cli.embedding.vectors import read_vectors
from rkd_cli.errors import SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.settings import EmbedSettings, SearchSettings, ServeSettings
from rkd_cli.settings.resolve import resolve

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("python_multipart", reason="python-multipart is not installed")

from rkd_cli.commands import serve as module
from rkd_cli.commands import web
from rkd_cli.commands.serve import Service, open_service

NAME = "shufflenet_v2_x0_5"
TOKEN = "a-secret-of-25-characters"
FLAGS = {"workers": "0", "device": "cpu", "batch": "16"}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served(NamedTuple):
    """A running server."""

    service: Service
    port: int
    events: list[Event]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET" if body is None else "POST", path, body, named)
            found = connection.getresponse()
            return Reply(found.status, found.headers, found.read())
        finally:
            connection.close()

    def send(self, *parts: bytes, pause: float = 0) -> bytes:
        """Bytes as they are, and all that comes back until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            with suppress(OSError):  # the server has ended it
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
            found = b""
            with suppress(ConnectionResetError):
                while more := connection.recv(1 << 16):
                    found += more
            return found


@contextmanager
def serving(model: Path, gallery: Path, **flags: str) -> Iterator[Served]:
    settings = resolve(ServeSettings, FLAGS | {"port": "0", "gallery": str(gallery)} | flags)
    events: list[Event] = []
    service, port = open_service(str(model), settings, silent)
    server = web.make_server(service, settings, events.append)
    thread = threading.Thread(target=server.run, args=([port],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(service, port.getsockname()[1], events)
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
        port.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def place(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a gallery with a copy of one image beside the class folders, and an image that is not in it."""
    root = tmp_path_factory.mktemp("serve")
    shutil.copytree(tiny_set / "images", root / "photos")
    first, last = sorted((root / "photos").rglob("*.jpg"))[:: 8 * 6 - 1]
    shutil.copy(first, root / "photos/copy.jpg")
    last.rename(root / "new.jpg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(NAME, 8, True).train()
        for _ in range(20):  # statistics of some images
            network(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8))
    save_model(root / "best.safetensors", network.state_dict(), header_of(network, NAME, 36, 32, "folder"))
    return root


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    with serving(place / "best.safetensors", place / "photos", cache_dir=str(place / "cache")) as found:
        yield found


def searched(place: Path, gallery: Path, query: Path, top: int, **more: str) -> Found:
    flags = FLAGS | {"gallery": str(gallery), "query": str(query), "top": str(top)} | more
    return search(str(place / "best.safetensors"), resolve(SearchSettings, flags), silent)


def check_same(hits: Any, found: Found, root: Path) -> None:
    ((_, expected),) = found.answers
    assert [hit["path"] for hit in hits] == [str(hit.path.relative_to(root)) for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.similarity for hit in expected], abs=1e-6)


def form_of(data: bytes, name: str = 'name="image"; filename="a.jpg"') -> bytes:
    return b"--b\r\nContent-Disposition: form-data; " + name.encode() + b"\r\n\r\n" + data + b"\r\n--b--\r\n"


FORM = "multipart/form-data; boundary=b"


def test_answers_are_those_of_a_search(served: Served, place: Path) -> None:
    data, expected = (place / "new.jpg").read_bytes(), searched(place, place / "photos", place / "new.jpg", 7)
    bodies = [(data, "image/jpeg"), (data, "application/x-www-form-urlencoded"), (form_of(data), FORM)]
    for body, kind in bodies:
        reply = served.ask("/search?k=7", body, Content_Type=kind)
        assert reply.status == 200
        assert reply.json["measure"] == expected.measure == "cosine"
        assert (reply.json["images"], reply.json["model"]) == (48, "best.safetensors")  # not where it is
        check_same(reply.json["hits"], expected, place / "photos")
    assert len(served.ask("/search", data).json["hits"]) == 12  # --top


def test_a_search_goes_on_from_an_image_of_the_gallery(served: Served, place: Path) -> None:
    paths = [str(path.relative_to(place / "photos")) for path in served.service.index.paths]
    for index in (0, 20, paths.index("copy.jpg")):
        reply = served.ask(f"/search/{index}?k=5").json
        query = place / "photos" / paths[index]
        folder = query.parent.name if query.parent.name != "photos" else None
        assert reply["query"] == {"index": index, "class": folder, "path": paths[index]}
        check_same(reply["hits"], searched(place, place / "photos", query, 5), place / "photos")
        assert all(paths[hit["index"]] == hit["path"] != paths[index] for hit in reply["hits"])


def test_an_embedding_is_that_of_the_model(served: Served, place: Path) -> None:
    found = served.ask("/embed", (place / "new.jpg").read_bytes()).json
    model = rkd_cli.load(place / "best.safetensors", device="cpu")
    assert found["embedding"] == pytest.approx(model.embed(place / "new.jpg")[0].tolist(), abs=1e-6)
    assert found["digest"] == model.embedder.made_by


def test_duplicates_are_those_of_a_search(served: Served) -> None:
    while "progress" in (found := served.ask("/duplicates").json):
        time.sleep(0.05)
    index = served.service.index
    expected = find_duplicates(index.embeddings, 0.95, silent)
    rows = [[image["index"] for image in group["images"]] for group in found["groups"]]
    assert rows == [[row for row, _ in group] for group in expected]
    assert (found["total"], found["threshold"]) == (len(expected), 0.95)
    assert any({image["path"].rpartition("/")[2] for image in g["images"]} >= {"copy.jpg"} for g in found["groups"])
    assert served.ask(f"/duplicates?start={len(expected)}").json["groups"] == []


def test_pictures_are_small_and_upright_and_without_metadata(served: Served, place: Path) -> None:
    path, row = served.service.index.paths[7], 7
    image = Image.open(path)
    for name, size in (("thumbnails", (256, 256)), ("images", image.size)):
        reply = served.ask(f"/{name}/{row}")
        assert reply.headers["Content-Type"] == "image/webp"
        picture = Image.open(io.BytesIO(reply.body))
        assert (picture.format, picture.size, dict(picture.getexif())) == ("WEBP", size, {})
        small, own = (np.asarray(one.convert("RGB").resize((8, 8)), float) for one in (picture, image))
        assert np.abs(small - own).mean() < 12
    path.rename(place / "aside")
    try:
        assert served.ask("/images/7").status == 404
    finally:
        (place / "aside").rename(path)


def test_a_vectors_file_is_served_with_its_images_and_class_folders_of_splits(place: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(sorted(path for path in (place / "photos").iterdir() if path.is_dir())):
        shutil.copytree(folder, tmp_path / "data" / ("train" if number % 2 else "test") / folder.name)
    vectors, model = tmp_path / "v.npz", place / "best.safetensors"
    flags = FLAGS | {"data": str(tmp_path / "data")}
    embed_file(str(model), resolve(EmbedSettings, flags | {"out": str(vectors)}), silent)
    settings = resolve(ServeSettings, flags | {"port": "0", "gallery": str(vectors)})
    service, port = open_service(str(model), settings, silent)
    port.close()
    try:
        found = service.ask((place / "new.jpg").read_bytes(), 4).result(60)
        hits = [{"path": service.name(row), "score": value} for row, value in found.rows]
        expected = searched(place, vectors, place / "new.jpg", 4, data=str(tmp_path / "data"))
        check_same(hits, expected, tmp_path / "data")
        names = list(read_vectors(vectors).row)
        assert [service.label(row) for row in range(len(names))] == [name.split("/")[1] for name in names]
    finally:
        service.close()


def test_a_file_of_int8_vectors_is_served_by_cosine(place: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"data": str(place / "photos")}
    made = flags | {"out": str(tmp_path / "v.npz"), "vectors": "int8"}
    embed_file(str(place / "best.safetensors"), resolve(EmbedSettings, made), silent)
    with serving(place / "best.safetensors", tmp_path / "v.npz", data=str(place / "photos")) as served:
        assert served.ask("/search?k=5", (place / "new.jpg").read_bytes()).json["measure"] == "cosine"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of zeros, with chunks before its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED: dict[str, tuple[str, Callable[[], bytes] | None, dict[str, str], int]] = {
    "no image": ("/search", lambda: b"", {}, 400),
    "text": ("/search", lambda: b"hello", {}, 415),
    "half of an image": ("/embed", lambda: png(64, 64)[:50], {}, 415),
    "more pixels than --max-pixels": ("/search", lambda: png(3000, 3000), {}, 415),
    "a bomb of text": ("/search", lambda: png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23)))), {}, 415),
    "a program for a printer": ("/search", lambda: EPS, {}, 415),
    "more bytes than --max-upload": ("/search", lambda: bytes(10**6 + 1), {}, 413),
    "a form without a file": ("/search", lambda: form_of(b"x", 'name="image"'), {"Content_Type": FORM}, 400),
    "a form with two files": ("/search", lambda: form_of(b"x")[:-7] + form_of(b"x"), {"Content_Type": FORM}, 400),
    "a form without a boundary": ("/search", lambda: form_of(b"x"), {"Content_Type": "multipart/form-data"}, 400),
    "a form that is not one": ("/search", lambda: b"\0\r\n" * 99, {"Content_Type": FORM}, 400),
    "too many answers": ("/search?k=101", lambda: png(8, 8), {}, 400),
    "no answers": ("/search/1?k=0", None, {}, 400),
    "no number": ("/search/1?k=%F0%9D%9F%A1", None, {}, 400),
    "an image that is not there": ("/images/48", None, {}, 404),
    "an endless index": ("/thumbnails/" + "9" * 5000, None, {}, 404),
    "a path": ("/images/..%2F..%2Fetc%2Fpasswd", None, {}, 404),
    "a walk": ("/../../etc/passwd", None, {}, 404),
    "a page that is not there": ("/photos", None, {}, 404),
    "another method": ("/images/1", lambda: b"x", {}, 405),
    "another host": ("/", None, {"Host": "evil.example"}, 421),
    "a page of another site": ("/images/1", None, {"Sec_Fetch_Site": "cross-site"}, 403),
}


@pytest.fixture(scope="module")
def strict(place: Path) -> Iterator[Served]:
    limits = {"max_pixels": str(10**6), "max_upload": "1"}
    with serving(place / "best.safetensors", place / "photos", cache_dir=str(place / "cache"), **limits) as found:
        yield found


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_client_may_not_send_is_refused(
    strict: Served, place: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    path, make, headers, status = REFUSED[case]
    reply = strict.ask(path, make and make(), **headers)
    assert reply.status == status
    assert set(reply.json) == {"error"}
    assert "Traceback" not in reply.json["error"] and str(place) not in reply.json["error"]
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert strict.events == []
    assert caplog.records == []
    assert strict.ask("/healthz").json == {"status": "ok"}


def test_a_page_of_this_site_and_other_names_of_this_machine_are_served(served: Served) -> None:
    for host in (f"localhost:{served.port}", "127.0.0.1", f"[::1]:{served.port}", "LOCALHOST"):
        assert served.ask("/images/1", Host=host, Sec_Fetch_Site="same-origin").status == 200


def test_slow_requests_are_ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_SECONDS", 0.3)
    body = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    assert served.send(body, *[b"x"] * 5, pause=0.1).startswith(b"HTTP/1.1 408 ")
    start = time.monotonic()
    for part in (b"GET / HT", b"GET / HTTP/1.1\r\nA: b\r\n", b""):  # nobody waits for the rest
        head, _, end = served.send(part).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"nosniff" in head
        assert json.loads(end) == {"error": "The request took too long."}
    refused = b"PUT /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    assert served.send(refused).count(b"HTTP/1.1 405 ") == 1
    assert time.monotonic() - start < 10
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.connect()
    own = connection.sock
    for _ in range(2):  # who waits between requests is not slow
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        assert connection.sock is own
        time.sleep(1.5)
    connection.close()


def test_searches_beyond_the_queue_are_told_to_come_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, answer = threading.Event(), Service._answers

    def held(self: Service, *arguments: Any) -> Any:
        gate.wait(30)
        return answer(self, *arguments)

    monkeypatch.setattr(Service, "_answers", held)
    monkeypatch.setattr(web, "_WAITING", 3)
    replies: list[Reply] = []
    threads = [threading.Thread(target=lambda: replies.append(served.ask("/search/1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while len(replies) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert [(reply.status, reply.headers["Retry-After"]) for reply in replies] == [(503, "1")] * 5
    gate.set()
    for thread in threads:
        thread.join(30)
    assert [reply.status for reply in replies[5:]] == [200] * 3
    assert served.ask("/search/1").status == 200


def test_a_failure_is_told_in_one_line_and_does_not_end_the_server(
    served: Served, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no room\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(module, "embed_batch", fails)
        reply = served.ask("/search", (place / "new.jpg").read_bytes())
    assert (reply.status, reply.json) == (500, {"error": "The server failed."})
    assert served.events == [Note("/search: MemoryError: no room")]
    served.events.clear()
    assert served.ask("/search", (place / "new.jpg").read_bytes()).status == 200
    assert capfd.readouterr() == ("", "")


def test_who_has_no_token_is_refused(place: Path) -> None:
    flags = {"cache_dir": str(place / "cache"), "host": "0.0.0.0", "token": TOKEN}
    with serving(place / "best.safetensors", place / "photos", **flags) as served:
        assert served.ask("/healthz").status == 200
        for path in ("/", "/app.js", "/images/1", "/openapi.json", f"/?token={TOKEN}x", "/?token=", "/?token=%C3%A9"):
            reply = served.ask(path)
            assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
        for wrong in (TOKEN[:-1], TOKEN.upper(), "", "\u00e9"):
            assert served.ask("/images/1", Authorization=f"Bearer {wrong}", Cookie=f"rkd={wrong}").status == 401
        assert served.ask("/images/1", Authorization=f"Bearer {TOKEN}", Host="photos.example").status == 200
        page = served.ask(f"/?token={TOKEN}")
        assert TOKEN.encode() not in page.body
        cookie, *attributes = page.headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict"} <= set(attributes)
        assert served.ask("/images/1", Cookie=cookie).status == 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines can reach it. Add --token, or omit --host."),
        ({"host": "photos.example"}, "--host photos.example: other machines can reach it. Add --token, or"),
        ({"token": "short"}, "--token: must have 16 characters or more, without spaces and accents"),
        ({"token": "a secret with many spaces"}, "--token: must have 16 characters or more"),
    ],
)
def test_an_open_door_is_refused(flags: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(ServeSettings, {"gallery": "photos"} | flags)
    (problem,) = caught.value.problems
    assert problem.startswith(says)
    assert flags.get("token", "?") not in problem
    for host in ("localhost", "127.0.0.2", "::1"):
        resolve(ServeSettings, {"gallery": "photos", "host": host})


def test_a_port_that_is_in_use_and_a_package_that_is_missing_are_one_line(
    served: Served, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(ServeSettings, FLAGS | {"gallery": str(place / "photos"), "port": str(served.port)})
    with pytest.raises(SettingsError, match=r"--port \d+: cannot be used \(Address already in use"):
        open_service(str(place / "best.safetensors"), settings, silent)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"rkd serve: starlette is not installed. Run `pip install 'rkd-cli\[serve\]'`"
    ):
        open_service(str(place / "best.safetensors"), settings, silent)


def test_the_document_of_the_api_names_its_routes(served: Served) -> None:
    document = served.ask("/openapi.json").json
    pages = {"/", "/app.js", "/app.css", "/openapi.json"}
    settings = resolve(ServeSettings, {"gallery": "g"})
    routes = {route.path: (route.methods or set()) - {"HEAD"} for route in web._Api(served.service, settings).routes}
    described = {path: {method.upper() for method in of} for path, of in document["paths"].items()}
    assert described == {path: methods for path, methods in routes.items() if path not in pages}
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/')[1:]}:
        found = document
        for name in reference.split("/"):
            found = found[name]


def test_a_signal_lets_running_requests_end(place: Path) -> None:
    code = """if True:
        import sys, time
        from rkd_cli.cli import main
        from rkd_cli.models import EmbeddingNet

        def slow(self, images, forward=EmbeddingNet.forward):
            print("running", flush=True)
            time.sleep(1)
            return forward(self, images)

        EmbeddingNet.forward = slow
        main(sys.argv[1:])
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--gallery", place / "photos", "--cache-dir", place / "cache", "--workers", 0, "--device", "cpu"]
    server = Forked(["-c", code, "serve", place / "best.safetensors", *flags, "--port", port])
    try:
        server.until("48 images of ", 60)
        replies: list[Reply] = []
        served, data = Served(None, port, []), (place / "new.jpg").read_bytes()  # type: ignore[arg-type]
        asking = threading.Thread(target=lambda: replies.append(served.ask("/search?k=1", data)))
        asking.start()
        server.until("running", 60)
        server.send_signal(signal.SIGTERM)
        asking.join(60)
        assert server.wait(60) == 143
    finally:
        server.kill()
    out, err = server.communicate(10)
    assert replies[0].status == 200
    assert f"by {place}/best.safetensors: open http://127.0.0.1:{port}/ in a browser. Press Ctrl-C to stop." in out
    assert err == "rkd: interrupted. All requests were answered.\n"


@needs_chromium
def test_a_photo_is_dropped_or_chosen_in_a_browser_and_found(served: Served, place: Path, tmp_path: Path) -> None:
    copy = next(path for path in served.service.index.paths if path.name == "copy.jpg")
    query = tmp_path / "query.jpg"
    shutil.copy(copy, query)
    hits = served.ask("/search", query.read_bytes()).json["hits"]
    shown = "[...document.querySelectorAll('#answers li')]"
    with browsing(tmp_path) as page:
        page.look(1200)
        page.open(f"http://127.0.0.1:{served.port}/")
        page.until("[...document.querySelectorAll('#some img')].filter(one => one.naturalWidth == 256).length == 6")
        page.drop(300, 300, query)
        page.until(f"{shown}.length == 12")
        assert page.js("document.querySelector('#query figcaption').textContent") == "query.jpg"
        assert page.js(f"{shown}.map(one => one.querySelector('.path').textContent)") == [hit["path"] for hit in hits]
        assert page.js(f"{shown}[0].querySelector('.score').textContent") == "cosine 1.0000"
        page.until(f"{shown}.slice(0, 6).every(one => one.querySelector('img').naturalWidth == 256)")
        assert "12 of 48 images" in page.js("document.querySelector('[role=status]').textContent")
        papers = []
        for dark in (True, False):
            page.look(390, 844, dark=dark, phone=True)
            assert page.js("document.documentElement.scrollWidth") == 390
            papers.append(page.js("getComputedStyle(document.body).backgroundColor"))
        assert papers == ["rgb(21, 24, 27)", "rgb(252, 252, 250)"]
        # with the keyboard: the heading has the focus, then comes the first answer
        assert page.js("document.activeElement.textContent") == "Nearest images"
        page.press("Tab")
        page.press("Enter")
        page.until(f"document.querySelector('#query figcaption').textContent == {json.dumps(hits[0]['path'])}")
        assert page.js("location.hash") == f"#image={hits[0]['index']}"
        page.js("history.back()")
        page.until("document.querySelector('#query figcaption').textContent == 'query.jpg'")
        page.open(f"http://127.0.0.1:{served.port}/#search")
        page.choose("#file", place / "new.jpg")
        expected = served.ask("/search", (place / "new.jpg").read_bytes()).json["hits"]
        page.until(f"{shown}[0]?.querySelector('.path').textContent == {json.dumps(expected[0]['path'])}")
        page.js("location.hash = '#duplicates'")
        page.until("document.querySelectorAll('#groups li').length >= 2")
        assert "copy.jpg" in page.js("document.querySelector('#groups').textContent")
        (tmp_path / "text.jpg").write_text("no image")
        page.js("location.hash = ''")
        page.choose("#file", tmp_path / "text.jpg")
        page.until("document.querySelector('[role=alert]').textContent.includes('cannot be decoded')")
        assert [one for one in page.complaints if "415" not in one] == []
