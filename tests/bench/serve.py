"""Load on `rkd serve`: 1,000 searches from 20 clients in 100,000 vectors, then 200 hostile requests.

The student is that of the recipe quick-student (mobilenet_v3_small, 160 pixels, 128 dimensions), with random weights.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from rkd_cli.data.sets.birds import draw_bird, make_species
from rkd_cli.embedding.embedder import open_embedder
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.geometry import normalized
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of

BASE, SIDES, SIZE = "mobilenet_v3_small", (184, 160), 128
PATIENCE = 60.0  # seconds that a client waits
Send = Callable[[int], tuple[int, bytes]]  # to a port: the status, and what came back
_random = random.Random(1)


def make_place(folder: Path, count: int) -> bytes:
    """A student, a gallery of random vectors, and a photo."""
    torch.manual_seed(0)
    network = build_model(BASE, SIZE, True).eval()
    save_model(folder / "student.safetensors", network.state_dict(), header_of(network, BASE, *SIDES, "folder"))
    digest = open_embedder(str(folder / "student.safetensors")).digest
    rows = normalized(torch.randn(count, SIZE)).numpy().astype(np.float32)
    names = [f"class{row % 1000}/{row}.jpg" for row in range(count)]
    write_vectors(folder / "gallery.npz", rows, names, model=digest)
    data = BytesIO()
    draw_bird(make_species(0), _random, 640).save(data, "JPEG", quality=90)
    return data.getvalue()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port, and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", folder / "student.safetensors", "--gallery", folder / "gallery.npz", "--data", folder]
    command = [sys.executable, "-m", "rkd_cli", *map(str, words), "--port", str(port), "--max-pixels", "20000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and "open http://" in process.stdout.readline()
        yield port, process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()


def ask(port: int, path: str, body: bytes | None = None, method: str = "", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        found = connection.getresponse()
        return found.status, found.read()
    finally:
        connection.close()


def raw(port: int, parts: Sequence[bytes], pause: float = 0.0) -> tuple[int, bytes]:
    """Bytes as they are; the status is 0 if the connection ends without an answer."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection, suppress(ConnectionError):
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        while more := connection.recv(1 << 16):
            found += more
    return (int(found[9:12]), found) if found.startswith(b"HTTP/1.1 ") else (0, found)


def peak(process: subprocess.Popen[str]) -> str:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))


