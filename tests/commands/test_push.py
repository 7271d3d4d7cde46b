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
import torch
import torch.nn.functional as F
from PIL import Image

import rkd_cli
from rkd_cli.commands.push import push_run
from rkd_cli.embedding.embedder import NetworkEmbedder, open_embedder
from rkd_cli.errors import CheckpointError, DataError, DownloadError, SettingsError
from rkd_cli.models import sources
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import build_model, header_of
from rkd_cli.models.joined import JOINED
from rkd_cli.models.layouts import write_layout

pytest.importorskip("huggingface_hub")
timm = pytest.importorskip("timm")


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


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
        self.asked.append(self.path)
        if "/tree/" in self.path:
            self._say([{"type": "file", "path": n, "size": len(d), "oid": _sha(d)} for n, d in self.files.items()])
        elif self.path.startswith("/api/models/o/absent"):
            self._say({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif self.path.startswith("/api/models/"):
            self._say({"id": "o/n", "sha": self._commit(), "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self._send_file(head=False)

    def _send_file(self, head: bool) -> None:
        repository, _, rest = self.path.partition("/resolve/")
        data = self.files.get(rest.partition("/")[2]) if repository == "/o/n" else None
        if data is None:
            self._say({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        self.send_response(200)
        headers = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": self._commit(), "Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _commit(self) -> str:
        return _sha(repr(sorted(self.files.items())).encode())

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
    constants = {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": address,  # which timm asks
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in constants.items():
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
    here, there = (rkd_cli.load(name, device="cpu", precision="fp32").embed([image]) for name in (str(run), "hf:o/n"))
    assert np.array_equal(here, there)
    assert np.array_equal(here, rkd_cli.load("hf:o/n@v1", device="cpu", precision="fp32").embed([image]))
    assert any(path.startswith("/api/models/o/n/revision/v1") for path in hub.asked)


@pytest.mark.parametrize("to", ["timm", "sentence-transformers"])
def test_a_folder_for_another_library_there_and_back(hub: type[Hub], run: Path, tmp_path: Path, to: str) -> None:
    model = build_model("timm:test_resnet", 8, True, "none").eval()
    header = header_of(model, "timm:test_resnet", 36, 32, "cub200")
    save_model(tmp_path / "m.safetensors", model.state_dict(), header)
    (tmp_path / "layout").mkdir()
    write_layout(tmp_path / "layout", model, header, "the card", to == "sentence-transformers")
    (tmp_path / "layout/mine.txt").write_text("not ours")
    _, names = push_run(tmp_path / "layout", "o/n", private=True)
    assert set(hub.files) == set(names) >= {"README.md", "config.json", "model.safetensors"}
    assert ("1_Dense/model.safetensors" in names) is (to != "timm")
    assert "mine.txt" not in names
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    here, there = (
        rkd_cli.load(name, device="cpu", precision="fp32") for name in (tmp_path / "m.safetensors", "hf:o/n")
    )
    assert there.header == here.header == header
    assert there.embed([image]) == pytest.approx(here.embed([image]), abs=1e-5)
    if to == "timm":
        theirs = timm.create_model("hf-hub:o/n", pretrained=True).eval()
        pixels = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(theirs(pixels), timm.create_model(f"local-dir:{tmp_path}/layout", True).eval()(pixels))


def test_a_hub_model_of_timm_is_a_teacher_by_its_name(hub: type[Hub], tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=7).eval()
    timm.models.save_for_hf(network, tmp_path / "theirs", safe_serialization=True)
    hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()})
    embedder = open_embedder("hf:o/n")
    assert isinstance(embedder, NetworkEmbedder)
    assert (embedder.header.base, embedder.size, embedder.unit) == ("timm:test_resnet", network.num_features, True)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        due = network.forward_head(network.forward_features((images / 255 - mean) / std), pre_logits=True)
        torch.testing.assert_close(embedder.network(images), F.normalize(due), rtol=1e-4, atol=1e-5)


def test_a_hub_model_that_cannot_be_read_is_one_line(hub: type[Hub]) -> None:
    hub.files.update({"config.json": b'{"model_type": "dinov2"}', "model.safetensors": b""})
    with pytest.raises(CheckpointError, match=r"transformers cannot load it"):
        rkd_cli.load("hf:o/n")
    hub.files["config.json"] = b"{}"
    with pytest.raises(CheckpointError, match=r"is a model of another library than timm and transformers\."):
        rkd_cli.load("hf:o/n")
    hub.files["config.json"] = b"{"
    with pytest.raises(CheckpointError, match=r"config.json: is damaged or from a newer rkd"):
        rkd_cli.load("hf:o/n")
    hub.files["config.json"] = b'{"architecture": "test_resnet", "pretrained_cfg": {}}'
    with pytest.raises(CheckpointError, match=r"timm cannot load it"):
        rkd_cli.load("hf:o/n")
    del hub.files["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"^hf:o/n: contains no best.safetensors, .* and no network of timm"):
        rkd_cli.load("hf:o/n")


@pytest.mark.parametrize(
    ("teacher", "is_pushed"), [("timm:resnet18", True), ("/home/somebody/best.safetensors", False)]
)
def test_a_file_of_teachers_is_pushed_unless_it_names_files_of_this_machine(
    hub: type[Hub], run: Path, teacher: str, is_pushed: bool
) -> None:
    header = read_header(run / "best.safetensors").model_copy(update={"base": JOINED, "teachers": ((teacher, "0"),)})
    save_model(run / "teachers.safetensors", {}, header)
    push_run(run, "o/n", private=True)
    assert ("teachers.safetensors" in hub.files) is is_pushed


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
