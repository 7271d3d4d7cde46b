"""What ends a fetch: nonsense, wrong sums, bad addresses, no room, another process."""

from __future__ import annotations

import base64
import hashlib
import shutil
import ssl
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rkd_cli.data import transfer as module
from rkd_cli.errors import DownloadError
from rkd_cli.runtime.files import locked
from servers import (
    BODY,
    HALF,
    MD5,
    Answer,
    Handler,
    Serve,
    answer,
    beside,
    dropping,
    fails,
    get,
    good,
    kept,
    notes,
    serving,
    whole,
)


def test_not_http_at_all(serve: Serve, path: Path) -> None:
    def nonsense(handler: Handler) -> None:
        handler.wfile.write(b"\x00\x01 what\r\n\r\n")

    url, seen = serve(nonsense)
    fails(url, path, "the connection failed")
    assert len(seen) == module.ATTEMPTS


def test_a_wrong_md5_gets_one_second_chance(serve: Serve, path: Path) -> None:
    wrong = bytes(len(BODY))
    url, seen = serve(answer(200, wrong), good)
    events = get(url, path)
    assert whole(path) and "range" not in seen[1] and "discarded" in notes(events)
    path.unlink()
    url, seen = serve(answer(200, wrong))
    fails(url, path, hashlib.md5(wrong).hexdigest(), MD5, "twice")
    assert len(seen) == 2 and beside(path) == set()


def test_a_damaged_part_is_replaced(serve: Serve, path: Path) -> None:
    url, seen = serve(good)
    kept(path, b"x" + BODY[1:HALF], url)
    get(url, path)
    assert whole(path) and len(seen) == 2


def test_redirects_are_followed(serve: Serve, path: Path) -> None:
    target, seen = serve(dropping(HALF), good)
    url, _ = serve(answer(302, Location=target))
    get(url, path)
    assert whole(path) and seen[1]["range"] == f"bytes={HALF}-"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_redirects_out_of_http_are_refused(serve: Serve, path: Path, target: str) -> None:
    url, seen = serve(answer(302, Location=target))
    fails(url, path, target)
    assert len(seen) == 1


def test_an_endless_redirect_is_one_line(serve: Serve, path: Path) -> None:
    url, seen = serve(answer(302, Location="/file.tgz"))
    fails(url, path, f"redirects more than {module.REDIRECTS} times")
    assert len(seen) == module.REDIRECTS


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/x",
        "data:,x",
        "http:",
        "https:///x",
        "http://[",
        "http://127.0.0.1:port/x",
        "nothing",
        "",
    ],
)
def test_only_http_addresses(path: Path, url: str) -> None:
    fails(url, path, "not an http or https URL")


def test_an_unusable_host(path: Path, pauses: list[float]) -> None:
    fails(f"http://{'x' * 70}.org/x", path, "invalid URL")
    assert pauses == []


def test_an_address_is_sent_encoded(serve: Serve, path: Path) -> None:
    url, seen = serve(good)
    get(f"{url} \u00fc", path)
    assert whole(path) and seen[0]["path"] == "/file.tgz%20%C3%BC"


def test_the_proxy_of_this_machine_is_used(serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, seen = serve(good)
    monkeypatch.setenv("http_proxy", url.removesuffix("/file.tgz").replace("//", "//me:p%40ss@"))
    get("http://elsewhere.invalid/file.tgz", path)
    assert whole(path) and seen[0]["path"] == "http://elsewhere.invalid/file.tgz"
    assert base64.b64decode(seen[0]["proxy-authorization"].removeprefix("Basic ")) == b"me:p@ss"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody signed but itself, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    where = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *where], check=True, capture_output=True, timeout=30)
    cert.write_text(cert.read_text() + key.read_text())
    return cert


@contextmanager
def serving_tls(certificate: Path, *answers: Answer) -> Iterator[str]:
    with serving(*answers) as (server, _):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield f"https://127.0.0.1:{server.server_address[1]}/file.tgz"


def test_an_untrusted_certificate_is_final(
    path: Path, certificate: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving_tls(certificate, good) as url:
        fails(url, path, "certificate is not trusted")
        assert pauses == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        get(url, path)
    assert whole(path)


def test_a_redirect_from_https_to_http_is_refused(
    serve: Serve, path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = serve(good)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving_tls(certificate, answer(302, Location=target)) as url:
        fails(url, path, "from https to http", target)
    assert seen == []


def test_a_redirect_from_http_to_https_is_followed(
    serve: Serve, path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving_tls(certificate, good) as target:
        url, _ = serve(answer(302, Location=target))
        get(url, path)
    assert whole(path)


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_found_before_a_byte_is_written(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = serve(good)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(1, 1, HALF))
    fails(url, path, f"{len(BODY):,} more bytes are needed", f"{HALF:,} are free", "Free some space")
    assert len(seen) == 1 and beside(path) == set()
    kept(path, BODY[:HALF], url)  # with half of it here, the room is enough
    get(url, path)
    assert whole(path)


def test_a_disk_that_fills_up_is_one_line(serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    url, seen = serve(good)
    monkeypatch.setattr("rkd_cli.runtime.files.os.fsync", full)
    fails(url, path, "No space left on device", "resumes after")
    assert len(seen) == 1


def test_a_folder_in_the_way(path: Path) -> None:
    path.mkdir()
    with pytest.raises(DownloadError, match="is a folder"):
        get("http://127.0.0.1:9/file.tgz", path)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    fails("http://127.0.0.1:9/file.tgz", tmp_path / "data/file.tgz", "cannot be saved", str(tmp_path / "data"))


def test_two_at_once(serve: Serve, path: Path) -> None:
    url, seen = serve(good)
    with locked(path):
        fails(url, path, "another process is downloading it")
    assert seen == []
    get(url, path)
    assert whole(path)
