"""A run on a model hub and back, by a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import rkd_cli
from rkd_cli.commands.push import push_run
from rkd_cli.errors import DataError, DownloadError, SettingsError
from rkd_cli.models import sources
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import build_model, header_of

pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """What of the hub's protocol an upload of small files and a download need."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            assert asked.get("visibility") == "private" or asked.get("private")
            self._say({"url": f"{url}/{asked['organization']}/{asked['name']}"})
        elif "/taken/" in self.path:
            self._say({"error": "You don't have the rights"}, 403)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._say({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say({"commitUrl": f"{url}/o/n/commit/{40 * 'a'}", "commitOid": 40 * "a", "success": True})

    def do_HEAD(self) -> None:
        self._send_file(head=True)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self._say({"id": "o/n", "sha": 40 * "a", "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self._send_file(head=False)

    def _send_file(self, head: bool) -> None:
        data = self.files.get(self.path.rsplit("/", 1)[1]) if self.path.startswith("/o/n/resolve/") else None
        if data is None:
            self._say({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        self.send_response(200)
        etag = hashlib.sha1(data).hexdigest()
        for name, value in {"ETag": f'"{etag}"', "X-Repo-Commit": 40 * "a", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _say(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    hub = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    model = build_model("shufflenet_v2_x0_5", 8, True, "none")
    save_model(run / "best.safetensors", model.state_dict(), header_of(model, "shufflenet_v2_x0_5", 36, 32, "cub200"))
    (run / "README.md").write_text("the card")
    (run / "settings.json").write_text('{"data": "/home/somebody/photos"}')
    return run


def test_there_and_back(hub: type[Hub], run: Path) -> None:
    address, names = push_run(run, "o/n", private=True)
    assert address.endswith("/o/n")
    assert set(hub.files) == set(names) == {"README.md", "best.safetensors"}, "settings hold paths of this machine"
    assert hub.files["best.safetensors"] == (run / "best.safetensors").read_bytes()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    here, there = (rkd_cli.load(name, device="cpu").embed([image]) for name in (str(run), "hf:o/n"))
    assert np.array_equal(here, there)


def test_what_the_hub_refuses_is_one_line(hub: type[Hub], run: Path) -> None:
    with pytest.raises(DownloadError, match=r"^o/taken: .*403"):
        push_run(run, "o/taken", private=True)
    assert not hub.files
    with pytest.raises(DownloadError, match=r"^hf:o/absent: "):
        rkd_cli.load("hf:o/absent")
    with pytest.raises(DownloadError, match=r"^hf:no//name: "):
        rkd_cli.load("hf:no//name")


def test_a_run_without_its_files(hub: type[Hub], run: Path) -> None:
    (run / "README.md").unlink()
    with pytest.raises(DataError, match=r"has no README.md"):
        push_run(run, "o/n", private=True)
    assert not hub.asked


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(SettingsError, match=r"pip install 'rkd-cli\[hub\]'"):
        sources.located("hf:o/n")