def processor_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_load(port: int, photo: bytes, requests: int, clients: int) -> dict[str, float]:
    seconds: list[float] = []
    errors: Counter[int] = Counter()

    def client(number: int) -> None:
        for _ in range(requests // clients):
            start = time.perf_counter()
            status, _ = ask(port, "/search?k=10", photo)
            seconds.append(time.perf_counter() - start)
            errors[status] += status != 200

    ask(port, "/search", photo)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    whole = time.perf_counter() - start
    p50, p99 = np.percentile(seconds, (50, 99))
    return {
        "requests": len(seconds),
        "errors": +errors.total(),
        "per second": len(seconds) / whole,
        "p50": p50,
        "p99": p99,
    }


def png(width: int, height: int, *chunks: tuple[bytes, bytes], color: int = 6) -> bytes:
    """A PNG of zeros, with chunks before its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(), bytes(1 + width * (4 if color == 6 else 1))
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def hostile(photo: bytes) -> list[tuple[str, Send]]:
    """(kind, what sends it) of 200 requests."""
    form = "multipart/form-data; boundary=b"
    start = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    post = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    text = png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))))
    bomb, cut = png(6000, 6000), png(4000, 4000)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0, 0)
    junk = [_random.randbytes(2000) for _ in range(20)]
    paths = (
        "/images/..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd", "/images//etc/passwd", "/images/-1", "/images/1.0",
        "/images/100000", "/thumbnails/%00", "/images/1%00.jpg", "/app.js/../../settings.json", "/static/x",
        "/images/" + "9" * 4900, "/images/%EF%BC%91", "/thumbnails/1e3", "/.git/config", "/%2e%2e/%2e%2e/etc/passwd",
        "/search/0?k=-1", "/search/0?k=" + "9" * 4900, "/search/0?k=1;ls", "/duplicates?start=x", "/images/file:///etc",
    )  # fmt: skip
    bodies: dict[str, list[bytes]] = {
        "oversized": [bytes(21_000_000)] * 20,
        "bomb": [bomb, text, header, png(30000, 30000, color=0)] * 5,
        "not an image": [
            b"GIF89a",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            *junk[:17],
        ],
        "damaged image": [photo[: 40 * part] for part in range(1, 11)]
        + [cut[: len(cut) // part] for part in range(2, 12)],
    }
    forms = [
        b"", b"x", start, start + b"\r\n--b--\r\n", b"--b--\r\n", b"--b\r\n\r\n\r\n--b--\r\n", start[:40],
        b"--b\r\n" * 5000,
        start.replace(b"filename", b"x") + photo + b"\r\n--b--\r\n", (start + b"x\r\n") * 99 + b"--b--\r\n",
        b"--b\r\n" + b"A: b\r\n" * 9999, b"--b\r\n" + b"a" * 10**6, start + junk[0], b"\r\n" * 10**6,
        b'--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="\xff"; filename="../../a"\r\n\r\nx\r\n--b--\r\n',
    ]  # fmt: skip
    lines = [
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" * 30,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HELP\r\n\r\n", b"\0" * 100 + b"\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        post % 5 + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]  # fmt: skip
    hosts = [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.",
        "[::1].evil",
        "0.0.0.0",
        "",
        "localhost@evil",
        "a b",
        "[",
        "é",
    ]
    get = b"GET /images/1 HTTP/1.1\r\nHost: %s\r\n\r\n"
    slow = [(post % 10**6 + b"\r\n", *[b"x"] * 45), (b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 45), (b"G",), ()]
    sites = [
        (site, path)
        for site in ("cross-site", "same-site")
        for path in ("/search", "/embed", "/images/1", "/duplicates", "/app.js")
    ]
    methods = ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "X", "post", "LINK")
    kinds = (
        "multipart/form-data",
        "multipart/x; boundary=" + "b" * 9000,
        "multipart/form-data; boundary=",
        "multipart/",
    )
    found: list[tuple[str, Send]] = [
        *((kind, partial(ask, path="/search", body=body)) for kind, many in bodies.items() for body in many),
        *(("path", partial(ask, path=path)) for path in paths),
        *(("form", partial(ask, path="/search", body=body, Content_Type=form)) for body in forms),
        *(("form", partial(ask, path="/embed", body=start, Content_Type=kind)) for kind in kinds),
        *(("line", partial(raw, parts=[line])) for line in lines),
        *(("host", partial(raw, parts=[get % host.encode()])) for host in hosts),
        *(("method", partial(ask, path="/search", body=b"x", method=method)) for method in methods),
        *(("other site", partial(ask, path=path, Sec_Fetch_Site=site)) for site, path in sites),
        *(("slow", partial(raw, parts=parts, pause=1.0)) for parts in slow * 10),
    ]
    return found


def measure_hostile(port: int, photo: bytes, clients: int) -> dict[str, str]:
    """{kind: how often each status}; 0: the connection was ended."""
    requests = hostile(photo)
    assert len(requests) == 200, len(requests)
    _random.shuffle(requests)

    def send(request: tuple[str, Send]) -> tuple[str, int, bytes]:
        try:
            return request[0], *request[1](port)
        except Exception as error:  # of the client: a timeout is -1
            return request[0], -1, repr(error).encode()

    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(send, requests))
    found: dict[str, Counter[int]] = {}
    for kind, status, body in replies:
        found.setdefault(kind, Counter())[status] += 1
        if not 400 <= status < 500 or b"Traceback" in body:
            print(f"WRONG {kind}: {status} {body[:200]!r}")
    return {kind: ", ".join(f"{n} x {status}" for status, n in sorted(of.items())) for kind, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photo = make_place(Path(folder), asked.images)
        with serving(Path(folder)) as (port, process):
            print(f"before: {int(peak(process)) / 1e3:.0f} MB", flush=True)
            used = processor_seconds(process)
            found = measure_load(port, photo, asked.requests, asked.clients)
            found["processor seconds"] = processor_seconds(process) - used
            print(json.dumps({name: round(float(value), 4) for name, value in found.items()}), flush=True)
            print(f"after the load: {int(peak(process)) / 1e3:.0f} MB", flush=True)
            start = time.perf_counter()
            for kind, statuses in measure_hostile(port, photo, asked.clients).items():
                print(f"{kind}: {statuses}", flush=True)
            print(f"{time.perf_counter() - start:.0f} s, {int(peak(process)) / 1e3:.0f} MB", flush=True)
            status, body = ask(port, "/search?k=1", photo)
            print(f"then a search: {status}, {len(json.loads(body)['hits'])} answer", flush=True)
        assert process.stderr
        print(f"exit {process.returncode}, on stderr: {process.stderr.read()!r}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
